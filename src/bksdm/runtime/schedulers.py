"""The samplers of diffusers in numpy: DDIM, PNDM, LCM, Euler and DPM-Solver++.

A `Trajectory` is one way from noise to picture: it is made for a number of steps, holds what earlier steps left, and
is used once. Whatever a scheduler_config.json asks for and is not done here is refused.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

from bksdm.errors import InputError
from bksdm.runtime.networks import Array
from bksdm.runtime.noise_schedule import Numbers, signal_shares, spaced

Draw = Callable[[], Array]

_SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "steps_offset": 0,
}
_OFF = (False, None)
_PREDICTIONS = ("epsilon", "v_prediction")
_FEW_STEPS = 15
_SIGMA_DATA = 0.5


class Trajectory(ABC):
    """One way from noise to picture.

    Attributes:
        defaults: The options that the sampler reads, with diffusers' defaults.
        supported: Values of options to which it is limited.
        timesteps: Those to visit, in order.
        noise_scale: What standard normal latents are multiplied with at the start.
    """

    defaults: ClassVar[Mapping[str, Any]]
    supported: ClassVar[Mapping[str, tuple[Any, ...]]]
    timesteps: Numbers
    noise_scale: float = 1.0

    def __init__(self, options: Mapping[str, Any], steps: int, skipped: int) -> None:
        self.options = options
        self.shares = signal_shares(options)
        self.steps = steps
        self.index = skipped
        visited = self._visited()
        self._all = visited
        self.timesteps = visited[skipped:]

    @abstractmethod
    def _visited(self) -> Numbers:
        """All timesteps, also those that are skipped."""

    def scaled(self, sample: Array) -> Array:
        """Noisy latents as the U-Net takes them."""
        return sample

    def noisy(self, latents: Array, noise: Array) -> Array:
        """Clean latents with the noise of the first timestep."""
        signal, spread = self._mixture(self.timesteps[0])
        return signal * latents + spread * noise

    @abstractmethod
    def step(self, output: Array, sample: Array, draw: Draw) -> Array:
        """The sample at the next timestep.

        Arguments:
            output: What the U-Net predicts, with shape (B, C, h, w).
            sample: Noisy latents with the same shape.
            draw: Gives fresh standard normal numbers with the same shape.
        """

    def _mixture(self, timestep: float) -> tuple[float, float]:
        """sqrt(a_t) and sqrt(1 - a_t)."""
        share = float(self.shares[int(timestep)])
        return math.sqrt(share), math.sqrt(1 - share)

    def _clean(self, output: Array, sample: Array, signal: float, spread: float) -> Array:
        """x_0 for latents signal * x_0 + spread * e."""
        if self.options["prediction_type"] == "v_prediction":
            return signal * sample - spread * output
        return np.asarray((sample - spread * output) / signal, dtype=np.float32)

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


class Ddim(Trajectory):
    """Denoising diffusion implicit models (arXiv 2010.02502), eq. 12 without noise."""

    defaults: ClassVar = _SCHEDULE | {
        "clip_sample": True,
        "clip_sample_range": 1.0,
        "set_alpha_to_one": True,
        "thresholding": False,
        "timestep_spacing": "leading",
        "rescale_betas_zero_snr": False,
    }
    supported: ClassVar = {"thresholding": _OFF, "rescale_betas_zero_snr": _OFF}

    def _visited(self) -> Numbers:
        return np.round(spaced(self.options, self.steps))

    def step(self, output: Array, sample: Array, draw: Draw) -> Array:  # noqa: ARG002
        timestep = float(self._all[self.index])
        self.index += 1
        signal, spread = self._mixture(timestep)
        clean = self._clipped(self._clean(output, sample, signal, spread))
        noise = signal * output + spread * sample if self.options["prediction_type"] == "v_prediction" else output
        share = self._share(timestep - self.options["num_train_timesteps"] // self.steps)
        return math.sqrt(share) * clean + math.sqrt(1 - share) * noise


class Pndm(Trajectory):
    """Pseudo numerical methods (arXiv 2202.09778), eq. 9, with linear multistep from the second timestep on."""

    defaults: ClassVar = _SCHEDULE | {"skip_prk_steps": False, "set_alpha_to_one": False, "timestep_spacing": "leading"}
    supported: ClassVar = {"skip_prk_steps": (True,)}

    def __init__(self, options: Mapping[str, Any], steps: int, skipped: int) -> None:
        super().__init__(options, steps, skipped)
        self._outputs: list[Array] = []
        self._first: Array | None = None
        self._count = 0

    def _visited(self) -> Numbers:
        once = np.round(spaced(self.options, self.steps))
        # The second timestep comes twice: a first try, and a better one from both outputs.
        return np.concatenate([once[:1], once[1:2], once[1:]])

    def step(self, output: Array, sample: Array, draw: Draw) -> Array:  # noqa: ARG002
        timestep = float(self._all[self.index])
        stride = self.options["num_train_timesteps"] // self.steps
        again = self._count == 1
        here, there = (timestep + stride, timestep) if again else (timestep, timestep - stride)
        if again:
            assert self._first is not None
            output, sample = 0.5 * (output + self._outputs[-1]), self._first
        else:
            self._outputs = [*self._outputs[-3:], output]
            output = self._extrapolated()
        if self._count == 0:
            self._first = sample
        self._count += 1
        self.index += 1
        return self._transferred(output, sample, here, there)

    def _extrapolated(self) -> Array:
        """The output to go on with, from the last four."""
        weights = {
            1: (1.0,),
            2: (3 / 2, -1 / 2),
            3: (23 / 12, -16 / 12, 5 / 12),
            4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
        }[len(self._outputs)]
        parts = [weight * output for weight, output in zip(weights, reversed(self._outputs), strict=True)]
        return sum(parts[1:], parts[0])

    def _transferred(self, output: Array, sample: Array, here: float, there: float) -> Array:
        now, then = self._share(here), self._share(there)
        if self.options["prediction_type"] == "v_prediction":
            output = math.sqrt(now) * output + math.sqrt(1 - now) * sample
        below = now * math.sqrt(1 - then) + math.sqrt(now * (1 - now) * then)
        return math.sqrt(then / now) * sample - (then - now) / below * output


class Lcm(Trajectory):
    """Latent consistency models (arXiv 2310.04378): jump to the picture, and back to less noise."""

    defaults: ClassVar = _SCHEDULE | {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "original_inference_steps": 50,
        "clip_sample": False,
        "clip_sample_range": 1.0,
        "set_alpha_to_one": True,
        "thresholding": False,
        "timestep_scaling": 10.0,
        "rescale_betas_zero_snr": False,
    }
    supported: ClassVar = {"thresholding": _OFF, "rescale_betas_zero_snr": _OFF}

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


class _Sigmas(Trajectory):
    """Samplers that know the noise by its ratio to the signal, sigma."""

    def __init__(self, options: Mapping[str, Any], steps: int, skipped: int) -> None:
        super().__init__(options, steps, skipped)
        ratios = np.sqrt((1 - self.shares) / self.shares)
        last = {"zero": 0.0, "sigma_min": float(ratios[0])}[options["final_sigmas_type"]]
        visited = np.interp(self._all, np.arange(len(ratios)), ratios)
        self._sigmas = np.append(visited, last).astype(np.float32).astype(np.float64)


class Euler(_Sigmas):
    """Euler's method on the ODE of arXiv 2206.00364, without churn."""

    defaults: ClassVar = _SCHEDULE | {
        "interpolation_type": "linear",
        "use_karras_sigmas": False,
        "use_exponential_sigmas": False,
        "use_beta_sigmas": False,
        "timestep_spacing": "linspace",
        "timestep_type": "discrete",
        "rescale_betas_zero_snr": False,
        "final_sigmas_type": "zero",
    }
    supported: ClassVar = {
        "interpolation_type": ("linear",),
        "use_karras_sigmas": _OFF,
        "use_exponential_sigmas": _OFF,
        "use_beta_sigmas": _OFF,
        "timestep_type": ("discrete",),
        "rescale_betas_zero_snr": _OFF,
        "final_sigmas_type": ("zero", "sigma_min"),
    }

    def __init__(self, options: Mapping[str, Any], steps: int, skipped: int) -> None:
        super().__init__(options, steps, skipped)
        largest = float(self._sigmas.max())
        leading = options["timestep_spacing"] == "leading"
        self.noise_scale = math.sqrt(largest**2 + 1) if leading else largest

    def _visited(self) -> Numbers:
        # Fractions stay: as diffusers does, the U-Net is asked in between its timesteps.
        return spaced(self.options, self.steps).astype(np.float32).astype(np.float64)

    def scaled(self, sample: Array) -> Array:
        return sample / math.sqrt(float(self._sigmas[self.index]) ** 2 + 1)

    def noisy(self, latents: Array, noise: Array) -> Array:
        return latents + float(self._sigmas[self.index]) * noise

    def step(self, output: Array, sample: Array, draw: Draw) -> Array:  # noqa: ARG002
        sigma, then = (float(value) for value in self._sigmas[self.index : self.index + 2])
        self.index += 1
        if self.options["prediction_type"] == "v_prediction":
            clean = sample / (sigma**2 + 1) - sigma / math.sqrt(sigma**2 + 1) * output
            return sample + (then - sigma) / sigma * (sample - clean)
        return sample + (then - sigma) * output


class DpmSolver(_Sigmas):
    """DPM-Solver++ (arXiv 2211.01095), multistep, of first or second order with the midpoint rule."""

    defaults: ClassVar = _SCHEDULE | {
        "solver_order": 2,
        "thresholding": False,
        "algorithm_type": "dpmsolver++",
        "solver_type": "midpoint",
        "lower_order_final": True,
        "euler_at_final": False,
        "use_karras_sigmas": False,
        "use_exponential_sigmas": False,
        "use_beta_sigmas": False,
        "use_lu_lambdas": False,
        "use_flow_sigmas": False,
        "final_sigmas_type": "zero",
        "lambda_min_clipped": -math.inf,
        "variance_type": None,
        "timestep_spacing": "linspace",
        "rescale_betas_zero_snr": False,
        "use_dynamic_shifting": False,
    }
    supported: ClassVar = {
        "solver_order": (1, 2),
        "thresholding": _OFF,
        "algorithm_type": ("dpmsolver++",),
        "solver_type": ("midpoint",),
        "use_karras_sigmas": _OFF,
        "use_exponential_sigmas": _OFF,
        "use_beta_sigmas": _OFF,
        "use_lu_lambdas": _OFF,
        "use_flow_sigmas": _OFF,
        "final_sigmas_type": ("zero", "sigma_min"),
        "variance_type": (None,),
        "rescale_betas_zero_snr": _OFF,
        "use_dynamic_shifting": _OFF,
    }

    def __init__(self, options: Mapping[str, Any], steps: int, skipped: int) -> None:
        super().__init__(options, steps, skipped)
        self._clean_before: Array | None = None

    def _visited(self) -> Numbers:
        trained, spacing = self.options["num_train_timesteps"], self.options["timestep_spacing"]
        most = trained - self._clipped_steps()
        if spacing == "linspace":
            return np.asarray(np.round(np.linspace(0, most - 1, self.steps + 1))[::-1][:-1], dtype=np.float64)
        if spacing == "leading":
            stride = float(most // (self.steps + 1))
            return np.asarray(np.arange(self.steps, 0, -1) * stride + self.options["steps_offset"], dtype=np.float64)
        if spacing == "trailing":
            return np.asarray(np.round(np.arange(most, 0, -trained / self.steps)) - 1, dtype=np.float64)
        raise InputError(f"timestep_spacing {spacing!r} is unknown; give linspace, leading or trailing")

    def _clipped_steps(self) -> int:
        """Timesteps at the noisy end that are left out because their signal is too small."""
        half_log_ratio = np.log(np.sqrt(self.shares)) - np.log(np.sqrt(1 - self.shares))
        return int(np.searchsorted(half_log_ratio[::-1], self.options["lambda_min_clipped"]))

    def noisy(self, latents: Array, noise: Array) -> Array:
        signal, spread = _parts(float(self._sigmas[self.index]))
        return signal * latents + spread * noise

    def step(self, output: Array, sample: Array, draw: Draw) -> Array:  # noqa: ARG002
        sigma, then = (float(value) for value in self._sigmas[self.index : self.index + 2])
        signal, spread = _parts(sigma)
        clean = self._clean(output, sample, signal, spread)
        direction = clean
        before = self._clean_before
        if before is not None and self.options["solver_order"] > 1 and not self._ends_with_first_order():
            ratio = _log_ratio(float(self._sigmas[self.index - 1]), sigma) / _log_ratio(sigma, then)
            direction = clean + (0.5 / ratio) * (clean - before)
        signal_then, spread_then = _parts(then)
        self._clean_before = clean
        self.index += 1
        kept = then / sigma  # exp(-h), where h is the step in log(signal / noise)
        return spread_then / spread * sample + signal_then * (1 - kept) * direction

    def _ends_with_first_order(self) -> bool:
        count = len(self._all)
        low = self.options["lower_order_final"] and count < _FEW_STEPS
        early = self.options["euler_at_final"] or self.options["final_sigmas_type"] == "zero"
        return self.index == count - 1 and bool(low or early)


def _parts(sigma: float) -> tuple[float, float]:
    """Shares of signal and noise, whose squares add to one."""
    signal = 1 / math.sqrt(sigma**2 + 1)
    return signal, sigma * signal


def _log_ratio(sigma: float, then: float) -> float:
    """How far log(signal / noise) goes between two sigmas that are not zero."""
    return math.log(sigma) - math.log(then)


SCHEDULERS: Mapping[str, type[Trajectory]] = {
    "DDIMScheduler": Ddim,
    "PNDMScheduler": Pndm,
    "LCMScheduler": Lcm,
    "EulerDiscreteScheduler": Euler,
    "DPMSolverMultistepScheduler": DpmSolver,
}


def check_scheduler(config: Mapping[str, Any]) -> None:
    """Refuse a scheduler that this package does not know, or an option of it.

    Raises:
        InputError: Naming it and what there is.
    """
    name = str(config.get("_class_name"))
    if name not in SCHEDULERS:
        raise InputError(f"scheduler {name} is not one of {', '.join(SCHEDULERS)}; export the model with one of these")
    kind = SCHEDULERS[name]
    options = _options(kind, config)
    for option, values in {"prediction_type": _PREDICTIONS, **kind.supported}.items():
        if options[option] not in values:
            known = " or ".join(str(value) for value in values if value is not None)
            raise InputError(f"{name} has {option} {options[option]}, and only {known or 'none'} is known here")


def trajectory(config: Mapping[str, Any], steps: int, strength: float = 1.0) -> Trajectory:
    """The way that a scheduler takes in `steps` steps.

    Arguments:
        config: Of scheduler_config.json, with `_class_name`.
        steps: Denoising steps of the whole way.
        strength: Share of the way that is gone, from its middle on, in (0, 1].

    Raises:
        InputError: The scheduler is unknown, or cannot do so many or so few steps.
    """
    check_scheduler(config)
    kind = SCHEDULERS[config["_class_name"]]
    options = _options(kind, config)
    if not 1 <= steps <= options["num_train_timesteps"]:
        raise InputError(f"steps is {steps}; give at least 1 and at most {options['num_train_timesteps']}")
    if not 0 < strength <= 1:
        raise InputError(f"strength is {strength}; give more than 0 and at most 1")
    done = min(int(steps * strength), steps)
    if done < 1:
        raise InputError(f"strength {strength} of {steps} steps leaves no step to do; give more of either")
    return kind(options, steps, steps - done)


def _options(kind: type[Trajectory], config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: config.get(name, default) for name, default in kind.defaults.items()}
