"""One file with the names of original Stable Diffusion checkpoints, and the way back."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders import single_file_utils
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bksdm.common.errors import InputError
from bksdm.export.ldm import original_tensors, why_not, write_single_file
from bksdm.export.run import export
from bksdm.families import derive
from bksdm.families.recipe import Recipe, load_recipe
from bksdm.families.unet import names as unet_names
from bksdm.models.pipelines import (
    check_folder,
    context_tokens,
    load_config,
    load_pipeline,
    load_unet_config,
    save_pipeline,
)
from bksdm.models.single_file import read_contents
from bksdm.options import ExportOptions
from bksdm.pruning.run import prune_unet, read_recipe, with_unet
from published import RECIPES, UNETS, student_config
from tiny_models import V1_UNET, build_pipeline

CUSTOM = Recipe("custom", down=((0,), (0, 1), (0, 1), (0,)), up=((0, 2), (0, 1, 2), (0, 1, 2), (0, 2)), mid=False)
RESNET = Recipe("resnet", mid="resnet")
NETWORKS = ("unet", "vae", "text_encoder")


def student(teacher: StableDiffusionPipeline, recipe: Recipe | None) -> StableDiffusionPipeline:
    return with_unet(teacher, prune_unet(teacher.unet, recipe)[0]) if recipe else teacher


def assert_same(one: StableDiffusionPipeline, other: StableDiffusionPipeline) -> None:
    for part in NETWORKS:
        ours, theirs = (getattr(pipeline, part).state_dict() for pipeline in (one, other))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), part
    for config in (lambda p: p.unet, lambda p: p.vae, lambda p: p.scheduler, lambda p: p.text_encoder.config):
        assert plain(config(one)) == plain(config(other))
    assert type(one.scheduler) is type(other.scheduler)
    captions = ["red apple", "green car", ""]
    assert one.tokenizer(captions, padding="max_length") == other.tokenizer(captions, padding="max_length")
    assert one.tokenizer.model_max_length == other.tokenizer.model_max_length


def plain(part: object) -> dict:
    values = json.loads(part.to_json_string())
    return {key: value for key, value in values.items() if key != "_name_or_path"}


@pytest.mark.parametrize(
    "recipe", [None, *map(load_recipe, RECIPES), CUSTOM, RESNET], ids=lambda r: r.name if r else "whole"
)
def test_a_file_gives_back_the_pipeline_to_the_bit(
    teacher: StableDiffusionPipeline, recipe: Recipe | None, tmp_path: Path
) -> None:
    pipeline, file, folder = student(teacher, recipe), tmp_path / "student.safetensors", tmp_path / "folder"
    save_pipeline(pipeline, folder)
    from_folder = load_pipeline(folder)
    write_single_file(from_folder, file, recipe=recipe)
    assert_same(load_pipeline(file), from_folder)
    assert [found.name for found in tmp_path.iterdir() if found.name.startswith(".")] == []
    assert load_unet_config(file)["block_out_channels"] == list(pipeline.unet.config.block_out_channels)
    assert context_tokens(file) == context_tokens(folder)
    if recipe:
        assert read_recipe(file) == recipe


def test_the_embedded_model_goes_there_and_back_and_draws_the_same(tmp_path: Path) -> None:
    pipeline, file = load_pipeline("emoji"), tmp_path / "emoji.safetensors"
    write_single_file(pipeline, file, dtype=torch.float16)  # its own number format
    found = load_pipeline(file)
    assert_same(found, pipeline)
    draw = {"num_inference_steps": 2, "output_type": "np"}
    ours, theirs = (p("red apple", generator=torch.Generator().manual_seed(0), **draw)[0] for p in (found, pipeline))
    assert (ours == theirs).all()
    assert load_config(file, "vae")["scaling_factor"] == pipeline.vae.config.scaling_factor


def test_the_way_back_writes_a_folder_with_the_recipe(v1_teacher: StableDiffusionPipeline, tmp_path: Path) -> None:
    small, file = load_recipe("small"), tmp_path / "small.safetensors"
    write_single_file(student(v1_teacher, small), file, recipe=small)
    export(ExportOptions(str(file), "diffusers", str(tmp_path / "small")))
    check_folder(tmp_path / "small")
    ours, theirs = (original_tensors(load_pipeline(model), torch.float32) for model in (tmp_path / "small", file))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert read_recipe(tmp_path / "small") == small


@pytest.mark.parametrize("recipe", [None, *RECIPES])
def test_diffusers_own_converters_read_the_names(teacher: StableDiffusionPipeline, recipe: str | None) -> None:
    pipeline = student(teacher, load_recipe(recipe) if recipe else None)
    tensors = original_tensors(pipeline, torch.float32)
    unet = single_file_utils.convert_ldm_unet_checkpoint(dict(tensors), dict(pipeline.unet.config))
    vae = single_file_utils.convert_ldm_vae_checkpoint(dict(tensors), dict(pipeline.vae.config))
    if pipeline.unet.config.use_linear_projection:
        text = single_file_utils.convert_open_clip_checkpoint(pipeline.text_encoder, dict(tensors))
    else:
        text = single_file_utils.convert_ldm_clip_checkpoint(dict(tensors))
    text = {key.removeprefix("text_model."): value for key, value in text.items()}
    for part, found in zip(NETWORKS, (unet, vae, text), strict=True):
        wanted = {k.removeprefix("text_model."): v for k, v in getattr(pipeline, part).state_dict().items()}
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("recipe", [None, *RECIPES])
def test_configs_at_full_size_follow_from_names_and_shapes(version: str, recipe: str | None) -> None:
    config = student_config(version, recipe) if recipe else UNETS[version]
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        )
    shapes = {}
    for network, places in ((unet, unet_names.unet_places), (vae, unet_names.vae_places)):
        weights = network.state_dict()
        shapes |= {place.name: tuple(weights[key].shape) for key, place in places(weights).items()}
    found = unet_names.unet_config(shapes)
    known = {"attention_head_dim", "block_out_channels", "cross_attention_dim", "down_block_types", "up_block_types"}
    for key in known | {"in_channels", "out_channels", "layers_per_block", "sample_size", "use_linear_projection"}:
        wanted = unet.config[key]
        assert found[key] == (list(wanted) if isinstance(wanted, tuple) else wanted), key
    assert found["mid_block_type"] == unet.config.mid_block_type
    assert unet_names.is_pruned(found) == (recipe is not None)
    assert unet_names.vae_config(shapes)["block_out_channels"] == [128, 256, 512, 512]


def test_a_middle_block_of_one_resnet_is_told_by_its_names() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(derive(RESNET, UNETS["v1"]).student_config)
    weights = unet.state_dict()
    found = unet_names.unet_config(
        {place.name: weights[key].shape for key, place in unet_names.unet_places(weights).items()}
    )
    assert found["mid_block_type"] == "UNetMidBlock2D"
    assert unet_names.is_pruned(found)


def test_names_of_whole_version_1_are_the_published_ones() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNETS["v1"])
    names = {place.name for place in unet_names.unet_places(unet.state_dict()).values()}
    assert len(names) == 686  # as in v1-inference.yaml's UNetModel
    assert {
        "model.diffusion_model.input_blocks.3.0.op.weight",
        "model.diffusion_model.input_blocks.11.0.out_layers.3.weight",
        "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight",
        "model.diffusion_model.output_blocks.2.1.conv.weight",
        "model.diffusion_model.output_blocks.5.2.conv.weight",
        "model.diffusion_model.output_blocks.11.1.proj_out.bias",
        "model.diffusion_model.out.2.bias",
    } <= names


def test_without_its_header_the_structure_is_still_found(v1_teacher: StableDiffusionPipeline, tmp_path: Path) -> None:
    tiny, file, bare = load_recipe("tiny"), tmp_path / "tiny.safetensors", tmp_path / "bare.safetensors"
    pipeline = student(v1_teacher, tiny)
    write_single_file(pipeline, file, recipe=tiny)
    save_file(load_file(file), bare)
    found = read_contents(bare)
    assert not found.is_stock
    rebuilt = UNet2DConditionModel.from_config(found.configs["unet"]).state_dict()
    assert {k: v.shape for k, v in rebuilt.items()} == {k: v.shape for k, v in pipeline.unet.state_dict().items()}
    with pytest.raises(InputError, match="holds no vocabulary"):
        load_pipeline(bare)
    with pytest.raises(InputError, match="no recipe in its header"):
        read_recipe(bare)


def test_the_header_is_plain_and_small(tmp_path: Path) -> None:
    save_pipeline(load_pipeline("emoji"), tmp_path / "emoji")
    write_single_file(load_pipeline(tmp_path / "emoji"), tmp_path / "emoji.safetensors", dtype=torch.float16)
    with safe_open(tmp_path / "emoji.safetensors", framework="pt") as opened:
        values = opened.metadata()["bksdm"]
    assert set(json.loads(values)) == {"configs", "scheduler", "tokenizer", "recipe"}
    assert len(values) < 100_000
    assert str(tmp_path) not in values


def damaged(folder: Path, file: Path, kind: str) -> Path:
    """A file that is not what it should be."""
    bad = folder / "bad.safetensors"
    tensors = load_file(file)
    if kind == "cut short":
        bad.write_bytes(file.read_bytes()[:-1000])
    elif kind == "pickle":
        bad.write_bytes(pickle.dumps({"state_dict": {}}))
    elif kind == "no checkpoint":
        save_file({"weight": torch.zeros(2)}, bad)
    elif kind == "no text encoder":
        save_file({key: value for key, value in tensors.items() if not key.startswith("cond_stage_model")}, bad)
    elif kind == "header":
        save_file(tensors, bad, metadata={"bksdm": "{"})
    else:
        with safe_open(file, framework="pt") as opened:
            header = opened.metadata()
        del tensors["model.diffusion_model.output_blocks.1.0.in_layers.2.weight"]
        save_file(tensors, bad, metadata=header)
    return bad


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("cut short", "cut short or damaged"),
        ("pickle", "cut short or damaged"),
        ("no checkpoint", "not a whole Stable Diffusion checkpoint"),
        ("no text encoder", "no whole text encoder"),
        ("header", "damaged header"),
        ("a tensor less", "lacks 1 of its tensors"),
    ],
)
def test_bad_files_are_refused_in_one_line(
    v1_teacher: StableDiffusionPipeline, tmp_path: Path, kind: str, words: str
) -> None:
    write_single_file(v1_teacher, tmp_path / "good.safetensors")
    with pytest.raises(InputError, match=words) as caught:
        load_pipeline(damaged(tmp_path, tmp_path / "good.safetensors", kind))
    assert "\n" not in str(caught.value)


def test_what_the_layout_cannot_hold_is_refused(tmp_path: Path) -> None:
    pipeline = build_pipeline(V1_UNET | {"encoder_hid_dim": 16, "encoder_hid_dim_type": "text_proj"})
    assert "no place for unet.encoder_hid_proj" in (why_not(pipeline) or "")
    with pytest.raises(InputError, match="keep the diffusers folder"):
        write_single_file(pipeline, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="give a file name that ends in"):
        write_single_file(build_pipeline(V1_UNET), tmp_path / "model.ckpt")
    assert list(tmp_path.iterdir()) == []
