"""Pictures from prompts: the same as diffusers makes, each from its own seed, none made twice."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import yaml
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from bksdm.common.assets import asset
from bksdm.data.folder import read_captions
from bksdm.data.pictures import open_picture
from bksdm.generate.sampling import scheduler_named
from fast import slow
from tiny_models import PICTURE
from verbs import Run, mtimes, read_lines, told

pytest_plugins = ["verbs_fixtures"]

EMOJI = asset("emoji", "model")
PROMPTS = ("red apple, noto style", "snail, fluent style", "a house")
STEPS, SEED, GUIDANCE = 4, 11, 3.0
QUICK = ("--steps", 1)  # where ours are compared with ours
SCHEDULERS = ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"]


def pixels(path: Path | Image.Image) -> np.ndarray:
    return np.asarray(open_picture(path) if isinstance(path, Path) else path, dtype=int)


def assert_same(ours: Sequence[Path], theirs: Sequence[Path | Image.Image]) -> None:
    """The same pictures, but for the rounding of one level."""
    assert len(ours) == len(theirs)
    for path, other in zip(ours, theirs, strict=True):
        assert np.abs(pixels(path) - pixels(other)).max() <= 1


def made(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.png"))


@pytest.fixture
def emoji(done: Run, tmp_path: Path) -> "Drawing":
    return Drawing(done, tmp_path, "emoji")


@pytest.fixture
def small(done: Run, tmp_path: Path, exported_model: Path) -> "Drawing":
    """By a model that draws in a blink."""
    return Drawing(done, tmp_path, exported_model)


class Drawing:
    """`bksdm generate` of a model with small settings, each command into a folder of its own."""

    def __init__(self, done: Run, tmp: Path, model: str | Path) -> None:
        self.done = done
        self.tmp = tmp
        self.model = model

    def __call__(self, *words: object, prompts: Sequence[str] = PROMPTS, name: str = "out") -> list[Path]:
        common = ("--steps", STEPS, "--seed", SEED, "--guidance", GUIDANCE, "--out", self.tmp / name)
        self.done("generate", self.model, *common, "--prompt", *prompts, *words)
        return made(self.tmp / name)


def stock(scheduler: str | None = None, model: Path = EMOJI, kind: type = StableDiffusionPipeline) -> object:
    """The pipeline as diffusers itself loads it."""
    pipeline = kind.from_pretrained(model, local_files_only=True, dtype=torch.float32)
    if scheduler:
        config = dict(pipeline.scheduler.config) | {"clip_sample": False}
        pipeline.scheduler = getattr(diffusers, scheduler).from_config(config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noise(seeds: Sequence[int], height: int, width: int) -> torch.Tensor:
    """Initial latents with shape (B, 4, height, width), a seed each."""
    draws = [torch.randn(1, 4, height, width, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.cat(draws)


# Against diffusers


def test_pictures_of_the_embedded_model_are_those_of_diffusers(emoji: Drawing) -> None:
    ours = emoji(prompts=PROMPTS[:2])
    theirs = stock()(
        list(PROMPTS[:2]),
        latents=noise(range(SEED, SEED + 2), 16, 16),
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
    ).images
    assert_same(ours, theirs)
    assert np.ptp(pixels(ours[0])) > 50, "a picture without contrast would prove nothing"


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_scheduler_draws_what_it_draws_in_diffusers(small: Drawing, exported_model: Path, scheduler: str) -> None:
    theirs = stock(scheduler, exported_model)(
        list(PROMPTS[:2]),
        latents=noise(range(SEED, SEED + 2), 8, 8),
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
    ).images
    assert_same(small("--scheduler", scheduler, prompts=PROMPTS[:2]), theirs)


@pytest.mark.parametrize(
    ("words", "arguments", "size"),
    [
        (["--guidance", 1], {"guidance_scale": 1.0}, (8, 8)),
        (["--negative_prompt", "red"], {"negative_prompt": ["red"] * 2}, (8, 8)),
        (["--height", 32, "--width", 96], {"height": 32, "width": 96}, (8, 24)),
        (["--steps", 3], {"num_inference_steps": 3}, (8, 8)),
    ],
    ids=["without guidance", "negative prompt", "size", "steps"],
)
def test_options_mean_what_they_mean_in_diffusers(
    small: Drawing, exported_model: Path, words: list[object], arguments: dict[str, object], size: tuple[int, int]
) -> None:
    common = {"num_inference_steps": 2, "guidance_scale": GUIDANCE, "latents": noise(range(SEED, SEED + 2), *size)}
    theirs = stock(model=exported_model)(list(PROMPTS[:2]), **(common | arguments)).images
    assert_same(small("--steps", 2, *words, prompts=PROMPTS[:2]), theirs)


@pytest.mark.parametrize("scheduler", [None, slow("DDIMScheduler")])
def test_velocity_is_understood(done: Run, tmp_path: Path, v2_folder: Path, scheduler: str | None) -> None:
    words = ("--scheduler", scheduler) if scheduler else ()
    done("generate", v2_folder, "--prompt", "red apple", "--steps", STEPS, "--seed", 3, "--out", tmp_path / "o", *words)
    pipeline = stock(scheduler, v2_folder)
    theirs = pipeline("red apple", latents=noise([3], 8, 8), num_inference_steps=STEPS, guidance_scale=7.5).images
    assert_same(made(tmp_path / "o"), theirs)


@pytest.mark.parametrize(("strength", "scheduler"), [(0.5, None), (1.0, None), (0.8, "DDIMScheduler")])
def test_a_picture_to_start_from_is_used_as_diffusers_does(
    small: Drawing, exported_model: Path, pictures: Path, strength: float, scheduler: str | None
) -> None:
    source = pictures / "0.png"
    words = ("--scheduler", scheduler) if scheduler else ()
    ours = small("--image", source, "--strength", strength, *words, prompts=PROMPTS[:2])
    pipeline = stock(scheduler, exported_model, StableDiffusionImg2ImgPipeline)
    theirs = [
        pipeline(
            prompt,
            image=open_picture(source),
            strength=strength,
            generator=torch.Generator().manual_seed(SEED + number),
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
        ).images[0]
        for number, prompt in enumerate(PROMPTS[:2])
    ]
    assert_same(ours, theirs)


def test_a_picture_to_start_from_is_scaled_to_the_size_of_the_model(emoji: Drawing, tmp_path: Path) -> None:
    Image.new("RGB", (300, 200), "red").save(tmp_path / "large.png")
    paths = emoji("--image", tmp_path / "large.png", "--strength", 0.3, prompts=PROMPTS[:1])
    assert pixels(paths[0]).shape == (64, 64, 3)
    assert pixels(paths[0])[..., 0].mean() > pixels(paths[0])[..., 1:].mean() + 50


def lower_half() -> Image.Image:
    """A mask."""
    mask = Image.new("L", (PICTURE, PICTURE), 0)
    mask.paste(255, (0, PICTURE // 2, PICTURE, PICTURE))
    return mask


@pytest.mark.parametrize("kind", ["exported", pytest.param("shallow_xl", id="xl")], indirect=True)
@pytest.mark.parametrize("given", ["text", "picture", "mask"])
def test_every_kind_of_model_draws_what_diffusers_draws(
    kind_folder: Path, pictures: Path, tmp_path: Path, given: str, done: Run
) -> None:
    start, mask = open_picture(pictures / "0.png"), lower_half()
    mask.save(tmp_path / "mask.png")
    words = {"text": (), "picture": ("--image", pictures / "0.png")}
    words["mask"] = (*words["picture"], "--mask", tmp_path / "mask.png")
    settings = ("--prompt", "red apple", "--steps", STEPS, "--seed", SEED, "--guidance", GUIDANCE)
    done("generate", kind_folder, *settings, *words[given], "--out", tmp_path / "out")

    kinds = {"text": "AutoPipelineForText2Image", "picture": "AutoPipelineForImage2Image"}
    kinds["mask"] = "AutoPipelineForInpainting"
    arguments = {"text": {}, "picture": {"image": start, "strength": 0.8}}
    arguments["mask"] = arguments["picture"] | {"mask_image": mask, "height": PICTURE, "width": PICTURE}
    theirs = stock(model=kind_folder, kind=getattr(diffusers, kinds[given]))(
        "red apple",
        **arguments[given],
        generator=torch.Generator().manual_seed(SEED),
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
    ).images[0]
    if given == "mask":  # where it is black, ours is the picture itself
        theirs.paste(start, mask=mask.point(lambda value: 255 - value))
    assert_same(made(tmp_path / "out"), [theirs])


def test_latents_are_never_clipped(v1_teacher: StableDiffusionPipeline) -> None:
    assert "clip_sample" not in v1_teacher.scheduler.config
    assert not scheduler_named("DDIMScheduler", v1_teacher.scheduler).config.clip_sample


# Seeds


@pytest.mark.parametrize("batch_size", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_the_batch_size_does_not_matter(small: Drawing, batch_size: int) -> None:
    many, one = (small(*QUICK, "--batch_size", size, name=str(size)) for size in (batch_size, 1))
    assert_same(many, one)


def test_every_picture_has_the_seed_after_the_last(small: Drawing) -> None:
    all_of_them = small(*QUICK, "--images_per_prompt", 2)
    assert [line["seed"] for line in read_lines(small.tmp / "out" / "metadata.jsonl")] == list(range(SEED, SEED + 6))
    alone = small(*QUICK, "--seed", SEED + 3, prompts=[PROMPTS[1]], name="alone")
    assert_same(alone, [all_of_them[3]])


def test_another_seed_gives_another_picture(emoji: Drawing) -> None:
    first, second = emoji("--steps", 2, "--images_per_prompt", 2, prompts=PROMPTS[:1])
    assert np.abs(pixels(first) - pixels(second)).max() > 50


# What is written


def test_a_picture_says_how_it_was_made(emoji: Drawing) -> None:
    prompt = "été ☂, “noto” style"
    words = ("--negative_prompt", "blue", "--scheduler", "DDIMScheduler")
    assert told(emoji(*words, prompts=["a", prompt])[1]) == {
        "prompt": prompt,
        "seed": SEED + 1,
        "model": "emoji",
        "steps": STEPS,
        "guidance": GUIDANCE,
        "scheduler": "DDIMScheduler",
        "negative_prompt": "blue",
        "precision": "auto",
        "width": 64,
        "height": 64,
    }


def test_a_picture_made_from_another_says_so(emoji: Drawing) -> None:
    start = asset("emoji", "art", "heldout") / "ant.twemoji.png"
    made = told(emoji("--image", start, "--strength", 0.5, prompts=["a"])[0])
    assert (made["image"], made["strength"]) == (str(start), 0.5)


def test_metadata_lists_the_pictures_as_data_does(small: Drawing) -> None:
    paths = small(*QUICK, "--images_per_prompt", 2)
    entries = read_captions(small.tmp / "out")
    assert [entry.path for entry in entries] == paths
    assert [entry.text for entry in entries] == [prompt for prompt in PROMPTS for _ in range(2)]


def test_a_run_folder_holds_its_options(small: Drawing) -> None:
    small(*QUICK)
    config = yaml.safe_load((small.tmp / "out" / "config.yaml").read_text())
    assert (config["verb"], config["model"], config["prompt"]) == ("generate", str(small.model), list(PROMPTS))
    assert "versions" in json.loads((small.tmp / "out" / "provenance.json").read_text())
    assert not list((small.tmp / "out").glob(".*"))


def test_json_lists_the_pictures(done: Run, exported_model: Path, tmp_path: Path) -> None:
    words = ("--prompt", "red", "green", "--steps", 1, "--out", tmp_path / "o", "--json")
    assert done("generate", exported_model, *words).json == {"pictures": [str(path) for path in made(tmp_path / "o")]}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_precision_changes_little(done: Run, exported_model: Path, tmp_path: Path, precision: str) -> None:
    for name in ("auto", precision):
        words = ("--prompt", "red", "--steps", 2, "--precision", name, "--device", "cpu", "--out", tmp_path / name)
        done("generate", exported_model, *words)
    difference = np.abs(pixels(tmp_path / "auto" / "00000.png") - pixels(tmp_path / precision / "00000.png"))
    assert difference.max() <= (1 if precision == "fp32" else 40)


# Again


@pytest.mark.parametrize("batch_size", [4, 1])
def test_the_same_command_makes_only_what_is_missing(small: Drawing, batch_size: int) -> None:
    paths = small(*QUICK)
    wanted = pixels(paths[1])
    before = mtimes(paths)
    paths[1].unlink()
    (small.tmp / "out" / ".00001.png.partial").write_bytes(b"cut off by a kill")
    assert small(*QUICK, "--batch_size", batch_size) == paths
    after = mtimes(paths)
    assert (after[0], after[2]) == (before[0], before[2])
    assert after[1] > before[1]
    assert np.abs(pixels(paths[1]) - wanted).max() <= 1
    assert not list((small.tmp / "out").glob("*.partial"))


def test_a_finished_command_needs_no_model(done: Run, folder: Path, tmp_path: Path) -> None:
    words = ("generate", folder, "--prompt", "red", "--steps", 1, "--out", tmp_path / "o", "--json")
    first = done(*words)
    (folder / "model_index.json").unlink()
    assert done(*words).json == first.json


# Prompts


def write_prompts(path: Path, prompts: Sequence[str]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        if path.suffix == ".csv":
            csv.writer(file).writerows([("number", "text"), *enumerate(prompts)])
        elif path.suffix == ".jsonl":
            file.writelines(json.dumps({"text": prompt}) + "\n" for prompt in prompts)
        else:
            file.write("\n".join([*prompts, "", "  "]))
    return path


@pytest.mark.parametrize("suffix", [".txt", ".csv", ".jsonl", ""])
def test_prompts_come_from_files(done: Run, exported_model: Path, tmp_path: Path, suffix: str) -> None:
    prompts = ["red apple", 'a "green" car, été', "- red: [car]"]
    file = write_prompts(tmp_path / f"prompts{suffix}", prompts)
    done("generate", exported_model, "--prompts", file, "--steps", 1, "--out", tmp_path / "o")
    assert [line["text"] for line in read_lines(tmp_path / "o" / "metadata.jsonl")] == prompts
    assert all(pixels(path).shape == (PICTURE, PICTURE, 3) for path in made(tmp_path / "o"))


def test_prompts_come_from_a_folder_of_data(done: Run, exported_model: Path, pictures: Path, tmp_path: Path) -> None:
    done("generate", exported_model, "--prompts", pictures, "--steps", 1, "--out", tmp_path / "o")
    wanted = [line["text"] for line in read_lines(pictures / "metadata.jsonl")]
    assert [line["text"] for line in read_lines(tmp_path / "o" / "metadata.jsonl")] == wanted


def test_a_prompts_file_and_the_same_words_give_the_same_pictures(
    done: Run, exported_model: Path, tmp_path: Path
) -> None:
    file = write_prompts(tmp_path / "prompts.txt", ["red apple", "green car"])
    done("generate", exported_model, "--prompts", file, "--steps", 2, "--out", tmp_path / "file")
    done("generate", exported_model, "--prompt", "red apple", "green car", "--steps", 2, "--out", tmp_path / "words")
    assert_same(made(tmp_path / "file"), made(tmp_path / "words"))


def test_a_model_or_prompts_that_changed_do_not_keep_the_old_pictures(
    run: Run, done: Run, folder: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("red apple\n")
    words = ("generate", folder, "--prompts", prompts, "--steps", 1, "--out", tmp_path / "out")
    done(*words)
    prompts.write_text("green car\n")
    outcome = run(*words)
    assert outcome.code == 2
    assert "the content of prompts has changed since" in outcome.said[-1]
    prompts.write_text("red apple\n")
    done(*words)
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor / 2 for name, tensor in load_file(weights).items()}, weights, metadata={"format": "pt"})
    outcome = run(*words)
    assert outcome.code == 2
    assert "the content of model has changed since" in outcome.said[-1]
