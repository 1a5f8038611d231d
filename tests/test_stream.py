"""The stream of micro-batches: its order is a function of the position, whoever reads and from wherever."""

import multiprocessing
import os
import signal
from dataclasses import dataclass
from itertools import islice

import pytest
import torch
from torch import Tensor

from bksdm.data.stream import Stream


@dataclass(frozen=True)
class Numbers:
    """Sample i is the number i, with the seed that was given for it."""

    n: int

    def __len__(self) -> int:
        return self.n

    def sample(self, index: int, rng_seed: int) -> dict[str, Tensor]:
        return {"index": torch.tensor(index), "seed": torch.tensor(rng_seed)}

    def name(self, index: int) -> str:
        return f"number {index}"


def draws(stream: Stream, batches: int, first: int = 0, stride: int | None = None, name: str = "index") -> list[int]:
    return [int(value) for batch in islice(stream.batches(first, stride), batches) for value in batch[name]]


def test_a_micro_batch_is_stacked_samples() -> None:
    batch = next(Stream(Numbers(10), batch_size=4).batches())
    assert {name: tuple(value.shape) for name, value in batch.items()} == {"index": (4,), "seed": (4,)}


@pytest.mark.parametrize(("n", "batch_size"), [(8, 4), (10, 4), (3, 8), (1, 3), (7, 7)])
def test_every_pass_visits_every_sample_once(n: int, batch_size: int) -> None:
    order = draws(Stream(Numbers(n), batch_size), batches=3 * n)
    for begin in range(0, len(order), n):
        assert sorted(order[begin : begin + n]) == list(range(n))


def test_passes_differ_in_order() -> None:
    order = draws(Stream(Numbers(20), batch_size=20), batches=3)
    assert len({tuple(order[begin : begin + 20]) for begin in (0, 20, 40)}) == 3


@pytest.mark.parametrize("name", ["index", "seed"])
@pytest.mark.parametrize("first", [1, 2, 3, 7, 50])
@pytest.mark.parametrize(("n", "batch_size"), [(10, 4), (3, 8), (8, 4)])
def test_entering_anywhere_continues_the_same_sequence(n: int, batch_size: int, first: int, name: str) -> None:
    stream = Stream(Numbers(n), batch_size, seed=3)
    whole = draws(stream, first + 5, name=name)
    assert draws(stream, 5, first, name=name) == whole[first : first + 5 * batch_size]


@pytest.mark.parametrize("name", ["index", "seed"])
@pytest.mark.parametrize("sharing", [2, 3])
def test_processes_that_share_a_stream_get_all_of_it(sharing: int, name: str) -> None:
    stream = Stream(Numbers(10), 4, seed=3)
    own = [draws(stream, 6, first=4 * rank, stride=4 * sharing, name=name) for rank in range(sharing)]
    taken = [number for batch in range(6) for share in own for number in share[4 * batch : 4 * batch + 4]]
    assert taken == draws(stream, 6 * sharing, name=name)


def test_a_micro_batch_is_described_by_its_samples() -> None:
    stream = Stream(Numbers(5), 3)
    shown = ", ".join(f"number {index}" for index in draws(stream, 1, first=4))
    assert stream.described(4) == f"draws 4 to 6 ({shown})"
    assert Stream(Numbers(20), 9).described(0).endswith(", ...)")


def test_the_order_does_not_depend_on_the_batch_size() -> None:
    assert draws(Stream(Numbers(10), 2), 12) == draws(Stream(Numbers(10), 8), 3)
    assert draws(Stream(Numbers(10), 2), 12, name="seed") == draws(Stream(Numbers(10), 8), 3, name="seed")


def test_the_seed_decides_order_and_augmentation() -> None:
    first, again, other = (Stream(Numbers(20), 4, seed=seed) for seed in (0, 0, 1))
    for name in ("index", "seed"):
        assert draws(first, 5, name=name) == draws(again, 5, name=name) != draws(other, 5, name=name)


def test_every_draw_has_a_seed_of_its_own() -> None:
    assert len(set(draws(Stream(Numbers(4), 4), 25, name="seed"))) == 100


def test_the_order_does_not_depend_on_other_random_numbers() -> None:
    torch.manual_seed(0)
    first = draws(Stream(Numbers(10), 4), 5)
    torch.manual_seed(1)
    assert draws(Stream(Numbers(10), 4), 5) == first


@pytest.mark.parametrize("name", ["index", "seed"])
def test_workers_read_the_same(name: str) -> None:
    alone, helped = Stream(Numbers(10), 4), Stream(Numbers(10), 4, workers=2)
    assert draws(helped, 6, first=2, name=name) == draws(alone, 6, first=2, name=name)


def test_workers_outlive_an_interrupt_of_the_whole_group() -> None:
    batches = Stream(Numbers(10), 4, workers=1).batches()
    first = [next(batches)]
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGINT)  # as Ctrl-C does; the step under way still needs its batches
    first += list(islice(batches, 7))
    assert [int(value) for batch in first for value in batch["index"]] == draws(Stream(Numbers(10), 4), 8)
