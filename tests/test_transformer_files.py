"""Transformers as single files with the names of their authors' checkpoints."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel
from diffusers.loaders.single_file_utils import (
    convert_flux2_transformer_checkpoint_to_diffusers,
    convert_flux_transformer_checkpoint_to_diffusers,
    convert_z_image_transformer_checkpoint_to_diffusers,
)
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from bksdm.families import derive, family_of
from bksdm.families.recipe import load_recipe
from verbs import Run, done_here

pytest_plugins = ["verbs_fixtures", "flow_fixtures"]

BLOCKS = {"flux": ("double_blocks", "single_blocks"), "klein": ("double_blocks", "single_blocks"), "z": ("layers",)}


@pytest.fixture(scope="module")
def student(flow_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("student") / "half"
    done_here("prune", flow_folder, "--recipe", "half", "--out", out)
    return out


@pytest.fixture(scope="module")
def file(student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("file") / "half.safetensors"
    done_here("export", student, "--to", "transformer", "--out", out)
    return out


def of_folder(student: Path) -> dict[str, Tensor]:
    return load_file(student / "transformer" / "diffusion_pytorch_model.safetensors")


def test_diffusers_converters_give_back_every_tensor(flow_kind: str, student: Path, file: Path) -> None:
    if flow_kind == "flux":
        pytest.skip("diffusers' converter has the width of the model as it was published; see below")
    convert: Any = {
        "klein": convert_flux2_transformer_checkpoint_to_diffusers,
        "z": convert_z_image_transformer_checkpoint_to_diffusers,
    }[flow_kind]
    got, wanted = convert(load_file(file)), of_folder(student)
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_the_tensors_of_flux_are_those_that_its_converter_parts(flow_kind: str, student: Path, file: Path) -> None:
    if flow_kind != "flux":
        pytest.skip("of Flux.1")
    got, wanted = load_file(file), of_folder(student)
    joined = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    for kind in ("weight", "bias"):
        one = torch.cat([wanted[f"single_transformer_blocks.1.{name}.{kind}"] for name in joined])
        assert torch.equal(got[f"single_blocks.1.linear1.{kind}"], one)
        two = torch.cat([wanted[f"transformer_blocks.1.attn.add_{name}_proj.{kind}"] for name in "qkv"])
        assert torch.equal(got[f"double_blocks.1.txt_attn.qkv.{kind}"], two)
        shift, scale = got[f"final_layer.adaLN_modulation.1.{kind}"].chunk(2)
        assert torch.equal(wanted[f"norm_out.linear.{kind}"], torch.cat([scale, shift]))
    assert torch.equal(
        got["double_blocks.0.img_attn.norm.query_norm.scale"], wanted["transformer_blocks.0.attn.norm_q.weight"]
    )


def test_names_and_shapes_of_flux_at_full_size_are_those_that_diffusers_reads() -> None:
    with torch.device("meta"):
        teacher = FluxTransformer2DModel(guidance_embeds=True)
        config = dict(teacher.config) | {"_class_name": "FluxTransformer2DModel"}
        family = family_of(config)
        network = family.build(derive(load_recipe("flux-mini"), config).student_config)
        wanted = network.state_dict()
        made = {name: joined.made(wanted) for name, joined in family.original_tensors(wanted.keys()).items()}
        got = convert_flux_transformer_checkpoint_to_diffusers(made)
    assert {name: tensor.shape for name, tensor in got.items()} == {name: t.shape for name, t in wanted.items()}


def test_blocks_are_counted_without_gaps(flow_kind: str, file: Path, student: Path) -> None:
    """As ComfyUI and stable-diffusion.cpp count them: the highest number and one."""
    names, config = load_file(file).keys(), DiffusionPipeline.from_pretrained(student).transformer.config
    depths = list(family_of({**config, "_class_name": config["_class_name"]}).depths(config).values())
    for stack, depth in zip(BLOCKS[flow_kind], depths, strict=True):
        numbers = {int(name.split(".")[1]) for name in names if name.startswith(f"{stack}.")}
        assert numbers == set(range(depth))


def test_the_number_format_stays_or_is_chosen(student: Path, file: Path, tmp_path: Path) -> None:
    done_here("export", student, "--to", "transformer", "--precision", "bf16", "--out", tmp_path / "half.safetensors")
    with safe_open(file, framework="pt") as kept, safe_open(tmp_path / "half.safetensors", framework="pt") as half:
        assert {kept.get_slice(name).get_dtype() for name in kept.keys()} == {"F32"}  # noqa: SIM118
        assert {half.get_slice(name).get_dtype() for name in half.keys()} == {"BF16"}  # noqa: SIM118


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--to ldm --out O.safetensors", "of the transformer alone; export to onnx or openvino or transformer"),
        ("--to coreml --out O", "Apple's Swift runtime, for which Core ML is written here, draws none of these models"),
        ("--to gguf --out O.gguf", "makes GGUF of these models itself, from the file that --to transformer writes"),
        ("--to executorch --out O", "its programs are written here for one text encoder and a U-Net; export to"),
        ("--to tensorrt --out O", "its scripts are written here for one text encoder and a U-Net; export to"),
        ("--to taesd --out O.safetensors", "no small decoder is trained here for these models; export to"),
        ("--to openvino --precision w8a8 --out O", "w8a8 is for U-Nets, and this is a transformer"),
        ("--to openvino --decoder emoji --out O", "for which there is no export --decoder yet"),
        ("--to onnx --scheduler DDIMScheduler --out O", "unknown scheduler 'DDIMScheduler'; give one of"),
        ("--to transformer --out O", "is one file; give a name that ends in .safetensors"),
        ("--to transformer --out O.safetensors --precision int8", "and transformer has keep, bf16, fp16, fp32"),
        ("--to transformer --out O.safetensors --scheduler DDIMScheduler", "leave --scheduler out"),
    ],
)
def test_what_cannot_be_is_refused(run: Run, student: Path, tmp_path: Path, words: str, said: str) -> None:
    outcome = run("export", student, *[word.replace("O", str(tmp_path / "o"), 1) for word in words.split()])
    assert outcome.code == 2
    assert said in outcome.err
    assert not list(tmp_path.iterdir())


def test_a_unet_is_no_transformer(run: Run, v1_folder: Path, tmp_path: Path) -> None:
    outcome = run("export", v1_folder, "--to", "transformer", "--out", tmp_path / "o.safetensors")
    assert outcome.code == 2
    assert "not for Stable Diffusion 1.x or 2.x yet; export to onnx or openvino or" in outcome.err
