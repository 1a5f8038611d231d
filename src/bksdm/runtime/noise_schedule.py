"""The noise schedule of a diffusion model and the timesteps that a sampler visits.

x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) e, where a_t is the product of 1 - beta up to t; table 2 of arXiv 2305.08891 names
the spacings. The numbers are those of diffusers, in float64 from float32 products as there.
"""

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bksdm.errors import InputError

Numbers = NDArray[np.float64]
_LARGEST_BETA = 0.999


def signal_shares(options: Mapping[str, Any]) -> Numbers:
    """a_t with shape (T,), of a scheduler's options."""
    products = np.cumprod(1 - _betas(options).astype(np.float32), dtype=np.float64)
    return products.astype(np.float32).astype(np.float64)


def spaced(options: Mapping[str, Any], steps: int) -> Numbers:
    """Timesteps from noise to picture with shape (steps,); "linspace" gives fractions."""
    count, spacing = options["num_train_timesteps"], options["timestep_spacing"]
    if spacing == "linspace":
        return np.linspace(0, count - 1, steps)[::-1]
    if spacing == "leading":
        return np.asarray(np.arange(steps)[::-1] * float(count // steps) + options["steps_offset"], dtype=np.float64)
    if spacing == "trailing":
        return np.asarray(np.round(np.arange(count, 0, -count / steps)) - 1, dtype=np.float64)
    raise InputError(f"timestep_spacing {spacing!r} is unknown; give linspace, leading or trailing")


def _betas(options: Mapping[str, Any]) -> Numbers:
    if options["trained_betas"] is not None:
        return np.asarray(options["trained_betas"], dtype=np.float64)
    start, end, count = options["beta_start"], options["beta_end"], options["num_train_timesteps"]
    name = options["beta_schedule"]
    if name == "linear":
        return np.linspace(start, end, count)
    if name == "scaled_linear":
        return np.linspace(start**0.5, end**0.5, count) ** 2
    if name == "squaredcos_cap_v2":
        shares = [math.cos((step / count + 0.008) / 1.008 * math.pi / 2) ** 2 for step in range(count + 1)]
        return np.array([min(1 - then / now, _LARGEST_BETA) for now, then in itertools.pairwise(shares)])
    raise InputError(f"beta_schedule {name!r} is unknown; give linear, scaled_linear or squaredcos_cap_v2")
