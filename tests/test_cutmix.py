"""Samples that show a rectangle of another's picture."""

import pytest
import torch

from bksdm.data.cutmix import COMPOSED, CutMix
from bksdm.data.stream import Batch, Stream

COUNT, SIDES = 7, (6, 10)


class Numbered:
    """Pictures that are their own number all over; the deviation of the latents is a hundred more."""

    def __len__(self) -> int:
        return COUNT

    def name(self, index: int) -> str:
        return f"picture {index}"

    def sample(self, index: int, rng_seed: int) -> Batch:  # noqa: ARG002
        mean = torch.full((2, *SIDES), float(index))
        return {"latents_mean": mean, "latents_std": mean + 100, "input_ids": torch.tensor([index])}


class Pixels(Numbered):
    def sample(self, index: int, rng_seed: int) -> Batch:
        return {"pixel_values": super().sample(index, rng_seed)["latents_mean"]}


def drawn(share: float, count: int = 200) -> list[tuple[int, Batch]]:
    """Samples with the numbers of their own pictures."""
    mixed = CutMix(Numbered(), share)
    return [(seed % COUNT, mixed.sample(seed % COUNT, seed)) for seed in range(count)]


def test_what_is_another_pictures_is_one_rectangle() -> None:
    areas, others = [], set()
    for index, sample in drawn(1.0):
        mean = sample["latents_mean"]
        other = mean[0] != index
        rows, columns = other.any(dim=1), other.any(dim=0)
        assert torch.equal(other, rows[:, None] & columns[None])
        assert rows.nonzero().flatten().diff().eq(1).all() and columns.nonzero().flatten().diff().eq(1).all()  # noqa: PT018
        assert len(mean.unique()) <= 2
        areas.append(float(other.float().mean()))
        others |= {int(number) for number in mean.unique()} - {index}
    assert others == set(range(COUNT)), "any picture is pasted"
    assert min(areas) < 0.1
    assert max(areas) > 0.6


def test_mean_and_deviation_are_of_the_same_picture_and_the_caption_is_the_samples_own() -> None:
    for index, sample in drawn(1.0):
        assert torch.equal(sample["latents_std"], sample["latents_mean"] + 100)
        assert sample["input_ids"] == index


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_as_many_are_composed_as_is_asked_for(share: float) -> None:
    samples = drawn(share)
    assert sum(int(sample[COMPOSED]) for _, sample in samples) / len(samples) == pytest.approx(share, abs=0.1)
    assert all(sample["latents_mean"].eq(index).all() for index, sample in samples if not sample[COMPOSED])


def test_pixels_get_the_rectangle_that_latents_get() -> None:
    for seed in range(20):
        pixels, latents = (CutMix(kind, 0.5).sample(2, seed) for kind in (Pixels(), Numbered()))
        assert torch.equal(pixels["pixel_values"], latents["latents_mean"])


def test_a_draw_is_the_same_however_the_stream_is_split() -> None:
    mixed = CutMix(Numbered(), 0.5)
    whole = next(Stream(mixed, 6, seed=3).batches())
    halves = [next(Stream(mixed, 3, seed=3).batches(first)) for first in (0, 3)]
    for name, value in whole.items():
        assert torch.equal(value, torch.cat([half[name] for half in halves]))


def test_samples_keep_their_names() -> None:
    assert CutMix(Numbered(), 0.5).name(3) == "picture 3"
