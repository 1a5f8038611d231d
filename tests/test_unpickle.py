"""Pickled weights: nothing opens them but `export --unpickle`, which reads tensors and runs nothing."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import ControlNetModel
from safetensors.torch import load_file, save_file

from bksdm.common.errors import InputError
from bksdm.export.ldm import original_tensors
from bksdm.export.run import export
from bksdm.models.adapters.controlnet import load_controlnet
from bksdm.models.folders import check_folder
from bksdm.models.pipelines import load_pipeline
from bksdm.options.export import ExportOptions
from bksdm.pruning.told import RECIPE_FILE
from hub_cache import in_hub_cache
from tiny_models import CONTEXT, age, write_json
from verbs import Run

pytest_plugins = ["verbs_fixtures"]

UNET = Path("unet", "diffusion_pytorch_model.safetensors")
MEND = "copy it again, or ask who made it for safetensors"


class Harmful:
    """What its pickle does when it is opened."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.mark,)


def copied(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))


def pickle_weights(folder: Path) -> Path:
    """Make a folder one of 2023, whose weights are pickles."""
    for file in sorted(folder.rglob("*.safetensors")):
        name = "pytorch_model.bin" if file.name == "model.safetensors" else "diffusion_pytorch_model.bin"
        torch.save(load_file(file), file.with_name(name))
        file.unlink()
    return folder


@pytest.fixture
def folder(exported_model: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return copied(exported_model, tmp_path / "teacher")


@pytest.fixture
def old(folder: Path, tmp_path: Path) -> Path:
    """What `folder` holds from now on, a whole pipeline with a safety checker, in pickles."""
    return pickle_weights(copied(age(folder), tmp_path / "old"))


def test_a_folder_becomes_one_of_safetensors(run: Run, done: Run, old: Path, folder: Path, tmp_path: Path) -> None:
    papers = ("README.md", "LICENSE", "tokenizer/extra.model")
    for name in papers:
        (old / name).write_text(name)
    (old / "unet" / "diffusion_flax_model.msgpack").write_bytes(b"weights of another library")
    refused = run("generate", old, "--prompt", "red", "--out", tmp_path / "drawn")
    assert refused.code == 2
    command = refused.said[0].partition("by bksdm ")[2].replace("NEW", str(tmp_path / "new"))
    done(*command.split())  # what the refusal says is what to do
    check_folder(tmp_path / "new")
    found, wanted = load_pipeline(tmp_path / "new"), load_pipeline(folder)
    for name in ("unet", "vae", "text_encoder", "safety_checker"):
        ours, theirs = (pipeline.components[name].state_dict() for pipeline in (found, wanted))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    texts = ("model_index.json", "scheduler/scheduler_config.json", "tokenizer/merges.txt", "vae/config.json")
    for file in (*texts, *papers):
        assert (tmp_path / "new" / file).read_bytes() == (old / file).read_bytes()
    assert not [file for file in (tmp_path / "new").rglob("*") if file.suffix in (".bin", ".msgpack")]


def converted(model: Path | str, out: Path, **more: object) -> Path:
    to = "ldm" if out.suffix else "diffusers"
    export(ExportOptions(str(model), **{"to": to, "out": str(out), "unpickle": True} | more))
    return out


def test_a_model_on_the_hub_is_converted_too(old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_hub_cache(old, "someone/old", tmp_path / "cache", monkeypatch)
    with pytest.raises(InputError) as refused:
        load_pipeline("someone/old")
    assert str(refused.value) == (
        "model someone/old has no safetensors for some of its parts; "
        "convert it, once, by bksdm export someone/old --to diffusers --unpickle --out NEW"
    )
    assert load_pipeline(converted("someone/old", tmp_path / "new")).unet.dtype == torch.float32


def test_what_is_safetensors_already_is_copied(old: Path, exported_student: Path, tmp_path: Path) -> None:
    student = copied(exported_student, tmp_path / "student")
    (student / UNET).with_suffix(".bin").write_bytes((old / UNET).with_suffix(".bin").read_bytes())
    new = converted(student, tmp_path / "new")
    assert (new / UNET).read_bytes() == (student / UNET).read_bytes(), "a pickle beside it is not looked at"
    assert (new / RECIPE_FILE).read_bytes() == (student / RECIPE_FILE).read_bytes()


def test_a_variant_in_safetensors_does_not_stand_in_for_the_whole_pickle(old: Path, tmp_path: Path) -> None:
    whole = torch.load(old / UNET.with_suffix(".bin"), weights_only=True)
    save_file({name: t.half() for name, t in whole.items()}, old / UNET.with_suffix(".fp16.safetensors"))
    found = load_file(converted(old, tmp_path / "new") / UNET)
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())


def test_pickles_in_pieces_and_of_a_variant(old: Path, tmp_path: Path) -> None:
    whole = torch.load(old / UNET.with_suffix(".bin"), weights_only=True)
    (old / UNET.with_suffix(".bin")).unlink()
    names = sorted(whole)
    for number, part in enumerate((names[:100], names[100:])):
        file = old / "unet" / f"diffusion_pytorch_model.fp16-0000{number + 1}-of-00002.bin"
        torch.save({name: whole[name].half() for name in part}, file)
    found = load_pipeline(converted(old, tmp_path / "new")).unet.state_dict()
    assert all(torch.equal(found[name], tensor.half().float()) for name, tensor in whole.items())


def test_a_checkpoint_in_one_file(v1_folder: Path, tmp_path: Path) -> None:
    pipeline = load_pipeline(v1_folder)
    tensors = original_tensors(pipeline, torch.float32)
    torch.save({"state_dict": tensors, "global_step": 840000, "epoch": 1}, tmp_path / "sd.ckpt")
    found = load_file(converted(tmp_path / "sd.ckpt", tmp_path / "sd.safetensors"))
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    modes = {file.stat().st_mode for file in tmp_path.iterdir()}
    assert len(modes) == 1, "whoever may read the one may read the other"


def test_a_controlnet_of_others(tmp_path: Path) -> None:
    small = {"block_out_channels": (32, 64, 64, 64), "cross_attention_dim": CONTEXT, "norm_num_groups": 16}
    ControlNetModel(**small, conditioning_embedding_out_channels=(8, 16)).save_pretrained(tmp_path / "canny")
    twin = load_controlnet(tmp_path / "canny").state_dict()
    with pytest.raises(InputError, match=r"export .*canny --to diffusers --unpickle"):
        load_controlnet(pickle_weights(tmp_path / "canny"))
    found = load_controlnet(converted(tmp_path / "canny", tmp_path / "new")).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in twin.items())


# What is refused


def test_code_in_a_pickle_is_not_run(old: Path, tmp_path: Path) -> None:
    file, mark = old / UNET.with_suffix(".bin"), tmp_path / "it ran"
    torch.save({"conv_in.weight": Harmful(mark)}, file)
    with pytest.raises(InputError) as refused:
        converted(old, tmp_path / "new")
    assert str(refused.value) == f"{file} is damaged, or holds more than tensors, and is not read; {MEND}"
    file.write_bytes(pickle.dumps(Harmful(mark), protocol=2))
    with pytest.raises(InputError, match="and is not read"):
        converted(old, tmp_path / "new")
    assert not mark.exists()
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("content", "what"),
    [({}, "no weights"), ([1.0], "no weights"), ({"a": torch.zeros(1), "step": 3}, "'step', no tensor")],
)
def test_a_pickle_of_other_things(tmp_path: Path, content: object, what: str) -> None:
    torch.save(content, tmp_path / "sd.ckpt")
    with pytest.raises(InputError) as refused:
        converted(tmp_path / "sd.ckpt", tmp_path / "sd.safetensors")
    assert str(refused.value) == f"{tmp_path / 'sd.ckpt'} holds {what}; {MEND}"
    assert [file.name for file in tmp_path.iterdir()] == ["sd.ckpt"]


def test_a_checkpoint_of_something_else(tmp_path: Path) -> None:
    torch.save({"lstm.weight": torch.zeros(2, 2)}, tmp_path / "other.ckpt")
    with pytest.raises(InputError, match="is not a whole Stable Diffusion checkpoint"):
        converted(tmp_path / "other.ckpt", tmp_path / "other.safetensors")
    assert not (tmp_path / "other.safetensors").exists()


def test_a_pickle_that_is_cut_short(old: Path, tmp_path: Path) -> None:
    file = old / UNET.with_suffix(".bin")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"diffusion_pytorch_model\.bin is damaged"):
        converted(old, tmp_path / "new")


def test_a_pipeline_that_is_incomplete_afterwards(old: Path, tmp_path: Path) -> None:
    shutil.rmtree(old / "vae")
    with pytest.raises(InputError, match="has no folder vae, which its"):
        converted(old, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["../unet", "/etc", "unet/../../x"])
def test_parts_lie_in_the_folder(old: Path, tmp_path: Path, name: str) -> None:
    index = json.loads((old / "model_index.json").read_text())
    write_json(old / "model_index.json", index | {name: ["diffusers", "AutoencoderKL"]})
    for action in (lambda: load_pipeline(old), lambda: converted(old, tmp_path / "new")):
        with pytest.raises(InputError, match=r"names a part .*, which is no name of a folder"):
            action()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"to": "onnx"}, "to is onnx; --unpickle makes a folder --to diffusers, and of a .ckpt a file --to ldm"),
        ({"to": "ldm"}, "to is ldm; --unpickle makes"),
        ({"precision": "fp16"}, "precision is fp16, and --unpickle changes none; export once more for that"),
    ],
)
def test_options_that_do_not_go_with_it(old: Path, tmp_path: Path, more: dict, message: str) -> None:
    with pytest.raises(InputError) as refused:
        converted(old, tmp_path / "new", **more)
    assert message in str(refused.value)
