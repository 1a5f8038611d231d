"""Samplers that go from timestep to timestep of the schedule: DDIM, DDPM, PNDM and LCM."""

import itertools
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from bksdm.common.errors import InputError
from bksdm.runtime.networks import Array
from bksdm.runtime.noise_schedule import Numbers, spaced
from bksdm.runtime.trajectory import OFF, SCHEDULE, Draw, Trajectory

_CLIPPING = {"clip_sample": True, "clip_sample_range": 1.0, "thresholding": False, "rescale_betas_zero_snr": False}
_SIGMA_DATA = 0.5
_LEAST_VARIANCE = 1e-20
# Of the last outputs, the newest first: eq. 9 of arXiv 2202.09778, and what comes before there are four.
_MULTISTEP = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))
# Slopes of a Runge-Kutta step of fourth order: their weights, and how far along the step each is asked for.
_RUNGE_KUTTA = (1 / 6, 1 / 3, 1 / 3, 1 / 6)
_FEWEST_WITH_RUNGE_KUTTA = 4


class _Timesteps(Trajectory):
    """Samplers that know the noise by its timestep."""

    @classmethod
    def why_not(cls, options: Mapping[str, Any]) -> str | None:
        if options.get("rescale_betas_zero_snr") and options["prediction_type"] == "epsilon":
            return "predicts noise, and rescale_betas_zero_snr leaves a timestep where that says nothing of the picture"
        return None

    def _visited(self) -> Numbers:
        return np.round(spaced(self.options, self.steps))

    def noisy(self, latents: Array, noise: Array) -> Array:
        signal, spread = self._mixture(self.timesteps[0])
        return signal * latents + spread * noise

    def _mixture(self, timestep: float) -> tuple[float, float]:
        """sqrt(a_t) and sqrt(1 - a_t)."""
        share = float(self.shares[int(timestep)])
        return math.sqrt(share), math.sqrt(1 - share)

    def _noise(self, output: Array, sample: Array, signal: float, spread: float) -> Array:
        """e for latents signal * x_0 + spread * e."""
        kind = self.options["prediction_type"]
        if kind == "sample":
            return np.asarray((sample - signal * output) / spread, dtype=np.float32)
        return signal * output + spread * sample if kind == "v_prediction" else output

    def _clipped(self, clean: Array) -> Array:
        if not self.options["clip_sample"]:
            return clean
        limit = self.options["clip_sample_range"]
        return np.asarray(np.clip(clean, -limit, limit), dtype=np.float32)

    def _share(self, timestep: float) -> float:
        """a_t, also before the first timestep."""
        if timestep >= 0:
            return float(self.shares[int(timestep)])
        return 1.0 if self.options["set_alpha_to_one"] else float(self.shares[0])


class Ddim(_Timesteps):
    """Denoising diffusion implicit models (arXiv 2010.02502), eq. 12 without noise."""

    defaults: ClassVar = SCHEDULE | _CLIPPING | {"set_alpha_to_one": True, "timestep_spacing": "leading"}
    supported: ClassVar = {"thresholding": OFF}

    def step(self, output: Array, sample: Array, draw: Draw) -> Array:  # noqa: ARG002
        timestep = float(self._all[self.index])
        self.index += 1
        signal, spread = self._mixture(timestep)
        clean = self._clipped(self._clean(output, sample, signal, spread))
        noise = self._noise(output, sample, signal, spread)
        share = self._share(timestep - self.options["num_train_timesteps"] // self.steps)
        return math.sqrt(share) * clean + math.sqrt(1 - share) * noise


class Ddpm(_Timesteps):
    """Denoising diffusion probabilistic models (arXiv 2006.11239), eq. 7."""

    defaults: ClassVar = SCHEDULE | _CLIPPING | {"variance_type": "fixed_small", "timestep_spacing": "leading"}
    supported: ClassVar = {
        "thresholding": OFF,
        "variance_type": ("fixed_small", "fixed_small_log", "fixed_large"),
    }

    def step(self, output: Array, sample: Array, draw: Draw) -> Array:
        timestep = self._all[self.index]
        self.index += 1
        share = float(self.shares[int(timestep)])
        before = float(self.shares[int(self._all[self.index])]) if self.index < len(self._all) else 1.0
        beta = 1 - share / before
        clean = self._clipped(self._clean(output, sample, *self._mixture(timestep)))
        mean = math.sqrt(before) * beta / (1 - share) * clean
        mean = mean + math.sqrt(share / before) * (1 - before) / (1 - share) * sample
        if timestep == 0:
            return mean
        small = max((1 - before) / (1 - share) * beta, _LEAST_VARIANCE)
        return mean + math.sqrt(beta if self.options["variance_type"] == "fixed_large" else small) * draw()


class Pndm(_Timesteps):
    """Pseudo numerical methods (arXiv 2202.09778), eq. 9: linear multistep, begun by Runge and Kutta's or without."""

    defaults: ClassVar = SCHEDULE | {"skip_prk_steps": False, "set_alpha_to_one": False, "timestep_spacing": "leading"}
    supported: ClassVar = {"prediction_type": ("epsilon", "v_prediction")}

    def __init__(self, options: Mapping[str, Any], steps: int, skipped: int) -> None:
        self._stride = options["num_train_timesteps"] // steps
        self._outputs: list[Array] = []
        self._first: Array | None = None
        self._slopes: list[Array] = []
        self._count = 0
        if not options["skip_prk_steps"]:
            _check_runge_kutta(steps, skipped)
        super().__init__(options, steps, skipped)

    def _visited(self) -> Numbers:
        once = super()._visited()
        if self.options["skip_prk_steps"]:
            # The second timestep comes twice: a first try, and a better one from both outputs.
            return np.concatenate([once[:1], once[1:2], once[1:]])
        # Three steps of Runge and Kutta's, each with two calls in the middle and one at its end.
        half = self._stride // 2
        begun = [[start, then + half, then + half, then] for start, then in itertools.pairwise(once[:4])]
        return np.concatenate([*begun, once[3:]])

    def step(self, output: Array, sample: Array, draw: Draw) -> Array:  # noqa: ARG002
        timestep = float(self._all[self.index])
        begins = not self.options["skip_prk_steps"] and self._count < 3 * len(_RUNGE_KUTTA)
        made = self._begun(output, sample, timestep) if begins else self._multistep(output, sample, timestep)
        self._count += 1
        self.index += 1
        return made

    def _begun(self, output: Array, sample: Array, timestep: float) -> Array:
        """A quarter of a step of Runge and Kutta's."""
        quarter = self._count % len(_RUNGE_KUTTA)
        if quarter == 0:
            self._first, self._slopes = sample, []
            self._outputs.append(output)
        assert self._first is not None
        self._slopes.append(output)
        if quarter == len(_RUNGE_KUTTA) - 1:
            output = _weighted(_RUNGE_KUTTA, self._slopes)
        then = timestep if quarter % 2 else timestep - self._stride // 2
        return self._transferred(output, self._first, float(self._all[self.index - quarter]), then)

    def _multistep(self, output: Array, sample: Array, timestep: float) -> Array:
        again = self._count == 1
        here, there = (timestep + self._stride, timestep) if again else (timestep, timestep - self._stride)
        if again:
            assert self._first is not None
            output, sample = 0.5 * (output + self._outputs[-1]), self._first
        else:
            self._outputs = [*self._outputs[-3:], output]
            output = _weighted(_MULTISTEP[len(self._outputs) - 1], self._outputs[::-1])
        if self._count == 0:
            self._first = sample
        return self._transferred(output, sample, here, there)

    def _transferred(self, output: Array, sample: Array, here: float, there: float) -> Array:
        now, then = self._share(here), self._share(there)
        noise = self._noise(output, sample, math.sqrt(now), math.sqrt(1 - now))
        below = now * math.sqrt(1 - then) + math.sqrt(now * (1 - now) * then)
        return math.sqrt(then / now) * sample - (then - now) / below * noise


def _check_runge_kutta(steps: int, skipped: int) -> None:
    if steps < _FEWEST_WITH_RUNGE_KUTTA:
        raise InputError(f"steps is {steps}, and PNDMScheduler without skip_prk_steps takes at least 4; give more")
    if skipped:
        raise InputError(
            "PNDMScheduler without skip_prk_steps starts from noise alone; give another scheduler, or no picture"
        )


def _weighted(weights: tuple[float, ...], outputs: list[Array]) -> Array:
    first, *rest = (weight * output for weight, output in zip(weights, outputs, strict=True))
    return sum(rest, first)


class Lcm(_Timesteps):
    """Latent consistency models (arXiv 2310.04378): jump to the picture, and back to less noise."""

    defaults: ClassVar = (
        SCHEDULE
        | _CLIPPING
        | {
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "original_inference_steps": 50,
            "clip_sample": False,
            "set_alpha_to_one": True,
            "timestep_scaling": 10.0,
        }
    )
    supported: ClassVar = {"thresholding": OFF}

    def _visited(self) -> Numbers:
        trained, original = self.options["num_train_timesteps"], self.options["original_inference_steps"]
        if self.steps > original:
            raise InputError(f"steps is {self.steps}, and this LCM scheduler has {original}; give no more")
        taught = (np.arange(1, original + 1) * (trained // original) - 1)[::-1]
        chosen = np.floor(np.linspace(0, original, num=self.steps, endpoint=False)).astype(np.int64)
        return np.asarray(taught[chosen], dtype=np.float64)

    def step(self, output: Array, sample: Array, draw: Draw) -> Array:
        timestep = float(self._all[self.index])
        self.index += 1
        clean = self._clipped(self._clean(output, sample, *self._mixture(timestep)))
        scaled = timestep * float(self.options["timestep_scaling"])
        distance = float(scaled**2) + _SIGMA_DATA**2
        denoised: Array = scaled / math.sqrt(distance) * clean + _SIGMA_DATA**2 / distance * sample
        if self.index == self.steps:
            return denoised
        signal, spread = self._mixture(self._all[self.index])
        return signal * denoised + spread * draw()
