"""Solvers exact in what is linear, in l = log(signal / noise): DPM-Solver++ (arXiv 2211.01095), UniPC (2302.04867).

With x_0 as the U-Net predicts it, x_t = (s_t / s_u) x_u + a_t int_u^t exp(l - l_t) x_0 dl, where a and s are signal and
noise. They differ in what they take for x_0 between the two.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from bksdm.runtime.networks import Array
from bksdm.runtime.noise_schedule import Numbers
from bksdm.runtime.sigma_samplers import FINAL, SIGMAS, Sigmas
from bksdm.runtime.trajectory import OFF, SCHEDULE, Draw, parts

_FEW_STEPS = 15
_STANDS_STILL = "final_sigmas_type sigma_min with sigmas of a law, whose last step goes nowhere"
_SOLVER: dict[str, Any] = {
    "solver_order": 2,
    "thresholding": False,
    "lower_order_final": True,
    "use_flow_sigmas": False,
    "use_dynamic_shifting": False,
    "final_sigmas_type": "zero",
    "rescale_betas_zero_snr": False,
}
_SOLVED: dict[str, tuple[Any, ...]] = {
    "solver_order": (1, 2, 3),
    "thresholding": OFF,
    "use_beta_sigmas": OFF,
    "use_flow_sigmas": OFF,
    "use_dynamic_shifting": OFF,
    "final_sigmas_type": FINAL,
}


class _Solver(Sigmas):
    """What both have in common: whole timesteps, and pictures predicted before."""

    def __init__(self, options: Mapping[str, Any], steps: int, skipped: int) -> None:
        super().__init__(options, steps, skipped)
        self._predicted: list[Array] = []  # the newest first

    def _spaced(self) -> Numbers:
        trained, spacing = self.options["num_train_timesteps"], self.options["timestep_spacing"]
        most = trained - self._clipped_steps()
        if spacing == "linspace":
            return np.asarray(np.round(np.linspace(0, most - 1, self.steps + 1))[::-1][:-1], dtype=np.float64)
        if spacing == "leading":
            stride = float(most // (self.steps + 1))
            return np.asarray(np.arange(self.steps, 0, -1) * stride + self.options["steps_offset"], dtype=np.float64)
        assert spacing == "trailing"
        return np.asarray(np.round(np.arange(most, 0, -trained / self.steps)) - 1, dtype=np.float64)

    def _clipped_steps(self) -> int:
        """Timesteps at the noisy end that are left out because their signal is too small."""
        return 0

    def _within(self, visited: Numbers, ratios: Numbers) -> Numbers:  # noqa: ARG002
        return ratios

    def _asked(self, timesteps: Numbers) -> Numbers:
        return np.asarray(np.round(timesteps) if self.options["use_karras_sigmas"] else np.trunc(timesteps))

    def noisy(self, latents: Array, noise: Array) -> Array:
        signal, spread = parts(float(self.sigmas[self.index]))
        return signal * latents + spread * noise

    def _picture(self, output: Array, sample: Array) -> Array:
        """x_0 by what the U-Net predicts here."""
        return self._clean(output, sample, *parts(float(self.sigmas[self.index])))

    def _logs(self, index: int) -> float:
        """l at one of the sigmas, infinite where it is zero."""
        sigma = float(self.sigmas[index])
        return -math.log(sigma) if sigma > 0 else math.inf


class DpmSolver(_Solver):
    """DPM-Solver++, multistep, of first to third order, of the equation with noise or without."""

    defaults: ClassVar = (
        SCHEDULE
        | SIGMAS
        | _SOLVER
        | {
            "algorithm_type": "dpmsolver++",
            "solver_type": "midpoint",
            "euler_at_final": False,
            "use_lu_lambdas": False,
            "lambda_min_clipped": -math.inf,
            "variance_type": None,
        }
    )
    supported: ClassVar = _SOLVED | {
        "algorithm_type": ("dpmsolver++", "sde-dpmsolver++"),
        "solver_type": ("midpoint", "heun"),
        "use_lu_lambdas": OFF,
        "variance_type": (None,),
    }
    renamed: ClassVar = {
        "algorithm_type": {"deis": "dpmsolver++"},
        "solver_type": {"logrho": "midpoint", "bh1": "midpoint", "bh2": "midpoint"},
    }

    @classmethod
    def why_not(cls, options: Mapping[str, Any]) -> str | None:
        if options["solver_order"] > 2 and _is_stochastic(options):
            return f"has solver_order {options['solver_order']} with algorithm_type {options['algorithm_type']}"
        bent = options["solver_order"] > 2 or options["solver_type"] == "heun"
        if bent and _stands_still(options) and options["sigma_min"] is None:
            return f"has {_STANDS_STILL}"
        return super().why_not(options)

    def _clipped_steps(self) -> int:
        half_log_ratio = np.log(np.sqrt(self.shares)) - np.log(np.sqrt(1 - self.shares))
        return int(np.searchsorted(half_log_ratio[::-1], self.options["lambda_min_clipped"]))

    def _asked(self, timesteps: Numbers) -> Numbers:
        cosine = self.options["beta_schedule"] == "squaredcos_cap_v2"
        return np.trunc(timesteps) if cosine else super()._asked(timesteps)

    def step(self, output: Array, sample: Array, draw: Draw) -> Array:
        self._predicted = [self._picture(output, sample), *self._predicted[:2]]
        (_, spread), (signal_then, spread_then) = (parts(float(self.sigmas[self.index + ahead])) for ahead in (0, 1))
        width = self._logs(self.index + 1) - self._logs(self.index)
        kept = math.exp(-width)
        noisy = _is_stochastic(self.options)
        double = 2 * width if noisy else width
        made = spread_then / spread * (kept if noisy else 1) * sample + signal_then * self._integral(width, double)
        self.index += 1
        return made + spread_then * math.sqrt(1 - kept**2) * draw() if noisy else made

    def _integral(self, width: float, double: float) -> Array:
        """Of exp(l - l_t) x_0 over a step, where x_0 is a polynomial in l through the last pictures.

        Arguments:
            width: Of the step in l.
            double: The same, or twice it for the equation with noise.
        """
        now, *before = self._predicted
        order = min(self._order(), len(self._predicted))
        whole = 1 - math.exp(-double)
        if order == 1:
            return whole * now
        back = [self._logs(self.index - step) - self._logs(self.index - step - 1) for step in range(order - 1)]
        slope: Array = (now - before[0]) * (width / back[0])
        if order == 2:
            midpoint = self.options["solver_type"] == "midpoint"
            return whole * now + (0.5 * whole if midpoint else 1 - whole / double) * slope
        earlier: Array = (before[0] - before[1]) * (width / back[1])
        bend: Array = (slope - earlier) * (width / (back[0] + back[1]))
        slope = slope + bend * (back[0] / width)
        made: Array = whole * now + (1 - whole / width) * slope - ((width - whole) / width**2 - 0.5) * bend
        return made

    def _order(self) -> int:
        """Lower at the end, where it has to be or the steps are few."""
        left, few = len(self._all) - self.index, len(self._all) < _FEW_STEPS
        low = self.options["lower_order_final"] and few
        if left == 1 and (low or self.options["euler_at_final"] or self.options["final_sigmas_type"] == "zero"):
            return 1
        return min(int(self.options["solver_order"]), left) if low else int(self.options["solver_order"])


def _stands_still(options: Mapping[str, Any]) -> bool:
    """Whether the last step goes from the smallest sigma of a law to the same one."""
    law = options["use_karras_sigmas"] or options["use_exponential_sigmas"]
    return bool(law and options["final_sigmas_type"] == "sigma_min")


def _is_stochastic(options: Mapping[str, Any]) -> bool:
    return bool(options["algorithm_type"] == "sde-dpmsolver++")


class UniPc(_Solver):
    """A predictor, and a corrector that takes the picture predicted at its end to do the step once more."""

    defaults: ClassVar = (
        SCHEDULE
        | SIGMAS
        | _SOLVER
        | {"predict_x0": True, "solver_type": "bh2", "disable_corrector": (), "solver_p": None}
    )
    supported: ClassVar = _SOLVED | {"predict_x0": (True,), "solver_type": ("bh1", "bh2"), "solver_p": (None,)}
    renamed: ClassVar = {"solver_type": {"midpoint": "bh2", "heun": "bh2", "logrho": "bh2"}}

    @classmethod
    def why_not(cls, options: Mapping[str, Any]) -> str | None:
        if options["final_sigmas_type"] == "zero" and not options["lower_order_final"]:
            return "has lower_order_final False with final_sigmas_type zero, whose last step has no answer"
        return f"has {_STANDS_STILL}" if _stands_still(options) else super().why_not(options)

    def __init__(self, options: Mapping[str, Any], steps: int, skipped: int) -> None:
        super().__init__(options, steps, skipped)
        self._before: Array | None = None
        self._used = 0

    def step(self, output: Array, sample: Array, draw: Draw) -> Array:  # noqa: ARG002
        picture = self._picture(output, sample)
        if self._before is not None and self.index - 1 not in self.options["disable_corrector"]:
            sample = self._gone(self.index - 1, self._before, self._used, picture)
        self._predicted = [picture, *self._predicted[:2]]
        left = len(self._all) - self.index if self.options["lower_order_final"] else math.inf
        self._used = int(min(self.options["solver_order"], left, len(self._predicted)))
        self._before = sample
        self.index += 1
        return self._gone(self.index - 1, sample, self._used, None)

    def _gone(self, index: int, sample: Array, order: int, end: Array | None) -> Array:
        """A step from one of the sigmas to the next, of this order (eq. 3 and 8 of the paper).

        Arguments:
            index: Of the sigma.
            sample: There.
            order: How many of the last pictures are used.
            end: The picture that was predicted at the end of the step, to correct it; None to predict.
        """
        (_, spread), (signal_then, spread_then) = (parts(float(self.sigmas[index + ahead])) for ahead in (0, 1))
        width = self._logs(index + 1) - self._logs(index)
        now, *before = self._predicted
        whole = -math.expm1(-width)
        made = spread_then / spread * sample + signal_then * whole * now
        places = [(self._logs(index - back) - self._logs(index)) / width for back in range(1, order)]
        changes = [(picture - now) / place for picture, place in zip(before, places, strict=False)]
        if end is not None:
            places, changes = [*places, 1.0], [*changes, end - now]
        scale = whole if self.options["solver_type"] == "bh2" else width
        for weight, change in zip(_weights(places, width, scale), changes, strict=True):
            made = made + signal_then * scale * weight * change
        return made


def _weights(places: list[float], width: float, scale: float) -> list[float]:
    """Of changes of the picture from the start of a step to these places, where the start is 0 and the end 1.

    With them a step is exact for pictures that are polynomials in l; a single change has the constant of the paper.
    """
    if len(places) < 2:
        return [0.5] * len(places)
    moments, phi, factorial = [], 1 + math.expm1(-width) / width, 1
    for power in range(1, len(places) + 1):
        factorial *= power
        moments.append(phi * factorial / scale)
        phi = 1 / (factorial * (power + 1)) - phi / width
    found: list[float] = np.linalg.solve(np.vander(places, increasing=True).T, moments).tolist()
    return found
