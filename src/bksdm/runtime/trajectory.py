"""A way from noise to picture, and what all samplers have in common."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

from bksdm.runtime.networks import Array
from bksdm.runtime.noise_schedule import BETA_SCHEDULES, SPACINGS, Numbers, noise_level, signal_shares

Draw = Callable[[], Array]

SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "steps_offset": 0,
}
KNOWN: dict[str, tuple[Any, ...]] = {
    "beta_schedule": BETA_SCHEDULES,
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "timestep_spacing": SPACINGS,
}
OFF = (False, None)


class Trajectory(ABC):
    """One way from noise to picture: it holds what earlier steps left, and is used once.

    Attributes:
        defaults: The options that the sampler reads, with diffusers' defaults.
        supported: Values of options to which it is limited.
        renamed: Values of an option that stand for one of its own, as other samplers' configs have them.
        calls: Of the U-Net in a step, but for the last; starting from a picture leaves out as many timesteps a step.
        timesteps: Those to visit, in order.
        noise_scale: What standard normal latents are multiplied with at the start.
    """

    defaults: ClassVar[Mapping[str, Any]]
    supported: ClassVar[Mapping[str, tuple[Any, ...]]]
    renamed: ClassVar[Mapping[str, Mapping[str, str]]] = {}
    calls: ClassVar[int] = 1
    timesteps: Numbers
    noise_scale: float = 1.0

    def __init__(self, options: Mapping[str, Any], steps: int, skipped: int) -> None:
        """Begin a way.

        Arguments:
            options: Values of all that `defaults` names.
            steps: Of the whole way.
            skipped: Steps that are left out at its beginning.

        Raises:
            InputError: There is no such way.
        """
        self.options = options
        self.shares = signal_shares(options)
        self.steps = steps
        self.index = skipped * self.calls
        self._all = self._visited()
        self.timesteps = self._all[self.index :]

    @classmethod
    def why_not(cls, options: Mapping[str, Any]) -> str | None:  # noqa: ARG003
        """Why options that are known one by one do not go together; None where they do."""
        return None

    @abstractmethod
    def _visited(self) -> Numbers:
        """All timesteps, also those that are skipped."""

    def level(self, timestep: float) -> float:
        """See `noise_level`."""
        return noise_level(self.shares, timestep)

    def scaled(self, sample: Array) -> Array:
        """Noisy latents as the U-Net takes them."""
        return sample

    @abstractmethod
    def noisy(self, latents: Array, noise: Array) -> Array:
        """Clean latents with the noise of the first timestep."""

    @abstractmethod
    def step(self, output: Array, sample: Array, draw: Draw) -> Array:
        """The sample at the next timestep.

        Arguments:
            output: What the U-Net predicts, with shape (B, C, h, w).
            sample: Noisy latents with the same shape.
            draw: Gives fresh standard normal numbers with the same shape.
        """

    def _clean(self, output: Array, sample: Array, signal: float, spread: float) -> Array:
        """x_0 for latents signal * x_0 + spread * e, where signal and spread have squares that add to one."""
        kind = self.options["prediction_type"]
        if kind == "sample":
            return output
        if kind == "v_prediction":
            return signal * sample - spread * output
        return np.asarray((sample - spread * output) / signal, dtype=np.float32)


def parts(ratio: float) -> tuple[float, float]:
    """Signal and noise, whose squares add to one, of their ratio, noise over signal."""
    signal = 1 / math.sqrt(ratio**2 + 1)
    return signal, ratio * signal
