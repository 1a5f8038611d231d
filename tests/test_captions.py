"""What becomes of captions: how often they are dropped and replaced, by what, and by which random numbers.

A caption gives conditions of several shapes, as in some families; all of them change together.
"""

import math

import pytest
import torch
from torch import Tensor

from bksdm.common.randomness import Draws
from bksdm.distill.captions import CaptionPool, Captions

LENGTH, WIDTH, STEPS = 3, 2, 1000
MANY = 2000
Told = dict[str, Tensor]


def giving(numbers: Tensor) -> Told:
    """What captions give that are embedded as these numbers, with shape (B,)."""
    return {
        "context": numbers.view(-1, 1, 1).expand(-1, LENGTH, WIDTH),
        "text_embeds": numbers.view(-1, 1).expand(-1, WIDTH),
    }


EMPTY = giving(torch.tensor([-1.0]))


def embed(tokens: Tensor) -> Told:
    """An embedding that shows the first token of its caption."""
    return giving(tokens[:, 0].float())


def pool(size: int = 40, room: float = math.inf) -> CaptionPool:
    """Captions that are embedded as 1, 2, ..."""
    return CaptionPool(torch.arange(1, size + 1)[:, None].expand(-1, LENGTH), embed, room)


def changed(
    captions: Captions, timestep: int | Tensor = 500, count: int = MANY, first: int = 0
) -> tuple[Tensor, Tensor | None]:
    """What a batch of captions, all of them embedded as 0, becomes: a number each."""
    timesteps = torch.full((count,), timestep) if isinstance(timestep, int) else timestep
    told, replaced = captions(giving(torch.zeros(count)), timesteps, Draws(0, "test", first))
    found = told["context"][:, 0, 0]
    assert told.keys() == EMPTY.keys()
    for name, value in giving(found).items():
        assert torch.equal(told[name], value), "a caption is replaced as a whole"
    return found, replaced


def share(values: Tensor) -> float:
    return float(values.float().mean())


# Dropout


def test_captions_are_dropped_with_the_probability_asked_for() -> None:
    found, replaced = changed(Captions(EMPTY, dropout=0.2))
    assert share(found == -1) == pytest.approx(0.2, abs=0.03)
    assert torch.equal(found == 0, found != -1)
    assert replaced is None


def test_without_dropout_and_pool_captions_stay_as_they_are() -> None:
    found, replaced = changed(Captions(EMPTY))
    assert not found.any()
    assert replaced is None


# Random conditioning


@pytest.mark.parametrize("rate", [0.0, 2.0, 5.0])
@pytest.mark.parametrize("timestep", [0, 400, 900, 999])
def test_captions_are_replaced_as_often_as_the_formula_says(rate: float, timestep: int) -> None:
    found, replaced = changed(Captions(EMPTY, pool=pool(), rate=rate), timestep)
    assert share(replaced) == pytest.approx(math.exp(-rate * (1 - timestep / STEPS)), abs=0.03)
    assert torch.equal(found > 0, replaced), "others stay"


def test_a_steep_rate_replaces_hardly_any_caption_of_a_clear_picture_and_nearly_all_of_noise() -> None:
    captions = Captions(EMPTY, pool=pool(), rate=20.0)
    assert share(changed(captions, 0)[1]) == 0
    assert share(changed(captions, 999)[1]) > 0.96


def test_every_caption_of_the_pool_is_as_likely() -> None:
    found, _ = changed(Captions(EMPTY, pool=pool(4), rate=0.0))
    assert torch.bincount(found.long(), minlength=5).tolist() == pytest.approx([0, 500, 500, 500, 500], abs=70)


def test_of_two_changes_the_empty_prompt_wins_and_belongs_to_its_picture() -> None:
    found, replaced = changed(Captions(EMPTY, dropout=0.5, pool=pool(), rate=0.0))
    assert share(found == -1) == pytest.approx(0.5, abs=0.04)
    assert torch.equal(found > 0, replaced)
    assert torch.equal(replaced, found != -1)


# Random numbers


def test_one_change_does_not_move_the_other() -> None:
    both, replaced = changed(Captions(EMPTY, dropout=0.3, pool=pool(), rate=1.0))
    dropped, _ = changed(Captions(EMPTY, dropout=0.3))
    alone, _ = changed(Captions(EMPTY, pool=pool(), rate=1.0))
    assert torch.equal(both == -1, dropped == -1)
    assert torch.equal(both[replaced], alone[replaced])


def test_how_draws_are_split_into_batches_does_not_matter() -> None:
    captions = Captions(EMPTY, dropout=0.2, pool=pool(), rate=1.0)
    timesteps = torch.randint(STEPS, (24,), generator=torch.Generator().manual_seed(1))
    whole, replaced = changed(captions, timesteps, 24, first=100)
    parts = [changed(captions, timesteps[i : i + 6], 6, first=100 + i) for i in range(0, 24, 6)]
    assert torch.equal(torch.cat([found for found, _ in parts]), whole)
    assert torch.equal(torch.cat([part for _, part in parts]), replaced)


def test_noise_and_timesteps_are_drawn_as_if_captions_did_not_change() -> None:
    plain, other = Draws(0, "test", 7), Draws(0, "test", 7)
    plain.normal((3, 2))
    other.normal((3, 2))
    Captions(EMPTY, dropout=0.2, pool=pool(), rate=1.0)(giving(torch.zeros(3)), torch.zeros(3), other)
    assert torch.equal(plain.integers(10**9, 3), other.integers(10**9, 3))


def test_other_numbers_for_the_same_rows_are_others_again_for_another_purpose() -> None:
    numbers = [
        draws.uniform((4,)) for draws in (Draws(0, "test"), Draws(0, "test").also("a"), Draws(0, "test").also("b"))
    ]
    assert all(not torch.equal(numbers[i], numbers[j]) for i in range(3) for j in range(i))
    assert torch.equal(numbers[1], Draws(0, "test").also("a").uniform((4,)))


# The pool


def test_a_pool_that_does_not_fit_is_embedded_as_it_is_drawn() -> None:
    needed = 40 * (LENGTH * WIDTH + WIDTH) * 4
    kept, drawn = pool(room=needed), pool(room=needed - 1)
    calls: list[int] = []

    def counted(tokens: Tensor) -> Told:
        calls.append(len(tokens))
        return embed(tokens)

    kept._embed = drawn._embed = counted
    indices = torch.tensor([3, 39, 0, 3])
    ours, theirs = kept.embedded(indices), drawn.embedded(indices)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert calls == [4], "what fits is embedded no more"
    assert len(kept) == len(drawn) == 40


def test_the_number_format_is_the_captions() -> None:
    low = giving(torch.zeros(8, dtype=torch.bfloat16))
    found, _ = Captions(EMPTY, dropout=0.5, pool=pool(), rate=0.0)(low, torch.zeros(8), Draws(0, "test"))
    assert {value.dtype for value in found.values()} == {torch.bfloat16}
