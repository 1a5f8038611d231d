"""Work that a drawing leaves out, as one value."""

from collections.abc import Sequence
from dataclasses import dataclass

from bksdm.common.errors import InputError

Interval = tuple[float, float]  # the least and the largest of noise levels


@dataclass(frozen=True)
class Spared:
    """What is not computed on the way from noise to picture.

    Attributes:
        interval: The noise levels at which guidance is given; None for all.
        reuse: Every how many steps, more than 1, the inside of the denoiser is computed; None for every one.
        pool_keys: Side of the squares of tokens, more than 1, whose means give the outermost self-attentions keys and
            values; None where all tokens do.
    """

    interval: Interval | None = None
    reuse: int | None = None
    pool_keys: int | None = None

    @classmethod
    def asked(
        cls, guidance_interval: Sequence[float] | None = None, reuse: int | None = None, pool_keys: int | None = None
    ) -> "Spared":
        """By the options of these names; every step, and a square of one token, spare nothing.

        Raises:
            InputError: `guidance_interval` is none, or `reuse` or `pool_keys` is less than 1.
        """
        for name, value in (("reuse", reuse), ("pool_keys", pool_keys)):
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}; give at least 1, or leave it out")
        interval = None if guidance_interval is None else _interval(guidance_interval)
        return cls(interval, None if reuse == 1 else reuse, None if pool_keys == 1 else pool_keys)


NOTHING = Spared()


def _interval(given: Sequence[float]) -> Interval:
    if len(given) != 2 or not 0 <= given[0] < given[1]:
        shown = " ".join(f"{level:g}" for level in given)
        raise InputError(f"guidance_interval is {shown}; give two noise levels, the lower first, such as 0.3 5")
    return given[0], given[1]
