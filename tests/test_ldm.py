"""One file with the names of original Stable Diffusion checkpoints, and the way back."""

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.loaders import single_file_utils
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bksdm.common.errors import InputError
from bksdm.export.ldm import original_tensors, why_not, write_single_file
from bksdm.export.run import export
from bksdm.families import derive, difference, family_of, family_of_pipeline, readers
from bksdm.families.recipe import Config, Recipe, load_recipe
from bksdm.models.configs import context_tokens, load_config, load_denoiser_config
from bksdm.models.contents import read_contents
from bksdm.models.folders import check_folder
from bksdm.models.pipelines import load_pipeline, save_pipeline, tokenizers
from bksdm.options.export import ExportOptions
from bksdm.pruning.inherit import prune_unet, with_denoiser
from bksdm.pruning.told import read_recipe
from comfy import taken_for
from fast import Param, slow
from published import STUDENTS, TEACHERS, UNETS
from tiny_models import V1_UNET, build_pipeline

CUSTOM = Recipe("custom", down=((0,), (0, 1), (0, 1), (0,)), up=((0, 2), (0, 1, 2), (0, 1, 2), (0, 2)), mid=False)
RESNET = Recipe("resnet", mid="resnet")
PUBLISHED = [(version, load_recipe(recipe)) for version, recipe in STUDENTS]
WHOLE = [(version, None) for version in TEACHERS]
CASES = [*WHOLE, *PUBLISHED, *((version, own) for version in UNETS for own in (CUSTOM, RESNET))]
CASES += [("xl", RESNET), ("xl", load_recipe("comfy"))]
# Whole, with stages that went, with layers that went, and with half a middle; the others are such again.
SHOWN = {
    *((version, "whole") for version in ("v1", "xl")),
    *(("v1", recipe) for recipe in ("small", "custom")),
    ("v2", "tiny"),
    *(("xl", recipe) for recipe in ("ssd-1b", "resnet")),
}
TEXT = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings")
SMALL = {"v1": "tiny", "v2": "tiny", "xl": "koala-700m"}


def named(value: object) -> str:
    return value if isinstance(value, str) else value.name if isinstance(value, Recipe) else "whole"


def shown(cases: list[tuple[str, Recipe | None]]) -> list[Param]:
    """Those of the fast suite, and the others as slow ones."""
    return [
        (pytest.param if (case[0], named(case[1])) in SHOWN else slow)(*case, id="-".join(map(named, case)))
        for case in cases
    ]


def student(teacher: DiffusionPipeline, recipe: Recipe | None) -> DiffusionPipeline:
    return with_denoiser(teacher, prune_unet(teacher.unet, recipe)[0]) if recipe else teacher


@dataclass(frozen=True)
class Written:
    """A teacher or a student of it: its folder, what is loaded from there, and the file made of that."""

    folder: Path
    pipeline: DiffusionPipeline
    file: Path


@pytest.fixture(scope="module")
def writing(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, Recipe | None], Written]:
    """Writes what tests ask for, each once. Not to be changed."""

    @cache
    def write(version: str, recipe: Recipe | None) -> Written:
        beside = tmp_path_factory.mktemp("written")
        folder, file = beside / "folder", beside / "student.safetensors"
        save_pipeline(student(request.getfixturevalue(f"{version}_teacher"), recipe), folder)
        pipeline = load_pipeline(folder)
        write_single_file(pipeline, file, recipe=recipe)
        return Written(folder, pipeline, file)

    return write


@pytest.fixture
def written(writing: Callable[[str, Recipe | None], Written], version: str, recipe: Recipe | None) -> Written:
    """What a test's parameters name."""
    return writing(version, recipe)


@pytest.fixture
def pipeline(written: Written) -> DiffusionPipeline:
    return written.pipeline


def assert_same(one: DiffusionPipeline, other: DiffusionPipeline) -> None:
    family = family_of_pipeline(one)
    assert type(one) is type(other)
    for part in family.networks:
        ours, theirs = (getattr(pipeline, part) for pipeline in (one, other))
        assert_equal(ours.state_dict(), theirs.state_dict())
        assert plain(ours) == plain(theirs)
    assert plain(one.scheduler) == plain(other.scheduler)
    assert type(one.scheduler) is type(other.scheduler)
    captions = ["red apple", "green car", ""]
    for ours, theirs in zip(tokenizers(one), tokenizers(other), strict=True):
        assert ours(captions, padding="max_length") == theirs(captions, padding="max_length")
        assert ours.model_max_length == theirs.model_max_length
    assert [one.config[name] for name in family.settings] == [other.config[name] for name in family.settings]


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def plain(part: Any) -> dict:
    """A config as its file has it."""
    values = json.loads((part if hasattr(part, "to_json_string") else part.config).to_json_string())
    return {key: value for key, value in values.items() if key != "_name_or_path"}


@pytest.mark.parametrize(("version", "recipe"), shown(CASES))
def test_a_file_gives_back_the_pipeline_to_the_bit(written: Written, recipe: Recipe | None) -> None:
    file = written.file
    assert_same(load_pipeline(file), written.pipeline)
    assert [found.name for found in file.parent.iterdir() if found.name.startswith(".")] == []
    assert load_denoiser_config(file)["block_out_channels"] == list(written.pipeline.unet.config.block_out_channels)
    assert context_tokens(file) == context_tokens(written.folder)
    if recipe:
        assert read_recipe(file) == recipe


def test_how_a_pipeline_of_sdxl_draws_without_a_caption_is_kept(
    xl_teacher: StableDiffusionXLPipeline, tmp_path: Path
) -> None:
    own = family_of_pipeline(xl_teacher).assembled(
        xl_teacher.components, {"force_zeros_for_empty_prompt": False}, "StableDiffusionXLPipeline"
    )
    write_single_file(own, tmp_path / "own.safetensors")
    assert load_pipeline(tmp_path / "own.safetensors").config["force_zeros_for_empty_prompt"] is False


def test_the_embedded_model_goes_there_and_back_and_draws_the_same(tmp_path: Path) -> None:
    pipeline, file = load_pipeline("emoji"), tmp_path / "emoji.safetensors"
    write_single_file(pipeline, file, dtype=torch.float16)  # its own number format
    found = load_pipeline(file)
    assert_same(found, pipeline)
    draw = {"num_inference_steps": 2, "output_type": "np"}
    ours, theirs = (p("red apple", generator=torch.Generator().manual_seed(0), **draw)[0] for p in (found, pipeline))
    assert (ours == theirs).all()
    assert load_config(file, "vae")["scaling_factor"] == pipeline.vae.config.scaling_factor


@pytest.mark.parametrize(
    ("version", "recipe"), [("v1", load_recipe("small")), ("xl", load_recipe("ssd-1b"))], ids=named
)
def test_the_way_back_writes_a_folder_with_the_recipe(written: Written, recipe: Recipe, tmp_path: Path) -> None:
    file = written.file
    export(ExportOptions(str(file), "diffusers", str(tmp_path / "student")))
    check_folder(tmp_path / "student")
    assert_equal(*(original_tensors(load_pipeline(model), torch.float32) for model in (tmp_path / "student", file)))
    assert read_recipe(tmp_path / "student") == recipe


@pytest.mark.parametrize(("version", "recipe"), [*WHOLE, *PUBLISHED], ids=named)
def test_diffusers_own_converters_read_the_names(pipeline: DiffusionPipeline) -> None:
    if not isinstance(pipeline.unet.config.layers_per_block, int):
        return  # they multiply by it
    tensors = original_tensors(pipeline, torch.float32)
    unet = single_file_utils.convert_ldm_unet_checkpoint(dict(tensors), dict(pipeline.unet.config))
    vae = single_file_utils.convert_ldm_vae_checkpoint(dict(tensors), dict(pipeline.vae.config))
    found = {"unet": unet, "vae": vae}
    for name, prefix in texts(pipeline).items():
        encoder = getattr(pipeline, name)
        found[name] = (
            single_file_utils.convert_open_clip_checkpoint(encoder, dict(tensors), prefix)
            if prefix
            else single_file_utils.convert_ldm_clip_checkpoint(dict(tensors))
        )
    for part, weights in found.items():
        wanted = getattr(pipeline, part).state_dict()
        assert_equal(*({k.removeprefix("text_model."): v for k, v in each.items()} for each in (weights, wanted)))


def texts(pipeline: DiffusionPipeline) -> dict[str, str]:
    """What the names of OpenCLIP's text encoders begin with, and nothing for those of CLIP."""
    if hasattr(pipeline, "text_encoder_2"):
        return {"text_encoder": "", "text_encoder_2": "conditioner.embedders.1.model."}
    return {"text_encoder": "cond_stage_model.model." if pipeline.unet.config.use_linear_projection else ""}


@pytest.mark.parametrize(
    ("version", "recipe"), shown([(v, r) for v, r in [*WHOLE, *PUBLISHED, ("xl", load_recipe("comfy"))] if v == "xl"])
)
def test_stock_diffusers_reads_a_file_of_sdxl_beside_its_folder(written: Written) -> None:
    found = StableDiffusionXLPipeline.from_single_file(
        str(written.file), config=str(written.folder), local_files_only=True
    )
    for part in family_of_pipeline(written.pipeline).networks:
        assert_equal(getattr(found, part).state_dict(), getattr(written.pipeline, part).state_dict())


def full_config(version: str, recipe: Recipe | None) -> Config:
    return derive(recipe, TEACHERS[version]).student_config if recipe else TEACHERS[version]


@cache
def full_size(version: str, recipe: Recipe | None = None) -> dict[str, tuple[int, ...]]:
    """Names and shapes of U-Net and VAE in a file."""
    config = full_config(version, recipe)
    family, shapes = family_of(config), {}
    vae = {
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
    }
    for name, own in (("unet", config), ("vae", vae)):
        weights = family.outline(own, name).state_dict()
        places = family.layout(config).parts[name].places(weights)
        shapes |= {place.name: tuple(weights[key].shape) for key, place in places.items()}
    return shapes


@pytest.mark.parametrize(("version", "recipe"), [*WHOLE, *PUBLISHED, ("xl", load_recipe("comfy"))], ids=named)
def test_configs_at_full_size_follow_from_names_and_shapes(version: str, recipe: Recipe | None) -> None:
    config, shapes = full_config(version, recipe), full_size(version, recipe)
    family = family_of(config)
    parts = family.layout(config).parts
    found = parts["unet"].config(shapes)
    assert difference(config, found) is None
    known = ("attention_head_dim", "block_out_channels", "cross_attention_dim", "down_block_types", "up_block_types")
    known += ("in_channels", "out_channels", "sample_size", "use_linear_projection")
    known += ("addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim")
    assert {key: found.get(key) for key in known} == {
        key: ({"use_linear_projection": False} | config).get(key) for key in known
    }
    assert family.is_whole(found) == (recipe is None)
    assert parts["vae"].config(shapes)["block_out_channels"] == [128, 256, 512, 512]


@pytest.mark.parametrize("recipe", [None, *(r for v, r in PUBLISHED if v == "xl"), load_recipe("comfy")], ids=named)
def test_comfyui_finds_the_way_down_that_describe_counts_on(recipe: Recipe | None) -> None:
    of_config = readers(full_config("xl", recipe))
    told = next(reader for reader in of_config if (reader.program, reader.file) == ("ComfyUI", "single file"))
    assert told.answer == ("yes" if taken_for(full_size("xl", recipe)) else "no")


@pytest.mark.parametrize("version", TEACHERS)
def test_a_middle_block_of_one_resnet_is_told_by_its_names(version: str) -> None:
    config = full_config(version, RESNET)
    family = family_of(config)
    found = family.layout(config).parts["unet"].config(full_size(version, RESNET))
    assert found["mid_block_type"] == "UNetMidBlock2D"
    assert not family.is_whole(found)


def test_names_of_whole_version_1_are_the_published_ones() -> None:
    names = {name for name in full_size("v1") if name.startswith("model.diffusion_model.")}
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


def test_names_of_whole_sdxl_are_the_published_ones(xl_teacher: StableDiffusionXLPipeline) -> None:
    names = {name for name in full_size("xl") if name.startswith("model.diffusion_model.")}
    assert len(names) == 1680  # as in sd_xl_base.yaml's UNetModel
    assert {
        "model.diffusion_model.label_emb.0.0.weight",
        "model.diffusion_model.label_emb.0.2.bias",
        "model.diffusion_model.input_blocks.8.1.transformer_blocks.9.attn2.to_k.weight",
        "model.diffusion_model.middle_block.1.transformer_blocks.9.norm3.bias",
        "model.diffusion_model.output_blocks.2.2.conv.weight",
        "model.diffusion_model.output_blocks.5.2.conv.bias",
        "model.diffusion_model.output_blocks.8.0.skip_connection.weight",
    } <= names
    tensors = original_tensors(xl_teacher, torch.float32)
    assert {
        "conditioner.embedders.0.transformer.text_model.encoder.layers.1.self_attn.q_proj.weight",
        "conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_bias",
        "conditioner.embedders.1.model.positional_embedding",
    } <= tensors.keys()
    projection = xl_teacher.text_encoder_2.text_projection.weight
    assert torch.equal(tensors["conditioner.embedders.1.model.text_projection"], projection.T)


@pytest.mark.parametrize(("version", "recipe"), [(v, load_recipe(r)) for v, r in SMALL.items()], ids=named)
def test_without_its_header_the_structure_is_still_found(written: Written, tmp_path: Path) -> None:
    pipeline, bare = written.pipeline, tmp_path / "bare.safetensors"
    save_file(load_file(written.file), bare)
    found = read_contents(bare)
    assert not found.is_stock
    assert found.family is family_of_pipeline(pipeline)
    for name in found.family.encoders:
        config = getattr(pipeline, name).config
        assert {k: found.configs[name][k] for k in TEXT} == {k: getattr(config, k) for k in TEXT}
    rebuilt = found.family.outline(found.configs["unet"]).state_dict()
    assert {k: v.shape for k, v in rebuilt.items()} == {k: v.shape for k, v in pipeline.unet.state_dict().items()}
    with pytest.raises(InputError, match="holds no vocabulary"):
        load_pipeline(bare)
    with pytest.raises(InputError, match="no recipe in its header"):
        read_recipe(bare)


@pytest.mark.parametrize("version", TEACHERS)
def test_a_whole_model_without_a_header_is_left_to_diffusers(
    request: pytest.FixtureRequest, version: str, tmp_path: Path
) -> None:
    write_single_file(request.getfixturevalue(f"{version}_teacher"), tmp_path / "whole.safetensors")
    save_file(load_file(tmp_path / "whole.safetensors"), tmp_path / "bare.safetensors")
    assert read_contents(tmp_path / "bare.safetensors").is_stock
    assert not read_contents(tmp_path / "whole.safetensors").is_stock


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
