"""The small files of an export: config.json, generation_config.json, the tokenizer's."""

from __future__ import annotations

import copy
import json
import logging
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from torch import nn

from hydra_ckpt.errors import CheckpointConfigError
from hydra_ckpt.hub.conversion import is_transformers_model, original_class
from hydra_ckpt.hub.reference import Reference
from hydra_ckpt.state.peft import adapter_config
from hydra_ckpt.state.wrappers import unwrap

log = logging.getLogger(__name__)

# File names of tokenizers and processors stored with a model.
_TOKENIZER_FILES = (
    "*.spm",
    "*.tiktoken",
    "added_tokens.json",
    "additional_chat_templates/*.jinja",
    "audio_tokenizer_config.json",
    "byte_maps.json",
    "chat_template.*",
    "dict.txt",
    "emoji.json",
    "entity_vocab.json",
    "merges.txt",
    "normalizer.json",
    "preprocessor_config.json",
    "processor_config.json",
    "prophetnet.tokenizer",
    "sentencepiece*.model",
    "special_tokens_map.json",
    "spiece.model",
    "spm*.model",
    "tekken.json",
    "tokenizer.json",
    "tokenizer.model*",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
    "vocab.*",
)
# Any of these may declare custom code.
_CODED = ("config.json", "processor_config.json", "preprocessor_config.json", "tokenizer_config.json")


def model_assets(model: nn.Module, dtype: str | None = None) -> dict[str, bytes]:
    """Configuration files of a transformers or diffusers model; none for any other model.

    They are what `save_pretrained` would write. The live model's configuration is not touched.

    Args:
        model: The model.
        dtype: The dtype of the weights, if it differs from the live model's.
    """
    model = unwrap(model)
    diffusers = sys.modules.get("diffusers")
    if diffusers is not None and isinstance(model, diffusers.ModelMixin):
        with naming_unwritable("the model's config", model.config):
            body = json.loads(model.to_json_string())
        return {"config.json": json_bytes({**body, "_class_name": original_class(model).__name__})}
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return {}
    if original_class(model).save_pretrained is not transformers.PreTrainedModel.save_pretrained:
        log.warning(
            "%s has its own save_pretrained(); the export has the usual tensors and configurations, but nothing that "
            "this method may add to them",
            original_class(model).__name__,
        )
    config = copy.deepcopy(model.config)
    config.architectures = [original_class(model).__name__]
    config.dtype = dtype or next(
        (str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.is_floating_point()), None
    )
    if getattr(model, "hf_quantizer", None) is None and hasattr(config, "quantization_config"):
        del config.quantization_config  # from the files it started from; these weights are not quantized
    found = _code(model, config)
    found.update(_saved(config, "the model's config"))
    if model.can_generate() and model.generation_config is not None:
        found.update(_generation(copy.deepcopy(model.generation_config)))
    return found


def _generation(config: Any) -> dict[str, bytes]:
    try:
        return _saved(config, "the model's generation_config")
    except CheckpointConfigError:
        raise  # also a ValueError
    except ValueError as error:  # contradictory settings; transformers only warns when it opens them
        log.warning("generation_config.json is written as it is, although transformers finds it invalid: %s", error)
        return {"generation_config.json": config.to_json_string().encode()}


def _code(model: nn.Module, config: Any) -> dict[str, bytes]:
    """The modules that a model of a custom class needs, if the class was registered; the configuration names them."""
    kind: Any = original_class(model)
    if getattr(kind, "_auto_class", None) is None:
        return {}
    if kind.__module__ == "__main__":
        log.warning("the code of %s is not exported: it is defined in the program, not in a module", kind.__name__)
        return {}
    from transformers.dynamic_module_utils import custom_object_save

    with tempfile.TemporaryDirectory() as directory:
        custom_object_save(kind.__new__(kind), directory, config=config)  # needs only the class, not the sharded model
        return _content(Path(directory))


def derives_generation(model: nn.Module) -> bool:
    """Whether the generation settings come from the model's configuration, and were not set or read from a file."""
    model = unwrap(model)
    if not is_transformers_model(model) or not cast(Any, model).can_generate():
        return False
    live = cast(Any, model).generation_config
    if live is None or not getattr(live, "_from_model_config", False):
        return False
    # The mark stays when settings are changed afterwards.
    return bool(live.to_diff_dict() == type(live).from_model_config(model.config).to_diff_dict())


def adapter_assets(model: nn.Module, adapter: str) -> dict[str, bytes]:
    """The configuration of a PEFT adapter, in peft's form."""
    config = adapter_config(model, adapter)
    mapping = None
    if config.task_type is None:
        base = original_class(unwrap(model).get_base_model())  # type: ignore[operator]
        mapping = {"base_model_class": base.__name__, "parent_library": base.__module__}
    return _saved(config, f"the config of the adapter {adapter!r}", auto_mapping_dict=mapping)


def reference_assets(reference: Reference, *, with_tokenizer: bool) -> dict[str, bytes]:
    """The small files that come from the reference model, because a live model does not have them.

    Args:
        reference: The reference model.
        with_tokenizer: Whether to include its tokenizer or processor, because there is no live one.
    """
    patterns = _TOKENIZER_FILES if with_tokenizer else ()
    wanted = [name for pattern in patterns for name in reference.matching(pattern)]
    if any("auto_map" in reference.json(name) for name in _CODED):
        wanted += reference.matching("*.py")
    return {name: reference.read(name) for name in wanted}


def json_bytes(body: Mapping[str, Any]) -> bytes:
    """A configuration in the form that transformers writes."""
    return (json.dumps(body, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def tokenizer_assets(tokenizer: Any) -> dict[str, bytes]:
    """The files a tokenizer or processor saves; none if there is no tokenizer."""
    return {} if tokenizer is None else _saved(tokenizer, "the tokenizer")


def _saved(thing: Any, what: str, **options: Any) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as directory, naming_unwritable(what, thing):
        thing.save_pretrained(directory, **options)
        return _content(Path(directory))


@contextmanager
def naming_unwritable(what: str, thing: Any) -> Iterator[None]:
    """Turn the error of a value that JSON cannot express into one that says where the value is.

    Args:
        what: The object, for the message.
        thing: The object: a configuration, or a tokenizer.

    Raises:
        CheckpointConfigError: It holds such a value.
    """
    try:
        yield
    except TypeError as error:
        found = _unwritable(thing)
        if found is None:
            raise
        key, value = found
        raise CheckpointConfigError(
            f"{what}: {key} is a {type(value).__module__}.{type(value).__qualname__} ({value!r}), which its "
            f"save_pretrained() cannot write as JSON ({error}). Make it a string, a number, a list or a dict, or "
            "remove it before the save"
        ) from error


def _unwritable(thing: Any) -> tuple[str, Any] | None:
    """The first value that JSON cannot express, and its key. A tokenizer saves the arguments it was created with."""
    for held in (getattr(thing, "init_kwargs", None), vars(thing) if hasattr(thing, "__dict__") else None, thing):
        found = _beyond_json(held, "") if isinstance(held, Mapping) else None
        if found is not None:
            return found
    return None


def _beyond_json(value: Any, key: str) -> tuple[str, Any] | None:
    if isinstance(value, Mapping):
        items = [(f"{key}.{name}".lstrip("."), item) for name, item in value.items() if not str(name).startswith("_")]
    elif isinstance(value, (list, tuple)):
        items = [(f"{key}[{index}]", item) for index, item in enumerate(value)]
    elif hasattr(value, "to_dict"):  # a configuration within another one
        return _beyond_json(value.to_dict(), key)
    else:
        try:
            json.dumps(value)
        except TypeError:
            return key, value
        return None
    return next((found for name, item in items if (found := _beyond_json(item, name)) is not None), None)


def _content(directory: Path) -> dict[str, bytes]:
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}
