"""ControlNets of Flux.1 and Z-Image in front of students: each block is given what the teacher's was given."""

import functools
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    FluxControlNetModel,
    FluxControlNetPipeline,
    ZImageControlNetModel,
    ZImageControlNetPipeline,
    ZImagePipeline,
)
from torch import Tensor, nn

from bksdm.models.adapters.block_controlnet import with_those_that_went
from bksdm.models.adapters.controlnet import load_controlnet
from bksdm.models.pipelines import load_pipeline
from tiny_flow import (
    FLOW_TOKENS,
    FLUX_TRANSFORMER,
    HEADS,
    LATENT_CHANNELS,
    WIDTH,
    build_flux_pipeline,
    build_z_pipeline,
)
from verbs import Run

pytest_plugins = ["verbs_fixtures"]

DOUBLE, SINGLE = "transformer_blocks", "single_transformer_blocks"


def stirred(network: nn.Module, seed: int = 0) -> nn.Module:
    """Its residuals begin at zero."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in network.parameters():
            weight.normal_(std=0.2)
    return network


def drawn(pipeline: Any) -> np.ndarray:
    side = 2 * pipeline.vae_scale_factor
    return pipeline(
        prompt="red apple",
        control_image=torch.full((1, 3, side, side), 0.3),
        height=side,
        width=side,
        num_inference_steps=1,
        generator=torch.Generator().manual_seed(0),
        max_sequence_length=FLOW_TOKENS,
        output_type="np",
    ).images[0]


def entered(into: dict[str, Any], name: str, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    into.setdefault(name, args[0] if args else kwargs["hidden_states"])


def left(out: dict[str, Any], name: str, _: nn.Module, args: Any, result: Any) -> None:
    out.setdefault(name, result[-1])


def given(transformer: nn.Module, call: Any) -> dict[int, Tensor]:
    """The residuals that a transformer of Z-Image is given, by the number of the block."""
    found: list[dict[int, Tensor]] = []

    def keep(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        found.append(kwargs["controlnet_block_samples"])

    transformer.register_forward_pre_hook(keep, with_kwargs=True)
    call()
    return found[0]


def added(transformer: nn.Module, call: Any) -> dict[str, Tensor]:
    """What is added to the hidden states between a block and the next, by the block's path."""
    out, into = {}, {}
    for name, block in transformer.named_modules():
        if name.rpartition(".")[0] in (DOUBLE, SINGLE):
            block.register_forward_pre_hook(functools.partial(entered, into, name), with_kwargs=True)
            block.register_forward_hook(functools.partial(left, out, name))
    call()
    paths = list(out)
    return {
        path: into[after] - out[path]
        for path, after in itertools.pairwise(paths)
        if path.rpartition(".")[0] == after.rpartition(".")[0]
    }


@pytest.mark.parametrize("counts", [(4, 6), (2, 4), (3, 5)])
def test_blocks_of_flux_are_given_what_the_teachers_are(counts: tuple[int, int], done: Run, tmp_path: Path) -> None:
    teacher = build_flux_pipeline()
    teacher.save_pretrained(tmp_path / "teacher")
    controlnet = stirred(
        FluxControlNetModel(**FLUX_TRANSFORMER, num_layers=counts[0], num_single_layers=counts[1], guidance_embeds=True)
    )
    controlnet.save_pretrained(tmp_path / "control")
    done("prune", tmp_path / "teacher", "--recipe", "half", "--out", tmp_path / "half")
    words = ("adapt", tmp_path / "control", "--model", tmp_path / "half", "--teacher", tmp_path / "teacher")
    told = done(*words, "--out", tmp_path / "carried", "--json").json
    assert told["moved"][f"{DOUBLE}.3"] == f"{DOUBLE}.1"
    assert told["moved"][f"{SINGLE}.5"] == f"{SINGLE}.2"
    assert f"{SINGLE}.4" in told["dropped"]

    whole = FluxControlNetPipeline(**teacher.components, controlnet=controlnet)
    student = load_pipeline(tmp_path / "half")
    pruned = FluxControlNetPipeline(**student.components, controlnet=load_controlnet(tmp_path / "carried"))
    for pipeline in (whole, pruned):
        pipeline.set_progress_bar_config(disable=True)
    theirs = added(whole.transformer, lambda: drawn(whole))
    ours = added(pruned.transformer, lambda: drawn(pruned))
    same = {f"{DOUBLE}.0": f"{DOUBLE}.0", f"{SINGLE}.0": f"{SINGLE}.0", f"{SINGLE}.1": f"{SINGLE}.2"}
    assert set(ours) == set(same)
    for own, there in same.items():
        image = theirs[there].shape[1]  # the last tokens are the picture's
        torch.testing.assert_close(ours[own][:, -image:], theirs[there], rtol=1e-4, atol=1e-4)
        assert theirs[there].abs().max() > 0.1


def test_blocks_of_z_image_are_given_what_the_teachers_are(done: Run, tmp_path: Path) -> None:
    teacher = build_z_pipeline()
    teacher.save_pretrained(tmp_path / "teacher")
    bare = ZImageControlNetModel(
        control_layers_places=[0, 2, 4], control_in_dim=LATENT_CHANNELS, dim=WIDTH, n_heads=HEADS, n_kv_heads=HEADS
    )
    stirred(bare).save_pretrained(tmp_path / "control")
    done("prune", tmp_path / "teacher", "--recipe", "half", "--out", tmp_path / "half")
    words = ("adapt", tmp_path / "control", "--model", tmp_path / "half", "--teacher", tmp_path / "teacher")
    told = done(*words, "--out", tmp_path / "carried", "--json").json
    assert told["moved"] == {
        "layers.2": "layers.1"
    }  # of 0, 2 and 5; what came after 4 would come after 2, which has one
    assert told["dropped"] == ["layers.4"]

    whole = z_pipeline(teacher, ZImageControlNetModel.from_pretrained(tmp_path / "control"))
    pruned = z_pipeline(load_pipeline(tmp_path / "half"), load_controlnet(tmp_path / "carried"))
    theirs = given(whole.transformer, lambda: drawn(whole))
    ours = given(pruned.transformer, lambda: drawn(pruned))
    assert set(ours) == {0, 1}
    torch.testing.assert_close(ours[0], theirs[0])
    torch.testing.assert_close(ours[1], theirs[2])
    assert not torch.equal(theirs[0], theirs[2])


def z_pipeline(pipeline: ZImagePipeline, controlnet: ZImageControlNetModel) -> ZImageControlNetPipeline:
    made = ZImageControlNetPipeline(**pipeline.components, controlnet=controlnet)
    made.set_progress_bar_config(disable=True)
    return made


def test_what_came_after_a_block_that_went_comes_after_the_one_before() -> None:
    assert with_those_that_went((0, 2, 3, 5), (0, 2, 4, 5)) == (0, 2, 4, 5)
    assert with_those_that_went((0, 2, 5), (1, 3, 4)) == (1, 3, None)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ({"num_attention_heads": 3}, "is not of this teacher: its num_attention_heads is 3, and the teacher's 2"),
        ({"joint_attention_dim": 8}, "is not of this teacher: its joint_attention_dim is 8, and the teacher's 24"),
        (None, "is a ZImageControlNetModel, and Flux.1 has a FluxControlNetModel; give one"),
    ],
)
def test_those_of_others_are_refused(
    made: dict[str, int] | None, message: str, done: Run, run: Run, tmp_path: Path
) -> None:
    build_flux_pipeline().save_pretrained(tmp_path / "teacher")
    done("prune", tmp_path / "teacher", "--recipe", "half", "--out", tmp_path / "half")
    if made is None:
        network = ZImageControlNetModel(
            control_layers_places=[0], control_in_dim=4, dim=WIDTH, n_heads=HEADS, n_kv_heads=HEADS
        )
    else:
        network = FluxControlNetModel(**FLUX_TRANSFORMER | made, num_layers=1, num_single_layers=1)
    network.save_pretrained(tmp_path / "control")
    words = ("adapt", tmp_path / "control", "--model", tmp_path / "half", "--teacher", tmp_path / "teacher")
    outcome = run(*words, "--out", tmp_path / "carried")
    assert outcome.code == 2
    assert message in outcome.said[-1]
    assert not (tmp_path / "carried").exists()
