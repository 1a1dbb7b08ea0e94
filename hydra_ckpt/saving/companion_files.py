"""The small files of a checkpoint: configuration, tokenizer, model card, names."""

from __future__ import annotations

import tempfile

from hydra_ckpt.errors import CheckpointConfigError
from hydra_ckpt.hub.assets import tokenizer_assets
from hydra_ckpt.hub.card import SaveInfo
from hydra_ckpt.hub.model_export import ModelExport
from hydra_ckpt.resolved import ResolvedConfig
from hydra_ckpt.saving.outputs import Agreed
from hydra_ckpt.state.capture import Captured
from hydra_ckpt.store import names


class SmallFiles:
    """Makes the small files of checkpoints: the run's configuration, and what a Hugging Face directory has.

    Args:
        config: The settings.
        export: Knows what exports need.
    """

    def __init__(self, config: ResolvedConfig, export: ModelExport) -> None:
        self._config, self._export = config, export
        self._tokenizer_files: tuple[object, dict[str, bytes]] = (None, {})

    def collect(
        self, captured: Captured, agreed: Agreed, consolidated: bool, export_only: bool, made: SaveInfo | None
    ) -> dict[str, bytes]:
        """Coordinator only: the small files by path in the checkpoint.

        The files of an export are included even without one, so that it can be made later.
        """
        found = {}
        if not export_only:
            found = {f"{names.CONFIG}/{name}": text.encode() for name, text in self._config.hydra_texts}
        for part, (model, adapter) in captured.models.items():
            place = f"{part}/{names.CONSOLIDATED if consolidated else names.ASSETS}"
            naming = agreed.namings[part]
            assets = self._export.assets(model, naming, adapter, has_tokenizer=captured.tokenizer is not None)
            assets.update(self._tokenizer(captured.tokenizer))
            if made is not None:
                assets.update(self._export.card(model, made))
            found.update({f"{place}/{path}": data for path, data in assets.items()})
            if not export_only and not self._config.write.is_peft and not (consolidated and naming.is_plain):
                found[f"{part}/{names.NAMING}"] = agreed.naming_files[part]
        return found

    def check(self, captured: Captured, agreed: Agreed) -> None:
        """Coordinator only: check that exports can be made as configured, long before one is due.

        Raises:
            CheckpointError: Something they need is missing.
        """
        directory = self._config.write.staging_dir
        for part, (model, adapter) in captured.models.items():
            self._export.assets(model, agreed.namings[part], adapter, has_tokenizer=captured.tokenizer is not None)
        if directory is not None:
            try:
                directory.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=directory):
                    pass
            except OSError as error:
                raise CheckpointConfigError(
                    f"checkpoint.staging_dir={directory} cannot be written to: {error.strerror}. Name a local directory"
                ) from None

    def _tokenizer(self, tokenizer: object) -> dict[str, bytes]:
        """A tokenizer's files; cached, because saving a large tokenizer is slow."""
        if self._tokenizer_files[0] is not tokenizer:
            self._tokenizer_files = (tokenizer, tokenizer_assets(tokenizer))
        return self._tokenizer_files[1]
