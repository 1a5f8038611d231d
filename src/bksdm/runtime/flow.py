"""The way from noise to picture of flow matching: x = (1 - s) x_0 + s e, by Euler's steps of dx / ds = v.

Noise levels s are even before they are shifted, s' = k s / (1 + (k - 1) s), where k is a number of the scheduler or
depends on how many tokens a picture has. The numbers are those of diffusers' FlowMatchEulerDiscreteScheduler.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from bksdm.common.errors import InputError
from bksdm.runtime.networks import Array
from bksdm.runtime.noise_schedule import Numbers
from bksdm.runtime.trajectory import Draw

NAME = "FlowMatchEulerDiscreteScheduler"
_DEFAULTS: Mapping[str, Any] = {
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "use_dynamic_shifting": False,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "time_shift_type": "exponential",
}
_OFF = (
    "invert_sigmas",
    "shift_terminal",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "stochastic_sampling",
)

# The shift that a pipeline asks for, by the scheduler's options, a picture's tokens and the number of steps.
Mu = Callable[[Mapping[str, Any], int, int], float]


def why_no_flow(config: Mapping[str, Any]) -> str | None:
    """Why a way by this scheduler is not known here; None where it is."""
    name = str(config.get("_class_name"))
    if name != NAME:
        return f"scheduler {name} is not known here for flow matching, {NAME} alone is"
    asked = next((option for option in _OFF if config.get(option)), None)
    return f"{name} has {asked} {config[asked]}, which is not known here" if asked else None


def even_mu(options: Mapping[str, Any], tokens: int, steps: int) -> float:  # noqa: ARG001
    """On the line between two sizes of pictures, as Flux.1 and Z-Image have it."""
    least, most = options["base_image_seq_len"], options["max_image_seq_len"]
    slope = (options["max_shift"] - options["base_shift"]) / (most - least)
    return float(tokens * slope + (options["base_shift"] - slope * least))


def fitted_mu(options: Mapping[str, Any], tokens: int, steps: int) -> float:  # noqa: ARG001
    """As FLUX.2's authors fitted it to pictures of many sizes, on a line between 10 and 200 steps."""
    many = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return many
    few = 8.73809524e-05 * tokens + 1.89833333
    slope = (many - few) / 190
    return slope * steps + (many - 200 * slope)


class FlowEuler:
    """One way from noise to picture.

    Attributes:
        timesteps: Those to visit, in order.
        noise_scale: What standard normal latents are multiplied with at the start.
    """

    noise_scale = 1.0

    def __init__(self, config: Mapping[str, Any], levels: Sequence[float], mu: float) -> None:
        """Begin a way.

        Arguments:
            config: Of scheduler_config.json.
            levels: The noise level that each step begins at, before it is shifted.
            mu: The shift that is asked for; it counts where the scheduler shifts by the size of pictures.
        """
        options = _whole(config)
        given, shift = np.array(levels).astype(np.float32), options["shift"]
        if not options["use_dynamic_shifting"]:
            shifted = shift * given / (1 + (shift - 1) * given)
        else:
            factor = mu if options["time_shift_type"] == "linear" else math.exp(mu)
            shifted = factor / (factor + (1 / given - 1))
        self._levels = np.append(shifted.astype(np.float32), np.float32(0))
        self.timesteps: Numbers = (self._levels[:-1] * np.float32(options["num_train_timesteps"])).astype(np.float64)
        self._index = 0

    def scaled(self, sample: Array) -> Array:
        """Noisy latents as the network takes them."""
        return sample

    def step(self, output: Array, sample: Array, draw: Draw) -> Array:  # noqa: ARG002
        """The sample at the next noise level, of the velocity that the network answers."""
        here, there = self._levels[self._index : self._index + 2]
        self._index += 1
        return np.asarray(sample + (there - here) * output, dtype=np.float32)


def flow_way(
    config: Mapping[str, Any], steps: int, tokens: int, mu: Mu, levels: Sequence[float] | None = None
) -> FlowEuler:
    """The way that a scheduler takes in `steps` steps.

    Arguments:
        config: Of scheduler_config.json, with `_class_name`.
        steps: How many.
        tokens: Of a picture.
        mu: The shift that its pipeline asks for.
        levels: The noise level that each step begins at, before it is shifted; even ones by default.

    Raises:
        InputError: The scheduler is unknown, or there is no such way.
    """
    reason = why_no_flow(config)
    if reason:
        raise InputError(f"{reason}; use torch")
    most = _whole(config)["num_train_timesteps"]
    if not 1 <= steps <= most:
        raise InputError(f"steps is {steps}; give at least 1 and at most {most}")
    begun = np.linspace(1.0, 1 / steps, steps).tolist() if levels is None else levels
    return FlowEuler(config, begun, mu(_whole(config), tokens, steps))


def _whole(config: Mapping[str, Any]) -> dict[str, Any]:
    """Options, with the defaults of those that are left out."""
    return {name: config.get(name, default) for name, default in _DEFAULTS.items()}
