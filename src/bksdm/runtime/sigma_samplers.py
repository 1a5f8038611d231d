"""Samplers that know the noise by sigma, noise over signal, and solve dx / dsigma = e for x = x_0 + sigma e.

The right side is what the U-Net predicts (arXiv 2206.00364, eq. 1 to 3).
"""

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from bksdm.runtime.networks import Array
from bksdm.runtime.noise_schedule import Numbers, exponential, karras, noise_ratios, spaced, timesteps_of
from bksdm.runtime.trajectory import OFF, SCHEDULE, Draw, Trajectory, parts

SIGMAS: dict[str, Any] = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "sigma_min": None,
    "sigma_max": None,
    "timestep_spacing": "linspace",
}
FINAL = ("zero", "sigma_min")
_LAWS = {"use_karras_sigmas": karras, "use_exponential_sigmas": exponential}
_LEAST_SHARE = 2.0**-24  # of signal, where rescaled betas leave none, so that sigma is finite
_LMS_ORDER = 4


class Sigmas(Trajectory):
    """A sampler that visits sigmas: those of its timesteps, or such as follow a law and then have timesteps.

    Attributes:
        sigmas: One for each timestep, also for those that are skipped, and the last one.
    """

    sigmas: Numbers

    @classmethod
    def why_not(cls, options: Mapping[str, Any]) -> str | None:
        given = [name for name in _LAWS if options.get(name)]
        return f"has {' and '.join(given)}, which exclude each other" if len(given) > 1 else None

    def _visited(self) -> Numbers:
        if self.options.get("rescale_betas_zero_snr"):
            self.shares[-1] = _LEAST_SHARE
        ratios, timesteps = noise_ratios(self.shares), self._spaced()
        visited = np.interp(timesteps, np.arange(len(ratios)), ratios)
        law = next((law for name, law in _LAWS.items() if self.options.get(name)), None)
        if law is not None:
            visited = law(*self._ends(visited, ratios), self.steps)
            timesteps = self._asked(timesteps_of(visited, ratios))
        last = self._last(visited, ratios)
        self.sigmas = np.append(visited, last).astype(np.float32).astype(np.float64)
        return timesteps

    @abstractmethod
    def _spaced(self) -> Numbers:
        """Timesteps to visit where no law says which sigmas."""

    def _ends(self, visited: Numbers, ratios: Numbers) -> tuple[float, float]:
        """The largest and the smallest sigma of a law."""
        largest, smallest = self.options["sigma_max"], self.options["sigma_min"]
        own = self._within(visited, ratios)
        return float(own.max() if largest is None else largest), float(own.min() if smallest is None else smallest)

    @abstractmethod
    def _within(self, visited: Numbers, ratios: Numbers) -> Numbers:
        """The sigmas whose largest and smallest a law has, where no option says so."""

    @abstractmethod
    def _asked(self, timesteps: Numbers) -> Numbers:
        """Timesteps, which a law gives as fractions, as the U-Net is asked for them."""

    def _last(self, visited: Numbers, ratios: Numbers) -> float:  # noqa: ARG002
        """The sigma at the end."""
        return float(ratios[0]) if self.options.get("final_sigmas_type") == "sigma_min" else 0.0


class _Slopes(Sigmas):
    """Solvers of the equation as it stands."""

    def __init__(self, options: Mapping[str, Any], steps: int, skipped: int) -> None:
        super().__init__(options, steps, skipped)
        largest = float(self.sigmas.max())
        leading = options["timestep_spacing"] == "leading"
        self.noise_scale = math.sqrt(largest**2 + 1) if leading else largest

    def _spaced(self) -> Numbers:
        return self._asked(spaced(self.options, self.steps))

    def _within(self, visited: Numbers, ratios: Numbers) -> Numbers:  # noqa: ARG002
        return visited

    def _asked(self, timesteps: Numbers) -> Numbers:
        # Fractions stay: as diffusers does, the U-Net is asked in between its timesteps.
        return timesteps.astype(np.float32).astype(np.float64)

    def scaled(self, sample: Array) -> Array:
        return sample / math.sqrt(float(self.sigmas[self.index]) ** 2 + 1)

    def noisy(self, latents: Array, noise: Array) -> Array:
        return latents + float(self.sigmas[self.index]) * noise

    def _next(self) -> tuple[float, float]:
        """The sigma that the sample has, and the one that it goes to."""
        sigma, then = self.sigmas[self.index : self.index + 2]
        self.index += 1
        return float(sigma), float(then)

    def _slope(self, output: Array, sample: Array, sigma: float) -> Array:
        """dx / dsigma."""
        if self.options["prediction_type"] == "epsilon":
            return output
        signal, spread = parts(sigma)
        return np.asarray((sample - self._clean(output, signal * sample, signal, spread)) / sigma, dtype=np.float32)


class Euler(_Slopes):
    """Euler's method, without churn."""

    defaults: ClassVar = (
        SCHEDULE
        | SIGMAS
        | {
            "interpolation_type": "linear",
            "timestep_type": "discrete",
            "rescale_betas_zero_snr": False,
            "final_sigmas_type": "zero",
        }
    )
    supported: ClassVar = {
        "interpolation_type": ("linear",),
        "use_beta_sigmas": OFF,
        "timestep_type": ("discrete",),
        "final_sigmas_type": FINAL,
    }

    def step(self, output: Array, sample: Array, draw: Draw) -> Array:  # noqa: ARG002
        sigma, then = self._next()
        return sample + (then - sigma) * self._slope(output, sample, sigma)


class EulerAncestral(_Slopes):
    """Euler's method to less noise than there has to be, and the rest anew."""

    defaults: ClassVar = SCHEDULE | {"timestep_spacing": "linspace", "rescale_betas_zero_snr": False}
    supported: ClassVar = {"prediction_type": ("epsilon", "v_prediction")}

    def step(self, output: Array, sample: Array, draw: Draw) -> Array:
        sigma, then = self._next()
        anew = then * math.sqrt(sigma**2 - then**2) / sigma
        low = math.sqrt(then**2 - anew**2)
        made: Array = sample + (low - sigma) * self._slope(output, sample, sigma) + anew * draw()
        return made


class Heun(_Slopes):
    """Heun's method: a step of Euler's, and a better one by the mean of the slopes at both of its ends."""

    defaults: ClassVar = SCHEDULE | SIGMAS | {"beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
    supported: ClassVar = {"use_beta_sigmas": OFF, "clip_sample": OFF}
    calls: ClassVar = 2

    def __init__(self, options: Mapping[str, Any], steps: int, skipped: int) -> None:
        super().__init__(options, steps, skipped)
        self._begun: tuple[Array, Array, float] | None = None

    def _visited(self) -> Numbers:
        once = super()._visited()
        self.sigmas = np.concatenate([self.sigmas[:1], np.repeat(self.sigmas[1:-1], 2), self.sigmas[-1:]])
        return np.concatenate([once[:1], np.repeat(once[1:], 2)])

    def step(self, output: Array, sample: Array, draw: Draw) -> Array:  # noqa: ARG002
        sigma, then = self._next()
        slope = self._slope(output, sample, sigma)
        if self._begun is None:
            self._begun = (sample, slope, then - sigma)
            return sample + (then - sigma) * slope
        start, first, width = self._begun
        self._begun = None
        return start + 0.5 * width * (first + slope)


class Lms(_Slopes):
    """Linear multistep: the slope as the polynomial through the last four."""

    defaults: ClassVar = SCHEDULE | SIGMAS
    supported: ClassVar = {"use_beta_sigmas": OFF, "sigma_min": (None,), "sigma_max": (None,)}

    def __init__(self, options: Mapping[str, Any], steps: int, skipped: int) -> None:
        super().__init__(options, steps, skipped)
        self._slopes: list[Array] = []

    def step(self, output: Array, sample: Array, draw: Draw) -> Array:  # noqa: ARG002
        weights = self._weights(min(self.index + 1, _LMS_ORDER))
        sigma, _ = self._next()
        self._slopes = [self._slope(output, sample, sigma), *self._slopes[: _LMS_ORDER - 1]]
        # On a way that began in its middle there are fewer slopes than weights, and the first weights are taken.
        for weight, slope in zip(weights, self._slopes, strict=False):
            sample = sample + weight * slope
        return sample

    def _weights(self, order: int) -> list[float]:
        """Integrals over the step of Lagrange's polynomials through the last sigmas, by Gauss's rule, exact here."""
        start, end = self.sigmas[self.index : self.index + 2]
        nodes, masses = np.polynomial.legendre.leggauss(_LMS_ORDER)
        points = start + (end - start) * (nodes + 1) / 2
        known = [self.sigmas[self.index - back] for back in range(order)]
        found = []
        for number, own in enumerate(known):
            factors = [(points - other) / (own - other) for other in known[:number] + known[number + 1 :]]
            found.append(float(masses @ np.prod([np.ones_like(points), *factors], axis=0) * (end - start) / 2))
        return found
