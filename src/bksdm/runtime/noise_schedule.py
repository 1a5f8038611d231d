"""The noise schedule of a diffusion model and the timesteps that a sampler visits.

x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) e, where a_t is the product of 1 - beta up to t; table 2 of arXiv 2305.08891 names
the spacings, and its algorithm 1 rescales betas so that the last timestep is noise alone. The numbers are those of
diffusers, in float64 from float32 products as there.
"""

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
SPACINGS = ("linspace", "leading", "trailing")
_LARGEST_BETA = 0.999
_KARRAS_EXPONENT = 7.0


def signal_shares(options: Mapping[str, Any]) -> Numbers:
    """a_t with shape (T,), of a scheduler's options."""
    betas = _betas(options).astype(np.float32)
    if options.get("rescale_betas_zero_snr"):
        betas = _without_last_signal(betas)
    return _products(1 - betas).astype(np.float64)


def noise_level(shares: Numbers, timestep: float) -> float:
    """Noise over signal at a timestep, between two that of a straight line."""
    with np.errstate(divide="ignore"):  # without signal it has no end
        return float(np.interp(timestep, np.arange(len(shares)), noise_ratios(shares)))


def noise_ratios(shares: Numbers) -> Numbers:
    """Noise over signal, sqrt((1 - a_t) / a_t), with shape (T,)."""
    exact = shares.astype(np.float32)
    return np.asarray(np.sqrt((1 - exact) / exact), dtype=np.float64)


def spaced(options: Mapping[str, Any], steps: int) -> Numbers:
    """Timesteps from noise to picture with shape (steps,); "linspace" gives fractions."""
    count, spacing = options["num_train_timesteps"], options["timestep_spacing"]
    if spacing == "linspace":
        return np.linspace(0, count - 1, steps)[::-1]
    if spacing == "leading":
        return np.asarray(np.arange(steps)[::-1] * float(count // steps) + options["steps_offset"], dtype=np.float64)
    assert spacing == "trailing"
    return np.asarray(np.round(np.arange(count, 0, -count / steps)) - 1, dtype=np.float64)


def karras(largest: float, smallest: float, steps: int) -> Numbers:
    """Ratios with shape (steps,) from the largest to the smallest, even in their seventh roots (arXiv 2206.00364)."""
    roots = np.linspace(largest ** (1 / _KARRAS_EXPONENT), smallest ** (1 / _KARRAS_EXPONENT), steps)
    return np.asarray(roots**_KARRAS_EXPONENT, dtype=np.float64)


def exponential(largest: float, smallest: float, steps: int) -> Numbers:
    """Ratios with shape (steps,) from the largest to the smallest, even in their logarithms."""
    return np.exp(np.linspace(math.log(largest), math.log(smallest), steps))


def timesteps_of(visited: Numbers, ratios: Numbers) -> Numbers:
    """Where ratios that are visited lie among those of all timesteps, in fractions of timesteps.

    Some samplers round what comes out, so that the number formats on the way are those of diffusers.
    """
    logs, sought = np.log(ratios.astype(np.float32)), np.log(visited)
    low = np.clip(np.searchsorted(logs, sought, side="right") - 1, 0, len(logs) - 2)
    share = np.clip((logs[low] - sought) / (logs[low] - logs[low + 1]), 0, 1)
    return np.asarray((1 - share) * low + share * (low + 1), dtype=np.float64)


def _betas(options: Mapping[str, Any]) -> Numbers:
    if options["trained_betas"] is not None:
        return np.asarray(options["trained_betas"], dtype=np.float64)
    start, end, count = options["beta_start"], options["beta_end"], options["num_train_timesteps"]
    name = options["beta_schedule"]
    if name == "linear":
        return np.linspace(start, end, count)
    if name == "scaled_linear":
        return np.linspace(start**0.5, end**0.5, count) ** 2
    assert name == "squaredcos_cap_v2"
    shares = [math.cos((step / count + 0.008) / 1.008 * math.pi / 2) ** 2 for step in range(count + 1)]
    return np.array([min(1 - then / now, _LARGEST_BETA) for now, then in itertools.pairwise(shares)])


def _products(factors: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.cumprod(factors, dtype=np.float64).astype(np.float32)


def _without_last_signal(betas: NDArray[np.float32]) -> NDArray[np.float32]:
    """sqrt(a_t) is moved to zero at the end and stretched, so that it stays what it is at the beginning."""
    signal = np.sqrt(_products(1 - betas))
    shares = ((signal - signal[-1]) * (signal[0] / (signal[0] - signal[-1]))) ** 2
    return 1 - np.concatenate([shares[:1], shares[1:] / shares[:-1]])
