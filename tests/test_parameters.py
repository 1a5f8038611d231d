"""What a PNG says of its making is read by programs that read AUTOMATIC1111's, and is whole under a key of our own."""

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
from PIL import Image
from sd_parsers import ParserManager

from bksdm.generate.run import save_picture
from bksdm.runtime import png
from bksdm.runtime.__main__ import main
from bksdm.runtime.parameters import sampler_name, texts
from tiny_models import PICTURE
from verbs import Run, told

pytest_plugins = ["verbs_fixtures"]

PROMPTS = [
    "red apple",
    "a red apple, noto style: on a table, 3:4",
    "first line\nsecond line\n\nfourth",
    'she said "red", and (green:1.2) [blue]',
    "Steps: 3, Sampler: DDIM, CFG scale: 1, Seed: 9, Size: 1x1",
    "été ☂ 日本 🍎",
    "",
]


def read(picture: Path) -> dict[str, Any]:
    """What sd-parsers finds."""
    found = ParserManager().parse(picture)
    assert found is not None
    (sampler,) = found.samplers
    return {
        "prompt": "\n".join(prompt.value for prompt in sampler.prompts),
        "negative_prompt": "\n".join(prompt.value for prompt in sampler.negative_prompts),
        "sampler": sampler.name,
        "model": sampler.model and sampler.model.name,
        **sampler.parameters,
        **found.metadata,
    }


def about(**changes: object) -> dict[str, Any]:
    return {"prompt": "red apple", "seed": 7, "model": "emoji", "steps": 25, "guidance": 2.5} | changes


PNDM = {"_class_name": "PNDMScheduler", "skip_prk_steps": True}


# What is written


@pytest.mark.parametrize("negative", [None, "blue, green: all", "two\nlines"])
@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("writer", ["torch", "torch-free"])
def test_prompts_of_any_kind_are_read(tmp_path: Path, writer: str, prompt: str, negative: str | None) -> None:
    made, file = about(prompt=prompt, negative_prompt=negative), tmp_path / "x.png"
    if writer == "torch":
        save_picture(Image.new("RGB", (48, 32)), file, made, PNDM)
    else:
        file.write_bytes(png.encode(np.zeros((32, 48, 3), np.uint8), texts(made, PNDM, (48, 32))))
    found = read(file)
    assert (found["prompt"], found["negative_prompt"]) == (prompt, negative or "")
    assert (found["sampler"], found["steps"], found["cfg_scale"], found["seed"]) == ("PLMS", "25", "2.5", "7")
    assert (found["Size"], found["model"]) == ("48x32", "emoji")
    whole = {**made, "scheduler": "PNDMScheduler", "width": 48, "height": 32}
    assert told(file) == {name: value for name, value in whole.items() if value is not None}


@pytest.mark.parametrize("negative", [None, "blue"])
def test_a_prompt_with_the_readers_own_mark_is_read_all_the_same(tmp_path: Path, negative: str | None) -> None:
    prompt = "red\nNegative prompt: apple"
    save_picture(Image.new("RGB", (48, 32)), tmp_path / "x.png", about(prompt=prompt, negative_prompt=negative), PNDM)
    found = read(tmp_path / "x.png")
    assert (found["prompt"], found["negative_prompt"]) == ("red\nnegative prompt: apple", negative or "")
    assert told(tmp_path / "x.png")["prompt"] == prompt


def test_a_model_with_a_comma_in_its_name_is_quoted_as_there() -> None:
    written = texts(about(model='a, "b": c'), PNDM, (8, 8))["parameters"]
    assert written.endswith('Size: 8x8, Model: "a, \\"b\\": c"')


def test_latin_texts_are_plain_chunks_and_others_are_international(tmp_path: Path) -> None:
    for prompt, kind in (("été", b"tEXt"), ("☂", b"iTXt")):
        save_picture(Image.new("RGB", (8, 8)), tmp_path / "x.png", about(prompt=prompt), PNDM)
        ours = png.encode(np.zeros((8, 8, 3), np.uint8), texts(about(prompt=prompt), PNDM, (8, 8)))
        for content in (ours, (tmp_path / "x.png").read_bytes()):
            assert kind + b"parameters\0" in content
            assert b"tEXtbksdm\0" in content


SAMPLERS = [
    ("DDIMScheduler", {}, "DDIM"),
    ("PNDMScheduler", {"skip_prk_steps": True}, "PLMS"),
    ("PNDMScheduler", {}, "PNDM"),
    ("EulerDiscreteScheduler", {}, "Euler"),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, "Euler Karras"),
    ("EulerAncestralDiscreteScheduler", {}, "Euler a"),
    ("HeunDiscreteScheduler", {}, "Heun"),
    ("KDPM2DiscreteScheduler", {"use_karras_sigmas": True}, "DPM2 Karras"),
    ("KDPM2AncestralDiscreteScheduler", {}, "DPM2 a"),
    ("LMSDiscreteScheduler", {"use_karras_sigmas": True}, "LMS Karras"),
    ("DPMSolverMultistepScheduler", {}, "DPM++ 2M"),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, "DPM++ 2M Karras"),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "DPM++ 2M SDE"),
    (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "solver_order": 3, "use_exponential_sigmas": True},
        "DPM++ 3M SDE Exponential",
    ),
    ("DPMSolverMultistepScheduler", {"solver_order": 1}, "DPMSolverMultistep"),
    ("UniPCMultistepScheduler", {}, "UniPC"),
    ("LCMScheduler", {}, "LCM"),
    ("DEISMultistepScheduler", {}, "DEISMultistep"),
]


@pytest.mark.parametrize(("kind", "options", "name"), SAMPLERS)
def test_samplers_have_the_names_that_people_know(kind: str, options: dict[str, Any], name: str) -> None:
    scheduler = getattr(diffusers, kind)(**options)
    assert sampler_name({**scheduler.config, "_class_name": kind}) == name


# What the verbs write


@pytest.mark.parametrize(
    ("words", "sampler"),
    [
        (["--negative_prompt", "blue", "--height", 32, "--width", 64], "PLMS"),
        (["--scheduler", "EulerAncestralDiscreteScheduler"], "Euler a"),
        (["--image", "0.png", "--strength", 0.5], "PLMS"),
        (["--image", "0.png", "--strengths", 0.25, 0.75], "PLMS"),
    ],
)
def test_generate_tells_what_was_used(
    done: Run, exported_model: Path, pictures: Path, tmp_path: Path, words: list[object], sampler: str
) -> None:
    given = [pictures / word if word == "0.png" else word for word in words]
    done("generate", exported_model, "--prompt", "red car", "--steps", 4, "--seed", 5, "--out", tmp_path / "o", *given)
    found = read(tmp_path / "o" / "00000.png")
    assert (found["prompt"], found["seed"], found["steps"]) == ("red car", "5", "4")
    assert (found["cfg_scale"], found["sampler"]) == ("7.5", sampler)
    assert found["negative_prompt"] == ("blue" if "blue" in words else "")
    assert found["Size"] == ("64x32" if 64 in words else f"{PICTURE}x{PICTURE}")
    strength = next((str(word) for word in words if isinstance(word, float)), None)
    assert found.get("Denoising strength") == strength


def test_exported_folders_tell_it_too(done: Run, onnx_folder: Path, pictures: Path, tmp_path: Path) -> None:
    words = ["--prompt", "red car", "--steps", "2", "--guidance", "3", "--seed", "5", "--negative_prompt", "blue"]
    done("generate", onnx_folder, *words, "--out", tmp_path / "o")
    assert main([str(onnx_folder), *words, "--threads", "1", "--out", str(tmp_path / "x.png")]) == 0
    found = [read(tmp_path / name) for name in ("o/00000.png", "x.png")]
    assert found[0] == found[1]
    assert (found[0]["prompt"], found[0]["negative_prompt"], found[0]["sampler"]) == ("red car", "blue", "PLMS")
    assert (found[0]["steps"], found[0]["cfg_scale"], found[0]["seed"]) == ("2", "3", "5")
    assert found[0]["Size"] == f"{PICTURE}x{PICTURE}"
    words += ["--image", str(pictures / "0.png"), "--strength", "0.5", "--threads", "1"]
    assert main([str(onnx_folder), *words, "--out", str(tmp_path / "y.png")]) == 0
    assert read(tmp_path / "y.png") == found[1] | {"Denoising strength": "0.5"}


def test_what_comfyui_takes_for_its_own_is_left_to_it(done: Run, exported_model: Path, tmp_path: Path) -> None:
    done("generate", exported_model, "--prompt", "red", "--steps", 1, "--out", tmp_path / "o")
    with Image.open(tmp_path / "o" / "00000.png") as picture:
        assert picture.text.keys() == {"parameters", "bksdm"}
        assert json.loads(picture.text["bksdm"])["prompt"] == "red"
