"""What is refused before it can harm a checkpoint."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from hydra_ckpt import (
    AppState,
    CheckpointCallback,
    CheckpointConfigError,
    Checkpointer,
    CheckpointError,
    CheckpointExistsError,
    CheckpointingConfig,
    KeyMismatchError,
    TopologyError,
)
from hydra_ckpt.saving.live_shares import Sources
from hydra_ckpt.saving.staged import Staged
from hydra_ckpt.storage.pool import SMALL_BYTES, BufferPool
from hydra_ckpt.store.catalog import scan
from hydra_ckpt.store.owner import look
from hydra_ckpt.testing import FaultyFiles, run_distributed


def engine(root: Path, **options: Any) -> Checkpointer:
    return CheckpointingConfig(checkpoint_dir=str(root), **options).build(0, 0, 0)


def state_of(value: float = 0.0) -> AppState:
    model = nn.Linear(2, 2)
    nn.init.constant_(model.weight, value)
    return AppState(model, torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize("numbers", [{"step": 1.0}, {"step": True}, {"step": 10**18}, {"step": 2, "epoch": 0.5}])
def test_steps_and_epochs_are_whole_numbers(tmp_path: Path, numbers: dict[str, Any]) -> None:
    with engine(tmp_path) as checkpointer:
        checkpointer.save(state_of(), step=1)
        with pytest.raises(CheckpointConfigError, match=list(numbers)[-1]):
            checkpointer.save(state_of(), **numbers)
        assert [path.name for path in tmp_path.glob("epoch*")] == ["epoch_0_step_1"]
        checkpointer.save(state_of(), step=torch.tensor(3))
    assert scan(tmp_path).pointed("LATEST").name == "epoch_0_step_3"


def test_the_callback_refuses_an_epoch_that_is_a_fraction(tmp_path: Path) -> None:
    with CheckpointCallback(CheckpointingConfig(checkpoint_dir=str(tmp_path)), every_n_steps=1) as callback:
        callback.on_train_begin(state_of())
        with pytest.raises(CheckpointConfigError, match=r"int\(epoch\)"):
            callback.on_step_end(1, epoch=0.5)


@pytest.mark.parametrize("hook", ["on_step_end", "on_epoch_end", "on_validation_end"])
def test_hooks_before_the_beginning_are_refused(tmp_path: Path, hook: str) -> None:
    arguments = {"on_step_end": (1,), "on_epoch_end": (0,), "on_validation_end": ({"loss": 1.0},)}
    begun = CheckpointCallback(CheckpointingConfig(checkpoint_dir=str(tmp_path)))
    with begun as callback, pytest.raises(CheckpointConfigError, match="on_train_begin"):
        getattr(callback, hook)(*arguments[hook])
    with CheckpointCallback(CheckpointingConfig(checkpoint_dir=str(tmp_path), enabled=False)) as callback:
        getattr(callback, hook)(*arguments[hook])


def test_hooks_after_the_end_are_refused_alike(tmp_path: Path) -> None:
    state = AppState(nn.Linear(2, 2))
    with CheckpointCallback(CheckpointingConfig(checkpoint_dir=str(tmp_path))) as callback:
        callback.on_train_begin(state)
        callback.on_step_end(1)
        callback.on_train_end()
    hooks: dict[str, tuple[Any, ...]] = {
        "on_step_end": (2,),
        "on_epoch_end": (0,),
        "on_validation_end": ({"loss": 1.0},),
        "on_train_end": (),
        "on_train_begin": (state,),
    }
    for hook, arguments in hooks.items():
        with pytest.raises(CheckpointError, match="the Checkpointer is closed"):
            getattr(callback, hook)(*arguments)
    callback.on_exception(RuntimeError())
    callback.close()


def test_a_run_that_goes_back_sets_the_later_steps_aside(tmp_path: Path) -> None:
    state = state_of()
    with engine(tmp_path, on_conflict="set_aside") as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(state, step=step)
        assert checkpointer.load(state, restore_from=tmp_path / "epoch_0_step_1").step == 1
        checkpointer.load(state, restore_from=" LATEST ", parts=["model"])  # weights only: the run stays where it is
        checkpointer.save(state, step=2)
        assert sorted(item.step for item in scan(tmp_path).checkpoints) == [1, 2]
    assert len(list(tmp_path.glob(".epoch_0_step_*.aside-*"))) == 2


def test_a_refused_return_changes_nothing(tmp_path: Path) -> None:
    state = state_of(1.0)
    with engine(tmp_path) as checkpointer:
        checkpointer.save(state, step=1)
        checkpointer.save(state, step=2)
        with torch.no_grad():
            state.models[""][0].weight.fill_(7.0)
        with pytest.raises(CheckpointExistsError):
            checkpointer.load(state, restore_from="epoch_0_step_1")
    assert torch.equal(state.models[""][0].weight, torch.full((2, 2), 7.0))


class Lookahead(torch.optim.Optimizer):
    """Wraps an optimizer, and leaves out Optimizer.__init__ as some do."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner, self.param_groups, self.state, self.defaults = inner, inner.param_groups, inner.state, {}

    def step(self) -> None:
        self.inner.step()


def test_optimizers_without_hooks_are_not_overlapped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = state_of(1.0)
    state = AppState(state.models[""][0], Lookahead(state.optimizers[0]))
    with engine(tmp_path, is_async=True) as checkpointer, caplog.at_level(logging.WARNING):
        for step in (1, 2):
            pending = checkpointer.save(state, step=step)
            with torch.no_grad():
                state.models[""][0].weight.add_(1.0)
            pending.result()
        assert len([record for record in caplog.records if "Lookahead" in record.message]) == 1
        checkpointer.load(state, restore_from="epoch_0_step_2")
    assert torch.equal(state.models[""][0].weight, torch.full((2, 2), 2.0))


def test_a_change_under_way_while_copies_are_made_is_found_when_it_ends() -> None:
    weight = torch.zeros(SMALL_BYTES)
    pool = BufferPool()

    def staged() -> Staged:
        made = Staged.copied(Sources({0: weight}, frozenset({0}), {}), pool, frozenset({0}))
        made.finish()
        return made

    torn = staged()
    weight.add_(1.0)  # PyTorch counts it only now, as if it had begun before
    torn.watch()
    with pytest.raises(Exception, match="changed while being copied"):
        torn.snapshot()
    torn.release()
    sound = staged()
    sound.let_change()
    weight.add_(1.0)
    sound.watch()
    assert bytes(sound.snapshot().sources[0]) == torch.ones(SMALL_BYTES).numpy().tobytes()
    sound.release()


class Odd:
    def __float__(self) -> float:
        raise RuntimeError("no number today")


def test_whatever_a_metric_raises_names_the_metric(tmp_path: Path) -> None:
    with engine(tmp_path) as checkpointer, pytest.raises(Exception, match=r"'loss'.*no number today"):
        checkpointer.save(state_of(), step=1, metrics={"loss": Odd()})


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_manifest_that_is_no_file_is_passed_over(tmp_path: Path, make: Any) -> None:
    with engine(tmp_path) as checkpointer:
        checkpointer.save(state_of(), step=1)
        checkpointer.save(state_of(), step=2)
    manifest = tmp_path / "epoch_0_step_2" / "manifest.json"
    manifest.unlink()
    make(manifest)
    with engine(tmp_path) as checkpointer:
        assert checkpointer.start(state_of()).step == 1


@pytest.mark.parametrize(
    "body",
    [
        '{"incarnation": [1], "host": "a", "pid": 1, "started": 1.0}',
        '{"pid": "abc"}',
        "[]",
        *(
            f'{{"incarnation": "a", "host": "a", "pid": 1, "started": {number}}}'
            for number in ("NaN", "1e999", "-Infinity")
        ),
    ],
)
def test_an_owner_record_that_makes_no_sense_counts_as_none(tmp_path: Path, body: str) -> None:
    (tmp_path / "owner.json").write_text(body)
    assert look(tmp_path / "owner.json").owner is None
    with engine(tmp_path) as checkpointer:
        checkpointer.save(state_of(), step=1)
    assert scan(tmp_path).pointed("LATEST") is not None


# -- models that change during a run -------------------------------------------------------------------------------


def test_modules_that_were_exchanged_added_or_taken_away_are_seen(tmp_path: Path) -> None:
    model = nn.ModuleDict({"kept": nn.Linear(2, 2), "body": nn.Linear(2, 2), "old": nn.Linear(2, 2)})
    model["tied"] = nn.Linear(2, 2)
    model["tied"].weight = model["kept"].weight
    state = AppState(model)
    with engine(tmp_path, save_consolidated="always") as checkpointer:
        checkpointer.save(state, step=1)
        model["body"] = nn.Linear(2, 2)
        model["new"] = nn.Linear(2, 2)
        del model["old"]
        model["tied"].weight = nn.Parameter(torch.ones(2, 2))
        model["kept"].bias = None
        model["kept"].register_buffer("count", torch.tensor(3))
        checkpoint = checkpointer.save(state, step=2).result()
        assert checkpoint is not None
        saved = load_file(checkpoint.path / "model" / "consolidated" / "model.safetensors")
        assert saved.keys() == model.state_dict().keys()
        assert all(torch.equal(saved[name], tensor) for name, tensor in model.state_dict().items())
        # A load fills what is there now, not what was there at the save.
        model["body"] = nn.Linear(2, 2)
        checkpointer.load(state)
        assert torch.equal(model["body"].weight, saved["body.weight"])


def _grow_alone(root: Path) -> str:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2))
    with CheckpointingConfig(checkpoint_dir=str(root)).build(dist.get_rank(), 0, 0) as checkpointer:
        checkpointer.save(AppState(model), step=1)
        if dist.get_rank() == 1:
            model.append(nn.Linear(2, 2))
        with pytest.raises(TopologyError) as refused:
            checkpointer.save(AppState(model), step=2)
    return str(refused.value)


def test_a_layer_that_only_one_rank_adds_is_refused_on_all(tmp_path: Path) -> None:
    for text in run_distributed(_grow_alone, 2, tmp_path):
        assert "only on rank 1: model: 1.weight" in text


class Hiding(nn.Linear):
    """Saves more than parameters and buffers, in a way of its own."""

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "scale"] = torch.ones(1)


def test_an_entry_that_a_module_saves_and_does_not_load_is_refused_by_the_first_save(tmp_path: Path) -> None:
    """`Hiding` writes an entry that it does not read again, so torch's own round trip fails too."""
    remedy = r"adds 0\.scale, .*allow_unsaved=\[\"model\.0\.scale\"\]"
    with engine(tmp_path) as checkpointer, pytest.raises(CheckpointConfigError, match=remedy):
        checkpointer.save(AppState(nn.Sequential(Hiding(2, 2))), step=1)
    with engine(tmp_path, allow_unsaved=["model.0.scale"]) as checkpointer:
        checkpointer.save(AppState(nn.Sequential(Hiding(2, 2))), step=1)
        assert checkpointer.load(AppState(nn.Sequential(Hiding(2, 2)))).missing == ("model.0.scale",)


# -- metrics around saves ------------------------------------------------------------------------------------------


def test_metrics_behind_the_end_belong_to_the_last_checkpoint(tmp_path: Path) -> None:
    with CheckpointCallback(CheckpointingConfig(checkpoint_dir=str(tmp_path)), on_improvement=True) as callback:
        callback.on_train_begin(state_of())
        callback.on_step_end(1)
        callback.on_train_end()
        assert callback.on_validation_end({"loss": 0.5}) is None
    assert scan(tmp_path).pointed("BEST").metrics == {"loss": 0.5}


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_a_step_whose_save_has_failed_may_be_saved_again(tmp_path: Path, is_async: bool) -> None:
    full = [True]
    files = FaultyFiles(lambda operation: 28 if full[0] and operation.kind == "rename" else None)
    config = CheckpointingConfig(checkpoint_dir=str(tmp_path), is_async=is_async, on_save_failure="warn")
    checkpointer = Checkpointer(config.resolve(), dp_rank=0, tp_rank=0, pp_rank=0, files=files)
    with CheckpointCallback(config, every_n_steps=1, on_improvement=True, checkpointer=checkpointer) as callback:
        callback.on_train_begin(state_of())
        callback.on_step_end(1)
        checkpointer.wait()
        full[0] = False
        assert callback.on_validation_end({"loss": 0.5}) is not None
        checkpointer.drain()
        assert callback.best.step == 1


def test_exchanged_parameters_keep_their_own_optimizer_state(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    optimizer = torch.optim.AdamW(model.parameters())
    state = AppState(model, optimizer)

    def step() -> None:
        model(torch.rand(3, 2)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    with engine(tmp_path) as checkpointer:
        checkpointer.save(state, step=1)
        model[0].weight, model[1].weight = model[1].weight, model[0].weight
        step()
        checkpointer.save(state, step=2)
        moments = [optimizer.state[layer.weight]["exp_avg"].clone() for layer in model]
        for layer in model:
            optimizer.state[layer.weight]["exp_avg"].zero_()
        checkpointer.load(state)
        assert all(
            torch.equal(optimizer.state[layer.weight]["exp_avg"], moment)
            for layer, moment in zip(model, moments, strict=True)
        )


def test_a_module_exchanged_within_its_wrapper_is_seen(tmp_path: Path) -> None:
    wrapper = nn.DataParallel(nn.Linear(2, 2))
    with engine(tmp_path, save_consolidated="always") as checkpointer:
        checkpointer.save(AppState(wrapper), step=1)
        wrapper.module = nn.Linear(2, 2)
        checkpoint = checkpointer.save(AppState(wrapper), step=2).result()
    assert checkpoint is not None
    saved = load_file(checkpoint.path / "model" / "consolidated" / "model.safetensors")
    assert torch.equal(saved["weight"], wrapper.module.weight)


class Apart:
    """Writes each expert of a stack as a tensor of its own."""

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return {f"{number}.weight": expert for number, expert in enumerate(state_dict["experts"])}

    def from_hf(self, hf_state_dict: dict[str, Any]) -> dict[str, Any]:
        return {"experts": torch.stack(list(hf_state_dict.values()))}


def test_an_adapter_is_asked_again_when_shapes_have_changed(tmp_path: Path) -> None:
    model = nn.ParameterDict({"experts": torch.randn(2, 2, 2)})
    model.state_dict_adapter = Apart()
    with engine(tmp_path, save_consolidated="always") as checkpointer:
        checkpointer.save(AppState(model), step=1)
        model["experts"].data = torch.randn(3, 2, 2)
        checkpoint = checkpointer.save(AppState(model), step=2).result()
    assert checkpoint is not None
    saved = load_file(checkpoint.path / "model" / "consolidated" / "model.safetensors")
    assert sorted(saved) == ["0.weight", "1.weight", "2.weight"]


def _tensor_parallel(root: Path) -> list[str]:
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("hydra_ckpt").addHandler(handler)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    model = nn.Linear(2, 2, bias=False)
    model.weight = nn.Parameter(distribute_tensor(torch.ones(2, 2), mesh, [Shard(0)]))
    for given in (None, mesh):
        with CheckpointCallback(CheckpointingConfig(checkpoint_dir=str(root / str(given is None)))) as callback:
            callback.on_train_begin(AppState(model), mesh=given)
    return [text for text in heard if "got no mesh" in text]


def test_a_mesh_that_was_not_passed_is_asked_for(tmp_path: Path) -> None:
    for heard in run_distributed(_tensor_parallel, 2, tmp_path):
        assert len(heard) == 1
        assert "with the dimension tp" in heard[0]


def test_another_optimizer_of_the_same_name_is_refused(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)

    class AdamW(torch.optim.Optimizer):
        """Has options, and so state, of its own."""

        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, {"lr": 0.1, "beta": 0.9})

    AdamW.__qualname__ = "AdamW"
    with engine(tmp_path) as checkpointer:
        checkpointer.save(AppState(model, torch.optim.AdamW(model.parameters())), step=1)
        with pytest.raises(KeyMismatchError, match=r"AdamW in the checkpoint, AdamW in the AppState.*only here: beta"):
            checkpointer.load(AppState(model, AdamW(model.parameters())))


def test_keys_that_lead_to_one_name_are_told(tmp_path: Path) -> None:
    class Box:
        def state_dict(self) -> dict[str, Any]:
            return {"a.b": torch.ones(1), "a": {"b": torch.zeros(1)}}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            raise NotImplementedError

    with engine(tmp_path) as checkpointer, pytest.raises(CheckpointError, match=r"box:a\.b: two tensors would have"):
        checkpointer.save(AppState(nn.Linear(2, 2), extras={"box": Box()}), step=1)
