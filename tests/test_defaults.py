"""What a model draws best with lies in its folder, is every verb's default, and goes with what is made from it."""

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from PIL import Image

from bksdm.common.assets import asset
from bksdm.common.errors import InputError
from bksdm.models.drawing import drawing, drawing_defaults
from bksdm.models.pipelines import load_pipeline
from bksdm.runtime.__main__ import main
from bksdm.runtime.defaults import SAMPLING_FILE, Defaults
from bksdm.runtime.folder import open_folder
from verbs import Run, told

pytest_plugins = ["verbs_fixtures"]

OWN = {"num_inference_steps": 3, "guidance_scale": 2.5}


def saying(folder: Path, **values: object) -> Path:
    """A model's folder that says what it draws best with."""
    (folder / SAMPLING_FILE).write_text(json.dumps(OWN | values))
    return folder


@pytest.fixture(scope="module")
def model(exported_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher with two stages, which draws best in three steps with guidance 2.5. Shared: not to be changed."""
    return saying(Path(shutil.copytree(exported_model, tmp_path_factory.mktemp("own") / "teacher")))


# What a model says


def test_the_embedded_model_wants_a_guidance_of_its_own() -> None:
    assert drawing("emoji") == Defaults(25, 2.5)


def test_a_model_that_does_not_tell_is_drawn_as_usual(v1_folder: Path) -> None:
    assert drawing_defaults(v1_folder) is None
    assert drawing(v1_folder) == Defaults(25, 7.5)


def test_what_is_asked_for_comes_first(model: Path) -> None:
    assert drawing(model) == Defaults(3, 2.5)
    assert drawing(model, steps=7) == Defaults(7, 2.5)
    assert drawing(model, guidance=1.0) == Defaults(3, 1.0)


def test_a_file_may_tell_half(folder: Path) -> None:
    (folder / SAMPLING_FILE).write_text('{"guidance_scale": 4}')
    assert drawing(folder) == Defaults(25, 4.0)


def test_the_file_is_what_a_pipeline_of_diffusers_is_called_with(done: Run, model: Path, tmp_path: Path) -> None:
    values = json.loads((model / SAMPLING_FILE).read_text())
    assert values.keys() <= inspect.signature(StableDiffusionPipeline.__call__).parameters.keys()
    assert json.loads(asset("emoji", "model", SAMPLING_FILE).read_text()).keys() == values.keys()
    theirs = load_pipeline(model)("red", generator=torch.Generator().manual_seed(0), **values).images[0]
    done("generate", model, "--prompt", "red", "--out", tmp_path / "o")
    with Image.open(tmp_path / "o" / "00000.png") as ours:
        assert np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).max() <= 1


def test_diffusers_loads_a_folder_with_it(model: Path) -> None:
    assert StableDiffusionPipeline.from_pretrained(model, local_files_only=True).unet is not None


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"guidance_scale": 2.5, "clip_skip": 1}', "has clip_skip, which is not known here; it may have num_"),
        ('{"sigmas": [1.0, 0.5]}', "has sigmas, and models of Stable Diffusion 1.x or 2.x draw by timesteps; remove"),
        ('{"num_inference_steps": 3, "sigmas": [1.0, 0.5]}', "has num_inference_steps 3 and 2 sigmas; write one"),
        ('{"sigmas": [0.5, 1.0]}', "has sigmas [0.5, 1.0]; write them falling, one for each step"),
        ('{"sigmas": []}', "has sigmas []; write them falling"),
        ('{"sigmas": [1.0, 0.0]}', "has sigmas [1.0, 0.0]; write a list of numbers above 0, at most 1"),
        ('{"sigmas": 1.0}', "has sigmas 1.0; write a list of numbers"),
        ('{"num_inference_steps": 0}', "has num_inference_steps 0; write a whole number of at least 1"),
        ('{"num_inference_steps": 2.5}', "has num_inference_steps 2.5; write a whole number of at least 1"),
        ('{"guidance_scale": "high"}', "has guidance_scale 'high'; write a number from 0"),
        ('{"guidance_scale": NaN}', "has guidance_scale nan; write a number from 0"),
        ("[1]", "holds no object; mend or remove it"),
        ("{", "cannot be read"),
    ],
)
def test_a_file_that_means_nothing_is_refused(run: Run, folder: Path, tmp_path: Path, content: str, said: str) -> None:
    (folder / SAMPLING_FILE).write_text(content)
    outcome = run("generate", folder, "--prompt", "red", "--out", tmp_path / "o")
    assert outcome.code == 2
    assert len(outcome.said) == 1
    assert str(folder / SAMPLING_FILE) in outcome.said[0]
    assert said in outcome.said[0]
    assert not (tmp_path / "o").exists()


def test_one_on_the_hub_is_asked_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As far as the Hub's cache goes, in which diffusers' own download leaves the file out."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    kept = tmp_path / "models--you--tiny"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text("abc")
    (kept / "snapshots" / "abc").mkdir(parents=True)
    saying(kept / "snapshots" / "abc")
    assert drawing("you/tiny") == Defaults(3, 2.5)
    assert not capsys.readouterr().err
    assert drawing("you/other") == Defaults(25, 7.5)
    assert (
        "whether you/other has a sampling.json could not be asked (LocalEntryNotFoundError); it draws in 25 steps"
        in (capsys.readouterr().err)
    )


# Who takes it up


def test_generate_draws_with_it_and_the_run_and_the_picture_say_so(done: Run, model: Path, tmp_path: Path) -> None:
    done("generate", model, "--prompt", "red", "--out", tmp_path / "o")
    config = yaml.safe_load((tmp_path / "o" / "config.yaml").read_text())
    made = told(tmp_path / "o" / "00000.png")
    assert [(values["steps"], values["guidance"]) for values in (config, made)] == [(3, 2.5)] * 2


def test_evaluate_draws_with_each_models_own(
    done: Run, model: Path, folder: Path, pictures: Path, tmp_path: Path
) -> None:
    saying(folder, num_inference_steps=1, guidance_scale=1)
    words = ["--reference", pictures, "--encoder", "emoji", "--scores", "clip_score", "--limit", 2, "--resamples", 2]
    both = [f"one={model}", f"other={folder}"]
    outcome = done("evaluate", *both, *words, "--latency", 1, "--out", tmp_path / "o")
    line = "each model draws as it draws best (one: steps 3, guidance 2.5; other: steps 1, guidance 1)"
    assert f"{line}; --steps and --guidance hold for all" in outcome.said
    assert outcome.out.splitlines()[0].split()[:3] == ["model", "steps", "guidance"]
    models = json.loads((tmp_path / "o" / "scores.json").read_text())["models"]
    assert [(one["steps"], one["guidance"]) for one in models.values()] == [(3, 2.5), (1, 1.0)]
    for name, steps in (("one", 3), ("other", 1)):
        own = tmp_path / "o" / "models" / name
        assert yaml.safe_load((own / "config.yaml").read_text())["steps"] == steps
        assert told(own / "pictures" / "00000.png")["steps"] == steps
    alike = done("evaluate", *both, *words, "--latency", 0, "--steps", 1, "--guidance", 1, "--out", tmp_path / "p")
    assert not [line for line in alike.said if line.startswith("each model")]
    assert alike.out.splitlines()[0].split()[:2] == ["model", "CLIP"]


def test_sensitivity_draws_with_the_teachers_own(done: Run, model: Path, pictures: Path, tmp_path: Path) -> None:
    done("sensitivity", model, "--data", pictures, "--scores", "output", "--pictures", 2, "--out", tmp_path / "o")
    config = yaml.safe_load((tmp_path / "o" / "config.yaml").read_text())
    assert (config["steps"], config["guidance"]) == (3, 2.5)


# Who inherits it

Made = Callable[[Run, Path, Path, Path], Path]


def pruned(done: Run, model: Path, pictures: Path, tmp: Path) -> Path:
    done("prune", model, "--recipe", "small", "--out", tmp / "pruned")
    return tmp / "pruned"


def distilled(done: Run, model: Path, pictures: Path, tmp: Path) -> Path:
    words = ["--student", pruned(done, model, pictures, tmp), "--data", pictures, "--steps", 1, "--batch_size", 1]
    done("distill", model, *words, "--accumulation", 1, "--sample_every", 0, "--out", tmp / "run")
    assert yaml.safe_load((tmp / "run" / "config.yaml").read_text())["sample_guidance"] == 2.5
    return tmp / "run" / "student"


def personalized(done: Run, model: Path, pictures: Path, tmp: Path) -> Path:
    words = ["--images", pictures, "--prompt", "sks car", "--class_images", 1, "--views", 1, "--steps", 1]
    done("personalize", model, *words, "--out", tmp / "run")
    assert told(tmp / "run" / "class_images" / "00000.png")["guidance"] == 2.5
    return tmp / "run" / "model"


def in_one_file(done: Run, model: Path, pictures: Path, tmp: Path) -> Path:
    done("export", model, "--to", "ldm", "--out", tmp / "one.safetensors")
    return tmp / "one.safetensors"


def back_in_a_folder(done: Run, model: Path, pictures: Path, tmp: Path) -> Path:
    done("export", in_one_file(done, model, pictures, tmp), "--to", "diffusers", "--out", tmp / "back")
    return tmp / "back"


@pytest.mark.parametrize("make", [pruned, distilled, personalized, in_one_file, back_in_a_folder])
def test_what_is_made_from_a_model_draws_best_as_it_does(
    done: Run, model: Path, pictures: Path, tmp_path: Path, make: Made
) -> None:
    made = make(done, model, pictures, tmp_path)
    assert drawing_defaults(made) == Defaults(3, 2.5)
    if (made / "README.md").is_file():
        assert ", num_inference_steps=3, guidance_scale=2.5)" in (made / "README.md").read_text()


@pytest.mark.parametrize("words", [("prune", "--recipe", "small"), ("export", "--to", "diffusers")])
def test_another_file_makes_it_another_run(
    done: Run, run: Run, model: Path, folder: Path, tmp_path: Path, words: tuple[str, ...]
) -> None:
    own = saying(folder)
    command = [words[0], own, *words[1:], "--out", tmp_path / "o"]
    done(*command)
    done(*command)
    saying(folder, num_inference_steps=9)
    outcome = run(*command)
    assert outcome.code == 2
    assert "holds another run (sampling: " in outcome.said[0]


def test_a_negative_prompt_without_guidance_is_said_to_change_nothing(
    done: Run, v1_folder: Path, tmp_path: Path
) -> None:
    words = ["--prompt", "red", "--negative_prompt", "blue", "--guidance", 1, "--steps", 1, "--out", tmp_path / "o"]
    said = done("generate", v1_folder, *words).said
    assert said == ["the negative prompt changes nothing at guidance 1; give --guidance of more than 1"]
    assert "negative_prompt" not in told(tmp_path / "o" / "00000.png")


def test_the_torch_free_runtime_says_it_too(
    onnx_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--prompt", "red", "--negative_prompt", "blue", "--guidance", "1", "--steps", "1", "--threads", "1"]
    assert main([str(onnx_folder), *words, "--out", str(tmp_path / "x.png")]) == 0
    assert "the negative prompt changes nothing at guidance 1" in capsys.readouterr().err
    assert "negative_prompt" not in told(tmp_path / "x.png")


def test_what_does_not_tell_stays_silent(done: Run, v1_folder: Path, pictures: Path, tmp_path: Path) -> None:
    assert drawing_defaults(pruned(done, v1_folder, pictures, tmp_path)) is None
    assert drawing_defaults(in_one_file(done, v1_folder, pictures, tmp_path)) is None


def test_the_torch_free_runtime_draws_with_it(onnx_folder: Path, tmp_path: Path) -> None:
    folder = saying(Path(shutil.copytree(onnx_folder, tmp_path / "onnx")))
    assert open_folder(folder).defaults == drawing(folder) == Defaults(3, 2.5)
    given = [str(folder), "--prompt", "red", "--threads", "1", "--out", str(tmp_path / "x.png")]
    assert main(given) == 0
    assert main([*given[:-1], str(tmp_path / "y.png"), "--steps", "3", "--guidance", "2.5"]) == 0
    assert main([*given[:-1], str(tmp_path / "z.png"), "--steps", "3", "--guidance", "7.5"]) == 0
    drawn = [np.asarray(Image.open(tmp_path / f"{name}.png")) for name in "xyz"]
    assert (drawn[0] == drawn[1]).all()
    assert (drawn[0] != drawn[2]).any()
    assert told(tmp_path / "x.png")["guidance"] == 2.5
    assert open_folder(onnx_folder).defaults == Defaults(25, 7.5)


def test_a_value_of_another_kind_in_a_single_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has guidance_scale None"):
        Defaults.of({"guidance_scale": None}, tmp_path / "one.safetensors")
