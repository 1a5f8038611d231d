r"""DreamBooth's loss (arXiv 2208.12242, eq. 2): the subject under its identifier, and its kind as it was.

$L = \langle (\epsilon - \epsilon_\theta(z_t, c_{subject}))^2 \rangle
+ \lambda \langle (\epsilon' - \epsilon_\theta(z'_{t'}, c_{class}))^2 \rangle$,
where $z'$ are latents of pictures that the model drew of the kind before it learnt anything.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bksdm.common.randomness import Draws, sent
from bksdm.data.stream import Batch
from bksdm.distill.losses import task_loss
from bksdm.families.family import Family, Told
from bksdm.families.noise import Corrupted, ForwardProcess


class Personalization:
    """The objective: a batch of `SubjectSamples` gives `loss`, `task` and, where the kind has pictures, `prior`.

    Arguments:
        unet: What learns, or holds what learns.
        schedule: The forward process.
        told: What the U-Net is told of subject and kind, with B = 2.
        prior_weight: Lambda.
        family: Of the U-Net.
    """

    def __init__(
        self,
        unet: nn.Module,
        schedule: ForwardProcess,
        told: Callable[[], Told],
        prior_weight: float,
        family: Family,
    ) -> None:
        self._unet = unet
        self._schedule = schedule
        self._told = told
        self._family = family
        self._prior_weight = prior_weight

    def __call__(self, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        given = [self._corrupted(batch["latents_mean"], batch["latents_std"], draws)]
        if "class_mean" in batch:
            given.append(self._corrupted(batch["class_mean"], batch["class_std"], draws.also("class")))
        count = len(batch["latents_mean"])
        told = {name: value[: len(given)].repeat_interleave(count, dim=0) for name, value in self._told().items()}
        latents, timesteps = (
            torch.cat(parts) for parts in zip(*((x.latents, x.timesteps) for x in given), strict=True)
        )
        answers = torch.split(self._family.answer(self._unet, latents, timesteps, told), count)
        losses = [task_loss(answer, x.target) for answer, x in zip(answers, given, strict=True)]
        if len(losses) == 1:
            return {"loss": losses[0], "task": losses[0]}
        task, prior = losses
        return {"loss": task + self._prior_weight * prior, "task": task, "prior": prior}

    def _corrupted(self, mean: Tensor, deviation: Tensor, draws: Draws) -> Corrupted:
        latents = mean + deviation * sent(draws.normal(mean.shape), mean.device).to(mean)
        return self._schedule.corrupt(latents, draws)
