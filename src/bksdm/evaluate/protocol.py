"""What is measured, and by which networks: from the options of `bksdm evaluate`.

With the defaults this is the protocol of the paper (BK-SDM, arXiv 2305.15798, section 4.1, after the files that
its authors released): pictures at 256 px through JPEG, Inception features, CLIP ViT-g/14. For the embedded art,
the embedded encoder takes the place of both networks, and pictures are looked at as they are.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bksdm.common.assets import ART
from bksdm.common.errors import InputError
from bksdm.evaluate.encoder import DualEncoder
from bksdm.evaluate.inception import Inception
from bksdm.evaluate.networks import Networks
from bksdm.evaluate.scores import KINDS, LEFT, LEFT_UNSEEN, OUTPUT_ERROR
from bksdm.options.evaluate import EvaluateOptions

INCEPTION = "inception"
PAPERS_CLIP = "laion/CLIP-ViT-g-14-laion2B-s34B-b88K"
_DISTANCES = ("frechet_distance", "kernel_distance", "inception_score", "precision", "recall")
_BY_ENCODER = ("frechet_distance", "kernel_distance", "clip_score", "retrieval_r1")
_BY_INCEPTION = (*_DISTANCES, "clip_score")
OF_OUTPUTS = {OUTPUT_ERROR: ("teacher",), LEFT: ("teacher",), LEFT_UNSEEN: ("teacher", "unseen")}
_NEEDED = {"teacher": "a --teacher", "unseen": "captions as --unseen"}
_OF_SAMPLES = ("kernel_distance", "precision", "recall")  # statistics of the reference do not suffice for these


@dataclass(frozen=True)
class Protocol:
    """How pictures are looked at and scored.

    Attributes:
        scores: Names of the scores, in the order of `KINDS`.
        asked: Whether the user named them; else those that cannot be had are left out.
        features: `inception`, or the encoder's own.
        encoder: CLIP folder, Hub id or embedded name.
        preparation: `paper` or `none`; see `preparation.py`.
        inception_weights: File of the Inception network; downloaded by default.
    """

    scores: tuple[str, ...]
    asked: bool
    features: str
    encoder: str
    preparation: str
    inception_weights: str | None

    @classmethod
    def of(cls, options: EvaluateOptions) -> "Protocol":
        """The protocol that the options name.

        Raises:
            InputError: A score is unknown, or needs what the options do not give.
        """
        embedded = _is_embedded(options.reference)
        encoder = options.encoder or (options.reference.partition("/")[0] if embedded else PAPERS_CLIP)
        features = options.features or (encoder if encoder == ART else INCEPTION)
        if features not in (INCEPTION, encoder):
            raise InputError(f"features is {features!r}; give inception, or the encoder ({encoder})")
        by_inception = features == INCEPTION
        possible = _BY_INCEPTION if by_inception else _BY_ENCODER
        of_outputs = [name for name, needed in OF_OUTPUTS.items() if all(getattr(options, one) for one in needed)]
        scores = tuple(options.scores or (*possible, *of_outputs))
        for name in scores:
            if name not in KINDS:
                raise InputError(f"unknown score {name!r}; give one of {', '.join(KINDS)}")
        if "inception_score" in scores and not by_inception:
            raise InputError("scores has inception_score, which needs --features inception")
        for name in scores:
            for needed in OF_OUTPUTS.get(name, ()):
                if not getattr(options, needed):
                    raise InputError(f"scores has {name}, which needs {_NEEDED[needed]}")
        if options.unseen and LEFT_UNSEEN not in scores:
            missing = "add it to --scores" if options.teacher else "give the --teacher too"
            raise InputError(f"unseen is {options.unseen}, which is for the score {LEFT_UNSEEN}; {missing}")
        preparation = options.preparation
        if preparation == "auto":
            preparation = "paper" if by_inception else "none"
        return cls(
            tuple(name for name in KINDS if name in scores),
            options.scores is not None,
            features,
            encoder,
            preparation,
            options.inception_weights,
        )

    @property
    def compares_distributions(self) -> bool:
        return any(name in _DISTANCES for name in self.scores)

    @property
    def reads_captions(self) -> bool:
        return any(KINDS[name].of_captions for name in self.scores)

    def networks(self, device: torch.device) -> Networks:
        """The networks that the scores need, on a device.

        Raises:
            InputError: One of them cannot be had.
        """
        by_inception = self.features == INCEPTION
        encoder = network = None
        if self.reads_captions or (not by_inception and self.compares_distributions):
            encoder = DualEncoder.load(self.encoder).to(device)
        if by_inception and self.compares_distributions:
            network = Inception.load(self.inception_weights).to(device)
        return Networks(device, encoder, network, logits="inception_score" in self.scores)

    def of_statistics(self, reference: str) -> "Protocol":
        """The same, as far as it can be had where the reference is no more than a mean and a covariance.

        Raises:
            InputError: The user named others.
        """
        lacking = [name for name in self.scores if name in _OF_SAMPLES]
        if lacking and self.asked:
            raise InputError(
                f"scores has {lacking[0]}, which needs the pictures of the reference, and {reference} holds their "
                f"statistics; give a folder of pictures, or leave that score out"
            )
        return dataclasses.replace(self, scores=tuple(name for name in self.scores if name not in _OF_SAMPLES))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a report."""
        return {name: getattr(self, name) for name in ("features", "encoder", "preparation", "inception_weights")}


def check_counts(counts: Sequence[tuple[str, int]], size: int) -> None:
    """Refuse fewer pictures than features: their covariance is singular, and the distance says little.

    Arguments:
        counts: What the pictures are of, and how many there are.
        size: Length of the features.

    Raises:
        InputError: Naming both numbers.
    """
    for what, count in counts:
        if count < size:
            raise InputError(
                f"{what} has {count} pictures, and the Fréchet distance compares {size} features, for which it needs "
                f"as many pictures or more; give more, or name the --scores that you want"
            )


def _is_embedded(reference: str) -> bool:
    return reference.partition("/")[0] == ART
