"""From features to scores: the one place that knows which score needs what."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from bksdm.common.progress import bar
from bksdm.evaluate.blocks import Blocks
from bksdm.evaluate.networks import FEATURES, IMAGE, LOGITS, TEXT, Networks
from bksdm.evaluate.reference import RealFeatures
from bksdm.evaluate.scores import (
    KINDS,
    LEFT_UNSEEN,
    Estimate,
    Frechet,
    Resampling,
    Weighted,
    cosines,
    inception,
    kernel,
    mean_of,
    near,
    retrieval_hits,
)
from bksdm.evaluate.sources import Source
from bksdm.evaluate.statistics import Gaussian
from bksdm.options.evaluate import Intervals

RETRIEVAL_AMONG = 100
_BOOTSTRAP = 0  # its seed; that of the pictures is an option


@dataclass(frozen=True)
class Scoring:
    """What pictures are scored against.

    Attributes:
        scores: Names of the scores.
        networks: Gave the features.
        real: Features of the real pictures.
        prompts: The prompts that models draw.
        distractors: Captions that join those of pictures and reference in the pool of the retrieval.
        unseen: Captions without pictures, which the teacher draws.
        resamples: Of the bootstrap.
        intervals: What gives that of the Fréchet distance.
    """

    scores: Sequence[str]
    networks: Networks
    real: RealFeatures
    prompts: Sequence[str]
    distractors: Sequence[str]
    unseen: Sequence[str]
    resamples: int
    intervals: Intervals

    def statistics(self, blocks: Blocks) -> Gaussian | None:
        """Mean and covariance of pictures' features, where the Fréchet distance compares them."""
        rows = blocks.rows(FEATURES)
        if not rows or "frechet_distance" not in self.scores:
            return None
        return Gaussian.of(rows, torch.ones(len(rows), device=self._device))

    def of_pictures(
        self,
        name: str,
        source: Source,
        blocks: Blocks,
        gaussian: Gaussian | None = None,
        repeats: int = 1,
        outputs: Mapping[str, Weighted] | None = None,
    ) -> dict[str, Estimate]:
        """Scores of one model's pictures.

        Arguments:
            name: Of the model, for the bar.
            source: The pictures.
            blocks: Their features.
            gaussian: Their `statistics`.
            repeats: Pictures of every prompt, which follow each other.
            outputs: Scores of how far the model's outputs are from the teacher's.
        """
        own = self._resampling(units(source.captions, len(source)), repeats)
        of_real = self._of_real
        features = blocks.rows(FEATURES)
        pairs = {"precision": own, "recall": of_real}
        found: dict[str, Estimate] = {}
        with bar(len(self.scores), f"scores of {name}") as progress:
            for score in self.scores:
                if score in pairs and score not in found and features and self.real.rows:
                    both = near(features, self.real.rows, own.weights.device)
                    for (kind, how), values in zip(pairs.items(), both, strict=True):
                        if kind in self.scores and how:
                            found[kind] = how.estimate(mean_of(values))
                elif outputs and score in outputs:
                    entries = self._of_unseen if score == LEFT_UNSEEN else of_real
                    assert entries, f"{score} is of pictures"
                    found[score] = entries.estimate(outputs[score])
                elif weighted := self._weighted(score, blocks, source.captions, gaussian):
                    if isinstance(weighted, Frechet) and self.intervals == "influence":
                        found[score] = own.by_influence(weighted)
                    else:
                        found[score] = own.estimate(weighted)
                progress.advance()
        return {score: found[score] for score in KINDS if score in found}

    def of_reference(self) -> dict[str, Estimate]:
        """Scores of the real pictures with their own captions."""
        real, how = self.real, self._of_real
        if not (how and real.images and real.texts):
            return {}
        found = {"clip_score": cosines(real.images, real.texts)}
        if "retrieval_r1" in self.scores:
            found["retrieval_r1"] = retrieval_hits(real.images, real.captions, self.pool, self.among)
        return {name: how.estimate(mean_of(values)) for name, values in found.items() if name in self.scores}

    @property
    def among(self) -> int:
        """Of how many captions the retrieval chooses."""
        return min(RETRIEVAL_AMONG, len(self._captions))

    @cached_property
    def pool(self) -> Mapping[str, Tensor]:
        """Features by caption of everything that a picture's own caption may compete with."""
        assert self.networks.encoder
        features = self.networks.encoder.text_features(self._captions).cpu()
        return dict(zip(self._captions, features, strict=True))

    @cached_property
    def _captions(self) -> list[str]:
        return list(dict.fromkeys([*self.prompts, *self.real.captions, *self.distractors]))

    @cached_property
    def _of_real(self) -> Resampling | None:
        count = self.real.count
        return self._resampling(units(self.real.captions, count)) if count else None

    @cached_property
    def _of_unseen(self) -> Resampling:
        return self._resampling(units(self.unseen, len(self.unseen)))

    def _resampling(self, drawn: Sequence[int], repeats: int = 1) -> Resampling:
        return Resampling.of(drawn, self.resamples, _BOOTSTRAP, repeats, self._device)

    @property
    def _device(self) -> torch.device:
        device = self.networks.device
        return device if device.type == "cuda" else torch.device("cpu")  # MPS has no float64

    def _weighted(
        self, score: str, blocks: Blocks, captions: Sequence[str] | None, own: Gaussian | None
    ) -> Weighted | None:
        """A score of all pictures together, or None where something that it needs is not there."""
        features, logits, images, texts = (blocks.rows(name) for name in (FEATURES, LOGITS, IMAGE, TEXT))
        if score == "frechet_distance" and features and own and self.real.gaussian:
            return Frechet(features, own, self.real.gaussian)
        if score == "kernel_distance" and features and self.real.rows:
            return kernel(features, self.real.rows)
        if score == "inception_score" and logits:
            return inception(logits)
        if score == "clip_score" and images and texts:
            return mean_of(cosines(images, texts))
        if score == "retrieval_r1" and images and captions:
            return mean_of(retrieval_hits(images, captions, self.pool, self.among))
        return None


def units(captions: Sequence[str] | None, count: int) -> list[int]:
    """What the bootstrap draws: pictures of one caption go together; without captions, each goes alone."""
    if not captions:
        return list(range(count))
    numbers: dict[str, int] = {}
    return [numbers.setdefault(caption, len(numbers)) for caption in captions]
