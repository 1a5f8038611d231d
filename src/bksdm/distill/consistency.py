r"""Latent-consistency distillation: a student that goes from any noise to the picture in one step.

Let $f(z, t) = c_{skip}(t)\, z + c_{out}(t)\, \hat z_0(z, t)$, where $\hat z_0$ are the clean latents that the U-Net
sees in z, $c_{skip}(t) = \sigma^2 / ((s t)^2 + \sigma^2)$ and $c_{out}(t) = s t / \sqrt{(s t)^2 + \sigma^2}$, so that
$f(z, 0) = z$. From $z_t$ on the solver's grid the teacher takes one step of DDIM under guidance to the timestep before,
$z_{t'}$, and the loss is the distance of $f(z_t, t)$ to $\bar f(z_{t'}, t')$, where $\bar f$ has the student's
averaged weights.

Sources: LCM (arXiv 2310.04378), here with a guidance scale that is fixed, so that the student stays a stock U-Net; the
pruned student learns from the large teacher (EdgeFusion, arXiv 2404.11925). $s$ and $\sigma$ are the scheduler's.
"""

from collections.abc import Callable, Mapping
from functools import partial
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
from bksdm.distill.losses import guided, pseudo_huber
from bksdm.families.family import Told
from bksdm.families.noise import ForwardProcess
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


class Consistency:
    """The objective of latent-consistency distillation. It owns the frozen teacher.

    Called with a batch (see `Conditions`) and random numbers, it returns `loss`.

    Arguments:
        student: The student.
        teacher: The teacher; frozen here.
        conditions: What turns a batch into latents and what the networks are told.
        noise_schedule: The forward process.
        scheduler: What the student will draw with: it says the grid and the boundary.
        empty: What the denoiser is told where there is no caption, with B = 1.
        guidance: Guidance scale of the teacher's steps; 1 for none, which halves its work.
        average: The student's averaged weights by name, which give the target; where there are none, its own do.
        replica: Where several processes train, what wraps the student and is called in its place.
        distance: Between two tensors with shape (B, C, H, W); the target comes second.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        conditions: Conditions,
        noise_schedule: ForwardProcess,
        scheduler: LCMScheduler,
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
        self.noise_schedule = noise_schedule
        self.scheduler = scheduler
        self.skip = len(noise_schedule) // scheduler.config.original_inference_steps
        self.grid = torch.arange(self.skip, len(noise_schedule) + 1, self.skip) - 1  # LCMScheduler.set_timesteps
        self._empty = empty
        self._guidance = guidance
        # Detached, so that autocast keeps no copy of them that has lost its way to the gradients.
        self._average = average or {name: p.detach() for name, p in student.named_parameters()}
        self._distance = distance

    def __call__(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        noisy = self.noise_schedule.corrupt(self.conditions.latents(batch, draws), draws, self.grid)
        latents, timesteps, told = noisy.latents, noisy.timesteps, self.conditions.told(batch)
        with torch.no_grad():
            target = self.target(latents, timesteps, told)
        answer = self.conditions.family.answer(self._call_student, latents, timesteps, as_type(told, torch.float32))
        return {"loss": self._distance(self.consistent(latents, timesteps, answer), target)}

    def consistent(self, latents: Tensor, timesteps: Tensor, answer: Tensor) -> Tensor:
        """f: latents (B, C, H, W) at timesteps (B,), and the U-Net's answer to them, give clean latents."""
        clean, _ = self.noise_schedule.parted(latents, timesteps, answer.float())
        skip, out = self.scheduler.get_scalings_for_boundary_condition_discrete(timesteps.float().view(-1, 1, 1, 1))
        consistent: Tensor = skip * latents + out * clean
        return consistent

    def target(self, latents: Tensor, timesteps: Tensor, told: Told) -> Tensor:
        """What f should give, from one timestep of the grid earlier; shapes as for the U-Net."""
        earlier, before = self.solve(latents, timesteps, told)
        averaged = partial(_averaged, self.student, self._average)
        answer = self.conditions.family.answer(averaged, earlier, before, as_type(told, torch.float32))
        return self.consistent(earlier, before, answer)

    def solve(self, latents: Tensor, timesteps: Tensor, told: Told) -> tuple[Tensor, Tensor]:
        """One step of DDIM by the teacher under guidance.

        Arguments:
            latents: With shape (B, C, H, W).
            timesteps: Of the grid, with shape (B,).
            told: What the teacher is told.

        Returns:
            The latents one timestep of the grid earlier, and that timestep; before the first comes 0.
        """
        clean, noise = self.noise_schedule.parted(latents, timesteps, self._taught(latents, timesteps, told))
        before = (timesteps - self.skip).clamp(min=0)
        return self.noise_schedule.mixed(clean, noise, before), before

    def _taught(self, latents: Tensor, timesteps: Tensor, told: Told) -> Tensor:
        """The teacher's answer under guidance, computed in the teacher's own number format."""
        own: Any = self.teacher.dtype
        if self._guidance != 1:
            told = joined(told, repeated(self._empty, len(latents)))
            latents, timesteps = torch.cat([latents, latents]), torch.cat([timesteps, timesteps])
        with torch.autocast(latents.device.type, enabled=False):
            answer = self.conditions.family.answer(self.teacher, latents.to(own), timesteps, as_type(told, own)).float()
        return answer if self._guidance == 1 else guided(answer, self._guidance)


def _averaged(network: nn.Module, weights: Mapping[str, Tensor], *given: Any, **named: Any) -> Any:
    """The network with other weights."""
    return functional_call(network, dict(weights), given, named)
