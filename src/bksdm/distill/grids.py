"""Sample grids while a student learns: how its pictures come to look like the teacher's."""

from functools import cached_property
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from bksdm.common.errors import InputError
from bksdm.common.processes import processes
from bksdm.common.progress import say
from bksdm.distill.conditions import without_caption
from bksdm.distill.pair import Pair
from bksdm.distill.state import TrainState, averaged
from bksdm.generate.requests import Request
from bksdm.generate.sampling import Embedded, sample, side_by_side
from bksdm.models.pipelines import denoiser, tokenizing
from bksdm.runtime.defaults import Defaults


class SampleGrids:
    """Writes `folder/step-N.png`: a row a prompt, the teacher's picture and the student's from the same seed."""

    def __init__(
        self,
        pair: Pair,
        student: DiffusionPipeline,
        state: TrainState,
        prompts: list[str],
        folder: Path,
        *,
        teacher_drawing: Defaults,
        student_drawing: Defaults,
    ) -> None:
        self._teacher = pair.teacher
        self._student = student
        self._drawings = teacher_drawing, student_drawing
        self._precision = pair.formats.precision
        self._state = state
        self._requests = [Request(prompt, seed) for seed, prompt in enumerate(prompts)]
        self._pair = pair
        self._folder = folder
        self._wanted: list[Image.Image] = []

    def __call__(self, step: int) -> None:
        try:
            self._wanted = self._wanted or self._pictures(self._teacher, self._drawings[0])
            with averaged(self._state):
                got = self._pictures(self._student, self._drawings[1])
        except InputError as error:  # numbers that are not finite; what learns may have others
            say(f"no sample grid at step {step}: {error}")
            return
        if not processes().main:  # a teacher that is spread over the processes needs them all
            return
        self._folder.mkdir(exist_ok=True)
        side_by_side(list(zip(self._wanted, got, strict=True))).save(self._folder / f"step-{step:08d}.png")

    def _pictures(self, pipeline: DiffusionPipeline, drawing: Defaults) -> list[Image.Image]:
        own = denoiser(pipeline).dtype
        precision = self._precision if own == torch.float32 else own
        with (
            torch.compiler.set_stance("force_eager"),  # other batch sizes would be compiled anew
            torch.autocast(pipeline.vae.device.type, precision, enabled=precision != torch.float32),
        ):
            batches = sample(pipeline, self._requests, **vars(drawing), embedded=self._embedded)
            return [picture for batch in batches for picture in batch]

    @cached_property
    def _embedded(self) -> Embedded:
        """What the prompts give, once: the text encoders need not stay."""
        teacher, conditions = self._pair.teacher, self._pair.conditions
        tokens = torch.stack([tokenizing(teacher)(request.prompt) for request in self._requests])
        return Embedded(conditions.embedded(tokens.to(teacher.vae.device)), without_caption(teacher, conditions))
