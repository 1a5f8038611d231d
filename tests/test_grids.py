"""Sample grids of a retraining: prompts are embedded once, and drawn as their words would be."""

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from bksdm.distill.conditions import Conditions, without_caption
from bksdm.generate.requests import Request
from bksdm.generate.sampling import Embedded, sample
from bksdm.models.pipelines import tokenizing
from fast import one_flow

pytest_plugins = ["flow_fixtures"]


def same(teacher: DiffusionPipeline, guidance: float) -> bool:
    """Whether pictures of embedded prompts are those of the prompts."""
    asked = [Request("red apple", 3), Request("a green car", 4), Request("", 5)]
    tokens = torch.stack([tokenizing(teacher)(one.prompt) for one in asked])
    conditions = Conditions.of(teacher)
    known = Embedded(conditions.embedded(tokens), without_caption(teacher, conditions))
    drawn = [
        [
            np.asarray(picture, int)
            for batch in sample(teacher, asked, steps=2, guidance=guidance, batch_size=2, embedded=given)
            for picture in batch
        ]
        for given in (None, known)
    ]
    return all(np.abs(one - other).max() <= 1 for one, other in zip(*drawn, strict=True))


@pytest.mark.parametrize("guidance", [0.0, 3.0])
def test_embedded_prompts_are_drawn_as_their_words(kind_teacher: DiffusionPipeline, guidance: float) -> None:
    assert same(kind_teacher, guidance)


@one_flow
@pytest.mark.parametrize("guidance", [0.0, 3.0])
def test_those_of_transformers_too(flow_teacher: DiffusionPipeline, guidance: float) -> None:
    assert same(flow_teacher, guidance)
