"""The resumable loader: a resumed stream equals an uninterrupted one, bit for bit."""

from __future__ import annotations

import json
import logging
import random
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    get_worker_info,
)

from hydra_ckpt.errors import CheckpointConfigError, TopologyError
from hydra_ckpt.state.dataloader import ResumableLoader, resumable


class Augmented(Dataset[torch.Tensor]):
    """Sample i is (i, three random numbers): one from each generator an augmentation may use."""

    def __init__(self, size: int = 37) -> None:
        self.size = size
        self.loaded: list[int] = []

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> torch.Tensor:
        self.loaded.append(index)
        return torch.tensor([index, torch.rand(()).item(), random.random(), np.random.rand()], dtype=torch.float64)


def make(size: int = 37, batch_size: int | None = 4, **options: Any) -> ResumableLoader[torch.Tensor]:
    names = ("seed", "rank", "world_size")
    ours = {name: options.pop(name) for name in names if name in options}
    options.setdefault("shuffle", True)
    return resumable(DataLoader(Augmented(size), batch_size=batch_size, **options), **ours)


def epochs(loader: ResumableLoader[torch.Tensor], count: int) -> list[torch.Tensor]:
    return [batch for _ in range(count) for batch in loader]


def ids(batches: list[torch.Tensor]) -> list[int]:
    return [int(row[0]) for batch in batches for row in batch]


def assert_same(left: list[torch.Tensor], right: list[torch.Tensor]) -> None:
    assert len(left) == len(right)
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


WORKERS = [
    pytest.param({}, id="in-process"),
    pytest.param({"num_workers": 2}, id="workers"),
    pytest.param({"num_workers": 2, "persistent_workers": True, "prefetch_factor": 4}, id="persistent"),
]


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("stop", [0, 1, 7, 9, 10, 13])
def test_a_resumed_stream_equals_an_uninterrupted_one(workers: dict[str, Any], stop: int) -> None:
    whole = epochs(make(seed=3, **workers), 3)
    first = make(seed=3, **workers)
    seen: list[torch.Tensor] = []
    while len(seen) < stop:
        for batch in first:
            seen.append(batch)
            if len(seen) == stop:
                break
    state = json.loads(json.dumps(first.state_dict()))

    second = make(seed=99, **workers)
    second.load_state_dict(state)
    while second.epoch < 3:
        seen += list(second)

    assert_same(seen, whole)


def test_workers_change_nothing() -> None:
    alone = epochs(make(), 2)
    for workers in (1, 2):
        assert_same(epochs(make(num_workers=workers), 2), alone)


def test_every_epoch_has_its_own_order_and_augmentation() -> None:
    first, second = (epochs(loader, 1) for loader in [make()] * 2)
    assert ids(first) != ids(second)
    assert sorted(ids(first)) == sorted(ids(second)) == list(range(37))
    drawn = {tuple(row[1:].tolist()) for batch in first + second for row in batch}
    assert len(drawn) == 74
    assert ids(epochs(make(seed=1), 1)) != ids(first)


def test_without_shuffle_the_order_is_the_dataset_s() -> None:
    assert ids(epochs(make(shuffle=False), 1)) == list(range(37))


@pytest.mark.parametrize("workers", [0, 2])
def test_only_yielded_batches_count(workers: int) -> None:
    loader = make(num_workers=workers)
    for number, _ in enumerate(loader, start=1):
        state = loader.state_dict()
        assert (state["batches"], state["position"]) == (number, min(number * 4, 37))
    state = {"version": 1, "seed": 0, "epoch": 1, "batches": 0, "position": 0, "samples": 37}
    assert loader.state_dict().items() >= state.items()


def test_samples_passed_over_are_not_loaded() -> None:
    first, second = make(size=1000), make(size=1000)
    list(islice(first, 200))
    second.load_state_dict(first.state_dict())
    rest = list(second)
    assert isinstance(second.dataset, Augmented)
    assert len(second.dataset.loaded) == sum(map(len, rest)) == 200


def test_a_position_at_the_very_end_yields_nothing_and_moves_on() -> None:
    first, second = make(), make()
    states = [first.state_dict() for _ in first]
    second.load_state_dict(states[-1])
    assert list(second) == []
    assert second.epoch == 1


def test_after_a_break_the_epoch_starts_again() -> None:
    loader = make()
    begun = list(islice(loader, 3))
    assert_same(list(loader)[:3], begun)


def test_an_epoch_is_over_when_its_last_batch_is_taken() -> None:
    whole, counted = make(), make()
    for _ in range(3):
        batches = iter(counted)
        assert ids([next(batches) for _ in range(len(counted))]) == ids(list(whole))
    for _ in counted:
        if counted.state_dict()["batches"] == len(counted):
            break
    assert ids(list(whole)) != ids(list(counted)) == ids(list(whole))


def test_a_loaded_position_serves_one_iteration() -> None:
    loader = make()
    list(islice(loader, 3))
    loader.load_state_dict(loader.state_dict())
    assert loader.state_dict()["batches"] == 3
    assert len(list(loader)) == len(loader) - 3
    assert len(list(loader)) == len(loader)


def test_set_epoch_of_the_current_epoch_keeps_the_position() -> None:
    loader = make()
    list(islice(loader, 3))
    loader.load_state_dict(loader.state_dict())
    loader.set_epoch(0)
    assert len(list(loader)) == len(loader) - 3
    loader.set_epoch(0)
    assert_same(list(loader), epochs(make(), 1))


@pytest.mark.parametrize("workers", WORKERS)
def test_the_process_s_generators_are_left_alone(workers: dict[str, Any]) -> None:
    loader = make(**workers)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()
    epochs(loader, 2)
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()
    assert torch.equal(before[0], after[0])
    assert before[1] == after[1]
    assert all(np.array_equal(a, b) for a, b in zip(before[2], after[2], strict=True))


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_out_the_order_that_one_rank_sees(world_size: int) -> None:
    size, share = 36, 6 // world_size
    alone = epochs(make(size, 6), 2)
    ranks = [epochs(make(size, share, rank=rank, world_size=world_size), 2) for rank in range(world_size)]
    assert_same([torch.cat(parts) for parts in zip(*ranks, strict=True)], alone)


def test_the_last_short_batch_is_shared_out_evenly() -> None:
    ranks = [epochs(make(size=9, batch_size=2, rank=rank, world_size=4, shuffle=False), 1) for rank in range(4)]
    assert [ids(batches) for batches in ranks] == [[0, 1, 8], [2, 3, 0], [4, 5, 1], [6, 7, 2]]
    dropping = [make(size=9, batch_size=2, rank=rank, world_size=4, drop_last=True) for rank in range(4)]
    assert [len(loader) for loader in dropping] == [1] * 4
    assert [len(list(loader)) for loader in dropping] == [1] * 4


def test_peers_of_a_replica_see_equal_batches() -> None:
    assert_same(*(epochs(make(rank=1, world_size=2), 1) for _ in range(2)))


@pytest.mark.parametrize(("batch_size", "world_size"), [(4, 1), (2, 3), (5, 1), (1, 4)])
def test_a_stream_continues_with_other_ranks_and_batches(batch_size: int, world_size: int) -> None:
    whole = torch.cat(epochs(make(size=36), 1))
    before = [make(size=36, batch_size=2, rank=rank, world_size=2) for rank in range(2)]
    seen = [list(islice(loader, 3)) for loader in before]
    states = [loader.state_dict() for loader in before]
    assert states[0] == states[1]

    after = [make(36, batch_size, rank=rank, world_size=world_size) for rank in range(world_size)]
    for loader in after:
        loader.load_state_dict(states[0])
    rest = list(zip(*after, strict=True))

    first = torch.cat([torch.cat(parts) for parts in zip(*seen, strict=True)])
    second = torch.cat([torch.cat(parts) for parts in rest])
    assert torch.equal(torch.cat([first, second])[:36], whole)


class EveryOther(Sampler[int]):
    def __init__(self) -> None:
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 18

    def __iter__(self) -> Any:
        return iter([(2 * i + self.epoch) % 37 for i in torch.randperm(18).tolist()])


@pytest.mark.parametrize(
    "sampler",
    [
        SubsetRandomSampler(range(5, 30)),
        WeightedRandomSampler(torch.arange(37.0).tolist(), 21),
        RandomSampler(Augmented(), replacement=True, num_samples=50, generator=torch.Generator()),
        EveryOther(),
    ],
    ids=lambda sampler: type(sampler).__name__,
)
def test_samplers_that_can_be_exact(sampler: Sampler[int]) -> None:
    def loader() -> ResumableLoader[torch.Tensor]:
        return make(shuffle=None, sampler=sampler)

    state = torch.get_rng_state()
    whole = epochs(loader(), 2)
    assert torch.equal(torch.get_rng_state(), state)
    assert ids(whole[: len(whole) // 2]) != ids(whole[len(whole) // 2 :])
    first, second = loader(), loader()
    begun = list(islice(first, 2))
    second.load_state_dict(first.state_dict())
    assert_same(begun + epochs(second, 2), whole)


def test_a_plain_batch_sampler_is_taken_apart() -> None:
    batching = BatchSampler(SequentialSampler(Augmented()), batch_size=5, drop_last=True)
    loader = resumable(DataLoader(Augmented(), batch_sampler=batching))
    assert (loader.batch_size, loader.drop_last, len(loader)) == (5, True, 7)
    assert [len(batch) for batch in loader] == [5] * 7


def test_a_loader_without_batches() -> None:
    loader = make(size=5, batch_size=None)
    samples = list(loader)
    assert loader.batch_size is None
    assert [sample.shape for sample in samples] == [torch.Size([4])] * 5
    assert sorted(int(sample[0]) for sample in samples) == list(range(5))


class Many(Augmented):
    def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
        return [self[index] for index in indices]


def noisy(samples: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(samples) + torch.rand(())


@pytest.mark.parametrize("dataset", [Augmented(), Many()], ids=["one", "many"])
def test_batch_loading_and_random_collation_resume_too(dataset: Dataset[torch.Tensor]) -> None:
    def loader(workers: int) -> ResumableLoader[torch.Tensor]:
        return resumable(DataLoader(dataset, 4, shuffle=True, num_workers=workers, collate_fn=noisy))

    whole = epochs(loader(0), 1)
    first, second = loader(2), loader(2)
    begun = list(islice(first, 4))
    second.load_state_dict(first.state_dict())
    assert_same(begun + list(second), whole)


def open_in_worker(worker: int) -> None:
    info = get_worker_info()
    assert info is not None
    info.dataset.handle = worker  # type: ignore[attr-defined]


class NeedsWorkerInit(Dataset[int]):
    handle = -1

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> int:
        return self.handle


def test_worker_init_fn_reaches_the_user_s_dataset() -> None:
    loader = resumable(DataLoader(NeedsWorkerInit(), batch_size=2, num_workers=2, worker_init_fn=open_in_worker))
    assert {int(handle) for batch in loader for handle in batch} == {0, 1}


class Stream(IterableDataset[int]):
    def __iter__(self) -> Any:
        return iter(range(3))


class Stateful(DataLoader[int]):
    def state_dict(self) -> dict[str, int]:
        return {}


class Wrapping(DataLoader[int]):
    def __iter__(self) -> Any:
        return iter(())


class Own(Sampler[int]):
    def __iter__(self) -> Any:
        return iter(range(3))


class Buckets(BatchSampler):
    pass


@pytest.mark.parametrize(
    ("loader", "says"),
    [
        (DataLoader(Stream()), "map-style"),
        (Stateful(Augmented()), "AppState unchanged"),
        (Wrapping(Augmented()), "plain DataLoader"),
        (DataLoader(Augmented(), sampler=Own()), "set_epoch"),
        (DataLoader(Augmented(), batch_sampler=Buckets(SequentialSampler(Augmented()), 2, False)), "sampler="),
        (DataLoader(Augmented(), sampler=DistributedSampler(Augmented(), 2, 0)), "rank="),
        (DataLoader(Augmented(), num_workers=1, in_order=False), "in_order"),
    ],
    ids=["iterable", "stateful", "wrapping", "sampler", "batch_sampler", "distributed", "unordered"],
)
def test_what_cannot_be_exact_is_refused(loader: DataLoader[Any], says: str) -> None:
    with pytest.raises(CheckpointConfigError, match=says):
        resumable(loader)


def test_a_rank_outside_the_world_is_refused() -> None:
    with pytest.raises(TopologyError, match="rank=2"):
        make(rank=2, world_size=2)


def test_states_that_do_not_fit_are_refused_and_change_nothing() -> None:
    loader, longer = make(), make(size=40)
    list(islice(longer, 2))
    with pytest.raises(CheckpointConfigError, match=r"40 samples.*gives 37"):
        loader.load_state_dict(longer.state_dict())
    with pytest.raises(CheckpointConfigError, match="not written by"):
        loader.load_state_dict({"epoch": 1})
    with pytest.raises(CheckpointConfigError, match="not written by"):
        loader.load_state_dict({**loader.state_dict(), "version": 2})
    assert loader.state_dict() == make().state_dict()


class Words(Sampler[Any]):
    """Gives a list, rotated by the epoch."""

    def __init__(self, indices: list[Any]) -> None:
        self.indices, self.epoch = indices, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Any:
        return iter(self.indices[self.epoch :] + self.indices[: self.epoch])


def weighted() -> ResumableLoader[torch.Tensor]:
    return make(sampler=WeightedRandomSampler(torch.ones(37), 37), shuffle=None)


def subset(*indices: int) -> ResumableLoader[torch.Tensor]:
    return make(sampler=SubsetRandomSampler(indices), shuffle=None)


def listed(indices: list[Any]) -> ResumableLoader[torch.Tensor]:
    return make(sampler=Words(indices), shuffle=None)


UNLIKE: dict[str, Any] = {
    "shuffled": (make, lambda: make(shuffle=False), "RandomSampler.*SequentialSampler"),
    "not shuffled": (lambda: make(shuffle=False), make, "SequentialSampler.*RandomSampler"),
    "indices": (lambda: subset(*range(20)), lambda: subset(*range(1, 21)), "SubsetRandomSampler"),
    "class": (weighted, make, "WeightedRandomSampler.*RandomSampler"),
    "words": (lambda: listed(list("abcdefgh")), lambda: listed(list("abcdefhg")), "Words"),
}


@pytest.mark.parametrize("taken", [0, 2])
@pytest.mark.parametrize(("saved", "here", "says"), UNLIKE.values(), ids=UNLIKE.keys())
def test_another_order_is_refused_and_changes_nothing(saved: Any, here: Any, says: str, taken: int) -> None:
    first, second = saved(), here()
    first.dataset.__class__ = Anything
    list(islice(first, taken))
    before = second.state_dict()
    with pytest.raises(CheckpointConfigError, match=rf"at sample {4 * taken} of epoch 0.*{says}.*shuffle="):
        second.load_state_dict(first.state_dict())
    assert second.state_dict() == before


class Anything(Augmented):
    """Has a sample for every index."""

    def __getitem__(self, index: Any) -> torch.Tensor:
        return torch.zeros(1)


def test_what_a_sampler_became_in_the_run_is_compared() -> None:
    first, second = weighted(), weighted()
    first._sampler.weights[:20] = 0
    list(islice(first, 2))
    state = first.state_dict()
    with pytest.raises(CheckpointConfigError, match="weights or indices that it had then"):
        second.load_state_dict(state)
    second._sampler.weights[:20] = 0
    second.load_state_dict(state)
    first._sampler.weights[20:] = 0  # the order of this epoch stays
    assert first.state_dict() == second.state_dict() == state


def test_an_equal_order_is_equal_whatever_gives_it() -> None:
    first, second = listed(list(range(37))), make(shuffle=False, seed=5)
    list(islice(first, 2))
    second.load_state_dict(first.state_dict())
    assert ids(list(second)) == list(range(8, 37))
    for count in (1, 2, 4):  # ranks
        other = make(world_size=count, rank=count - 1, seed=9)
        third = make(batch_size=8)
        list(islice(third, 2))
        other.load_state_dict(third.state_dict())
        assert other.state_dict() == third.state_dict()


def test_states_of_earlier_versions_and_of_orders_that_cannot_be_compared_load() -> None:
    first, second = make(), make(shuffle=False)
    list(islice(first, 2))
    state = first.state_dict()
    del state["order"], state["sampler"]
    second.load_state_dict(state)
    assert second.state_dict()["position"] == 8
    odd, other = listed([b"a", (1, "b"), None, 3]), listed([b"b", (1, "b"), None, 3])
    other.load_state_dict(odd.state_dict())


def test_a_sequential_order_is_never_made() -> None:
    loader = resumable(DataLoader(range(1 << 50), batch_size=4))
    list(islice(loader, 2))
    state = loader.state_dict()
    other = resumable(DataLoader(range(1 << 50), batch_size=4))
    other.load_state_dict(state)
    assert next(iter(other)).tolist() == [8, 9, 10, 11]


def test_a_grown_dataset_is_welcome_between_epochs() -> None:
    loader, longer = make(), make(size=40)
    list(loader)
    longer.load_state_dict(loader.state_dict())
    assert longer.epoch == 1
    assert len(ids(list(longer))) == 40


def test_another_seed_is_overruled_and_said(caplog: pytest.LogCaptureFixture) -> None:
    loader = make(seed=5)
    with caplog.at_level(logging.INFO):
        loader.load_state_dict(make(seed=4).state_dict())
    assert loader.seed == 4
    assert "checkpoint's seed 4, not 5" in caplog.text
