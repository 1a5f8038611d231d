"""A student that is copied from files is the one that loading gives; what files do not show to be whole is loaded."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from bksdm.families import family_of_pipeline
from bksdm.families.recipe import load_recipe
from bksdm.models.configs import read_json
from bksdm.models.pipelines import save_pipeline
from bksdm.options.pruning import PruneOptions
from bksdm.pruning.copied import Copy
from bksdm.pruning.inherit import prune_loaded
from bksdm.pruning.run import _settings, prune
from tiny_models import age, save, write_json


def as_it_is(folder: Path) -> Path:
    return folder


def without_older_files(folder: Path) -> Path:
    """As transformers 5 saves a tokenizer and a text encoder."""
    for name in ("vocab.json", "merges.txt"):
        (folder / "tokenizer" / name).unlink()
    weights = folder / "text_encoder" / "model.safetensors"
    save(weights, {name.removeprefix("text_model."): tensor for name, tensor in load_file(weights).items()})
    return folder


def in_half(folder: Path) -> Path:
    for file in folder.rglob("*.safetensors"):
        save(file, {name: tensor.half() for name, tensor in load_file(file).items()})
    return folder


def contents(folder: Path) -> dict[Path, bytes]:
    """All files but the one that says when they were made."""
    files = {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    return {name: content for name, content in files.items() if name.name != "provenance.json"}


@pytest.mark.parametrize(
    ("version", "recipe", "change"),
    [
        ("v1", "tiny", as_it_is),
        ("v1", "base", without_older_files),
        ("v1", "small", lambda folder: in_half(age(folder))),
        ("xl", "vega", as_it_is),
    ],
    ids=["v1", "as-saved-today", "of-2022", "xl"],
)
def test_every_byte_is_that_of_a_student_of_the_loaded_teacher(
    version_teacher: DiffusionPipeline, recipe: str, change: Callable[[Path], Path], tmp_path: Path
) -> None:
    save_pipeline(version_teacher, tmp_path / "teacher")
    options = PruneOptions(str(change(tmp_path / "teacher")), recipe, str(tmp_path / "student"))
    made_of = load_recipe(recipe)
    assert Copy.of(tmp_path / "teacher", options.teacher, made_of)
    copied = prune(options)
    (tmp_path / "student").rename(tmp_path / "copied")
    assert prune_loaded(options, made_of, None, _settings(options, made_of, None)) == copied
    assert contents(tmp_path / "copied") == contents(tmp_path / "student")


@pytest.mark.parametrize("version", ["v1", "v2", "xl"])
def test_configs_tell_the_shapes_of_all_networks(
    request: pytest.FixtureRequest, version: str, version_teacher: DiffusionPipeline
) -> None:
    family, folder = family_of_pipeline(version_teacher), request.getfixturevalue(f"{version}_folder")
    for name in family.networks:
        tensors = getattr(version_teacher, name).state_dict()
        found = {key.removeprefix("text_model."): tuple(tensor.shape) for key, tensor in tensors.items()}
        assert family.shapes_of(read_json(folder / name / "config.json"), name) == found


def in_one_piece(folder: Path) -> Path:
    """As savers number a file that could have been several."""
    for part, stem in (
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
        ("unet", "diffusion_pytorch_model"),
    ):
        file, piece = folder / part / f"{stem}.safetensors", f"{stem}-00001-of-00001.safetensors"
        write_json(file.with_name(f"{file.name}.index.json"), {"weight_map": dict.fromkeys(load_file(file), piece)})
        file.rename(file.with_name(piece))
    return folder


def beside_a_piece_of_before(folder: Path) -> Path:
    """The index does not name it."""
    file = in_one_piece(folder) / "unet" / "diffusion_pytorch_model-00001-of-00001.safetensors"
    zeros = {name: torch.zeros_like(tensor) for name, tensor in load_file(file).items()}
    save(file.with_name("diffusion_pytorch_model-00001-of-00099.safetensors"), zeros)
    return folder


@pytest.mark.parametrize("change", [in_one_piece, beside_a_piece_of_before])
def test_pieces_are_those_that_the_index_names(folder: Path, change: Callable[[Path], Path], tmp_path: Path) -> None:
    prune(PruneOptions(str(folder), "small", str(tmp_path / "plain")))
    prune(PruneOptions(str(change(folder)), "small", str(tmp_path / "student")))
    plain, student = (DiffusionPipeline.from_pretrained(tmp_path / name) for name in ("plain", "student"))
    for part in ("unet", "vae", "text_encoder"):
        wanted = getattr(plain, part).state_dict()
        assert all(torch.equal(value, wanted[key]) for key, value in getattr(student, part).state_dict().items())


# What is odd


def without_a_tensor(folder: Path) -> None:
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["decoder.conv_out.bias"]
    save(file, tensors)


def of_another_shape(folder: Path) -> None:
    file = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    save(file, tensors | {"text_model.final_layer_norm.bias": torch.zeros(3)})


def in_eight_bits(folder: Path) -> None:
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save(file, {name: tensor.to(torch.float8_e4m3fn) for name, tensor in load_file(file).items()})


def saying(part: str, file: str, **more: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / part / file
        write_json(path, json.loads(path.read_text()) | more)

    return change


ODD = {
    "a tensor is lacking": without_a_tensor,
    "a tensor has another shape": of_another_shape,
    "a number format that is not read": in_eight_bits,
    "a U-Net of tomorrow": saying("unet", "config.json", attention_of_tomorrow=True),
    "a VAE of tomorrow": saying("vae", "config.json", blocks_of_tomorrow=True),
    "a text encoder that says too little": saying("text_encoder", "config.json", hidden_size=None),
    "a text encoder of another width": saying("text_encoder", "config.json", hidden_size=64),
    "a scheduler that is not known": saying("scheduler", "scheduler_config.json", _class_name="NewScheduler"),
    "a part that is not known": saying(".", "model_index.json", adapter=["diffusers", "T2IAdapter"], unet=None),
    "words of several vectors": saying(
        "tokenizer", "tokenizer_config.json", added_tokens_decoder={"1": {"content": "<x>"}, "2": {"content": "<x>_1"}}
    ),
    "a tokenizer of another kind": saying("tokenizer", "tokenizer_config.json", tokenizer_class="GemmaTokenizer"),
}


@pytest.mark.parametrize("odd", ODD)
def test_what_is_odd_is_left_to_loading(folder: Path, odd: str) -> None:
    (folder / "adapter").mkdir()
    assert Copy.of(folder, str(folder), load_recipe("small"))
    ODD[odd](folder)
    assert Copy.of(folder, str(folder), load_recipe("small")) is None
