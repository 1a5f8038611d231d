"""The teacher without a unit beside the whole teacher, on the same inputs."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from bksdm.data.pictures import Picture
from bksdm.evaluate.encoder import DualEncoder
from bksdm.evaluate.output_error import probes
from bksdm.evaluate.scores import clip_score, frechet_distance
from bksdm.generate.requests import Request
from bksdm.generate.sampling import decode, sample_latents
from bksdm.models.pipelines import denoiser
from bksdm.pruning.sensitivity.measures import Score, clip_fall, frechet_rise, latent_shift, output_loss
from bksdm.runtime.defaults import Defaults

_CHUNK = 64
PICTURED = ("frechet", "clip")
GENERATED = (*PICTURED, "latents")


@dataclass(frozen=True)
class Inputs:
    """What every network is given.

    Attributes:
        entries: N captioned pictures, for noisy latents and prompts.
        real: Captioned pictures that generated ones are compared with.
        seed: Of the first generated picture, and root of noise and timesteps.
        how: How pictures are drawn.
        batch_size: Pictures at a time.
    """

    entries: Sequence[Picture]
    real: Sequence[Picture]
    seed: int
    how: Defaults
    batch_size: int

    @property
    def requests(self) -> list[Request]:
        return [Request(entry.text, self.seed + number) for number, entry in enumerate(self.entries)]


class Comparison:
    """Compares a pipeline with how it was when this object was made.

    Arguments:
        pipeline: Whole, and on its device; what is bypassed in it later is what is scored.
        encoder: Gives the features of pictures and captions.
        inputs: What it is given.
        scores: Those that will be asked for.
    """

    def __init__(
        self, pipeline: DiffusionPipeline, encoder: DualEncoder, inputs: Inputs, scores: Collection[str]
    ) -> None:
        self._pipeline = pipeline
        self._encoder = encoder
        self._inputs = inputs
        wanted = set(scores)
        if "output" in wanted:
            self._probes = list(probes(pipeline, inputs.entries, inputs.seed, inputs.batch_size))
            self._outputs = self._output()
        if wanted & set(GENERATED):
            self._latents = self._generate()
        if wanted & set(PICTURED):
            self._pictures = self._features(self._latents)
            self._real = torch.cat([encoder.image_features(chunk) for chunk in _opened(inputs.real)])
            self._texts = encoder.text_features([entry.text for entry in inputs.entries])

    def whole(self, score: str) -> float:
        """Frechet distance or CLIP score of the pipeline as it was."""
        if score == "frechet":
            return frechet_distance(self._pictures, self._real)
        return clip_score(self._pictures, self._texts)

    def __call__(self, scores: Sequence[str]) -> dict[str, Score]:
        """Scores of what the pipeline lacks now."""
        wanted, found = set(scores), {}
        if "output" in wanted:
            found["output"] = output_loss(self._output(), self._outputs)
        if wanted & set(GENERATED):
            latents = self._generate()
        if "latents" in wanted:
            found["latents"] = latent_shift(latents, self._latents)
        if wanted & set(PICTURED):
            pictures = self._features(latents)
            found["frechet"] = frechet_rise(pictures, self._pictures, self._real)
            found["clip"] = clip_fall(pictures, self._pictures, self._texts)
        return {name: found[name] for name in scores}

    def _output(self) -> Tensor:
        return torch.cat([probe.output(denoiser(self._pipeline)) for probe in self._probes]).cpu()

    def _generate(self) -> Tensor:
        inputs = self._inputs
        batches = sample_latents(self._pipeline, inputs.requests, **inputs.how.to_dict(), batch_size=inputs.batch_size)
        return torch.cat([latents.cpu() for latents in batches])

    def _features(self, latents: Tensor) -> Tensor:
        pipeline = self._pipeline
        return torch.cat(
            [
                self._encoder.image_features(decode(pipeline, chunk.to(pipeline.device)))
                for chunk in torch.split(latents, self._inputs.batch_size)
            ]
        )


def _opened(entries: Sequence[Picture]) -> Iterator[list[Image.Image]]:
    for start in range(0, len(entries), _CHUNK):
        yield [entry.open() for entry in entries[start : start + _CHUNK]]
