r"""Consistency distillation: a student that goes from any noise to the picture in a few steps, or in one.

From noisy latents $z_t$ on a grid of timesteps the teacher takes one step of its solver, DDIM or Euler's, under
guidance to the timestep before, $z_{t'}$, and the loss is the distance of $f(z_t, t)$ to $\bar f(z_{t'}, t')$, where
$\bar f$ has the student's averaged weights. What f is, a `ConsistencyFunction` says.

Sources: LCM (arXiv 2310.04378), here with a guidance scale that is fixed, so that the student stays a stock network;
the pruned student learns from the large teacher (EdgeFusion, arXiv 2404.11925).
"""

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

import torch
from diffusers import LCMScheduler, SchedulerMixin
from torch import Tensor, nn
from torch.func import functional_call

from bksdm.common.errors import InputError
from bksdm.common.randomness import Draws
from bksdm.data.stream import Batch
from bksdm.distill.conditions import Conditions, as_type, joined, repeated
from bksdm.distill.consistency_functions import ConsistencyFunction
from bksdm.distill.losses import guided, pseudo_huber
from bksdm.families.family import Told
from bksdm.models.pipelines import said
from bksdm.runtime.schedulers import with_scheduler

Distance = Callable[[Tensor, Tensor], Tensor]


def few_step_scheduler(scheduler: SchedulerMixin, solver_steps: int) -> LCMScheduler:
    """The scheduler that a student is trained for and draws with.

    Arguments:
        scheduler: The teacher's, for its noise schedule.
        solver_steps: Timesteps of the solver; a picture takes as many steps or fewer.

    Raises:
        InputError: They do not divide the noise schedule.
    """
    given = with_scheduler(said(scheduler), LCMScheduler.__name__)
    known = {key: value for key, value in given.items() if key in signature(LCMScheduler).parameters}
    few = LCMScheduler.from_config(known, original_inference_steps=solver_steps)
    timesteps = few.config.num_train_timesteps
    if timesteps % solver_steps:
        raise InputError(
            f"solver_steps is {solver_steps}, which does not divide the teacher's {timesteps} timesteps; "
            f"give a divisor, such as 50"
        )
    return few


def unmoving_scheduler(scheduler: SchedulerMixin, shift: float) -> SchedulerMixin:
    """The teacher's scheduler of flow matching, which shifts noise levels by `shift` for pictures of every size."""
    given = {"shift": shift, "use_dynamic_shifting": False, "shift_terminal": None}
    return type(scheduler).from_config({**said(scheduler), **given})


class Consistency:
    """The objective of consistency distillation. It owns the frozen teacher.

    Called with a batch (see `Conditions`) and random numbers, it returns `loss`.

    Arguments:
        student: The student.
        teacher: The teacher; frozen here.
        conditions: What turns a batch into latents and what the networks are told.
        consistent: f.
        empty: What the denoiser is told where there is no caption, with B = 1.
        guidance: Scale of classifier-free guidance in the teacher's steps; 1 for none, which halves its work.
        average: The student's averaged weights by name, which give the target; where there are none, its own do.
        replica: Where several processes train, what wraps the student and is called in its place.
        distance: Between two tensors with shape (B, C, H, W); the target comes second.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        conditions: Conditions,
        consistent: ConsistencyFunction,
        empty: Told,
        *,
        guidance: float = 7.5,
        average: Mapping[str, Tensor] | None = None,
        replica: nn.Module | None = None,
        distance: Distance = pseudo_huber,
    ) -> None:
        self.student = student
        self._call_student = replica or student
        self.teacher = teacher.eval().requires_grad_(False)
        self.conditions = conditions
        self.consistent = consistent
        self._empty = empty
        self._guidance = guidance
        # Detached, so that autocast keeps no copy of them that has lost its way to the gradients.
        self._averaged = _Averaged(student, average or {name: p.detach() for name, p in student.named_parameters()})
        self._distance = distance

    def __call__(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        schedule, grid = self.consistent.noise_schedule, self.consistent.grid
        noisy = schedule.corrupt(self.conditions.latents(batch, draws), draws, grid)
        latents, timesteps, told = noisy.latents, noisy.timesteps, self.conditions.told(batch)
        with torch.no_grad():
            target = self.target(latents, timesteps, told)
        answer = self.conditions.family.answer(self._call_student, latents, timesteps, as_type(told, torch.float32))
        until = self.consistent.until(timesteps)
        return {"loss": self._distance(self.consistent(latents, timesteps, answer.float(), until), target)}

    def target(self, latents: Tensor, timesteps: Tensor, told: Told) -> Tensor:
        """What f should give, from one timestep of the grid earlier; shapes as for the denoiser."""
        earlier, before = self.solve(latents, timesteps, told)
        answer = self.conditions.family.answer(self._averaged, earlier, before, as_type(told, torch.float32))
        return self.consistent(earlier, before, answer.float(), self.consistent.until(timesteps))

    def solve(self, latents: Tensor, timesteps: Tensor, told: Told) -> tuple[Tensor, Tensor]:
        """One step of the solver by the teacher under guidance.

        Arguments:
            latents: With shape (B, C, H, W).
            timesteps: Of the grid, with shape (B,).
            told: What the teacher is told.

        Returns:
            The latents one timestep of the grid earlier, and that timestep; before the first comes 0.
        """
        schedule, before = self.consistent.noise_schedule, self.consistent.before(timesteps)
        clean, noise = schedule.parted(latents, timesteps, self._taught(latents, timesteps, told))
        return schedule.mixed(clean, noise, before), before

    def _taught(self, latents: Tensor, timesteps: Tensor, told: Told) -> Tensor:
        """The teacher's answer under guidance, computed in the teacher's own number format."""
        own: Any = self.teacher.dtype
        if self._guidance != 1:
            told = joined(told, repeated(self._empty, len(latents)))
            latents, timesteps = torch.cat([latents, latents]), torch.cat([timesteps, timesteps])
        with torch.autocast(latents.device.type, enabled=False):
            answer = self.conditions.family.answer(self.teacher, latents.to(own), timesteps, as_type(told, own)).float()
        return answer if self._guidance == 1 else guided(answer, self._guidance)


class _Averaged:
    """A network with other weights."""

    def __init__(self, network: nn.Module, weights: Mapping[str, Tensor]) -> None:
        self.config = network.config
        self._network, self._weights = network, dict(weights)

    def __call__(self, *given: Any, **named: Any) -> Any:
        return functional_call(self._network, self._weights, given, named)
