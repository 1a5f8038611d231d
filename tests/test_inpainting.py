"""In-painting and several strengths: what stays, what changes, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
from diffusers import StableDiffusionPipeline
from PIL import Image

from bksdm.models.pipelines import save_pipeline
from tiny_models import PICTURE, TWO_STAGES, build_pipeline
from verbs import Run, read_lines, told

pytest_plugins = ["verbs_fixtures"]

FEW = ("--steps", 3, "--guidance", 3, "--batch_size", 2)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Models whose U-Nets take the latents alone, and mask and picture beside them."""
    folder = tmp_path_factory.mktemp("models")
    for channels in (4, 9):
        save_pipeline(build_pipeline(TWO_STAGES | {"in_channels": channels}), folder / str(channels))
    return {channels: folder / str(channels) for channels in (4, 9)}


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A picture, a mask of its left half, and masks that cannot be."""
    folder = tmp_path_factory.mktemp("given")
    pictures = {"image": Image.effect_noise((PICTURE, PICTURE), 60).convert("RGB")}
    pictures["mask"] = Image.new("L", (PICTURE, PICTURE))
    pictures["mask"].paste(255, (0, 0, PICTURE // 2, PICTURE))
    pictures["large"] = Image.new("L", (2 * PICTURE, PICTURE), 255)
    pictures["black"] = Image.new("L", (PICTURE, PICTURE))
    for name, picture in pictures.items():
        picture.save(folder / f"{name}.png")
    return {name: folder / f"{name}.png" for name in pictures}


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as opened:
        return np.asarray(opened.convert("RGB")).astype(int)


@pytest.mark.parametrize("channels", [4, 9])
def test_outside_the_mask_every_pixel_stays(
    done: Run, models: dict[int, Path], given: dict[str, Path], tmp_path: Path, channels: int
) -> None:
    words = ["--prompt", "red apple", "green car", "--image", given["image"], "--mask", given["mask"], "--strength", 1]
    done("generate", models[channels], "--out", tmp_path / "out", *FEW, *words)
    before, half = pixels(given["image"]), PICTURE // 2
    made = [pixels(path) for path in sorted((tmp_path / "out").glob("0*.png"))]
    for picture in made:
        assert np.array_equal(picture[:, half:], before[:, half:])
        assert np.abs(picture[:, :half] - before[:, :half]).mean() > 5
    assert np.abs(made[0] - made[1]).max() > 0
    assert told(tmp_path / "out" / "00000.png")["mask"] == str(given["mask"])


def test_a_prompt_decides_what_is_painted(
    done: Run, models: dict[int, Path], given: dict[str, Path], tmp_path: Path
) -> None:
    where = ["--image", given["image"], "--mask", given["mask"], "--strength", 1]
    for number, prompt in enumerate(("red apple", "green car", "red apple")):
        done("generate", models[9], "--out", tmp_path / str(number), *FEW, *where, "--prompt", prompt)
    red, green, again = (pixels(tmp_path / str(number) / "00000.png") for number in range(3))
    assert np.array_equal(red, again)
    assert not np.array_equal(red, green)


def test_strengths_make_a_grid_of_rising_changes(
    done: Run, exported_model: Path, given: dict[str, Path], tmp_path: Path
) -> None:
    words = ["--prompt", "red apple", "--images_per_prompt", 2, "--image", given["image"]]
    outcome = done(
        "generate", exported_model, "--out", tmp_path / "out", *FEW, *words, "--strengths", 0.4, 0.7, 1.0, "--json"
    )
    assert len(outcome.json["pictures"]) == 6
    lines = read_lines(tmp_path / "out" / "metadata.jsonl")
    assert [(line["seed"], line["strength"]) for line in lines] == [(s, x) for s in (0, 1) for x in (0.4, 0.7, 1.0)]
    with Image.open(tmp_path / "out" / "grid.png") as grid:
        assert grid.size == (3 * PICTURE + 4, 2 * PICTURE + 2)
    one = done("generate", exported_model, "--out", tmp_path / "one", *FEW, *words, "--strength", 0.7, "--json").json
    for number, path in enumerate(one["pictures"]):
        assert np.array_equal(pixels(Path(path)), pixels(tmp_path / "out" / f"{3 * number + 1:05d}.png"))


def test_a_grid_of_strengths_inside_a_mask(
    done: Run, models: dict[int, Path], given: dict[str, Path], tmp_path: Path
) -> None:
    words = ["--prompt", "red apple", "--image", given["image"], "--mask", given["mask"], "--strengths", 0.4, 1.0]
    done("generate", models[9], "--out", tmp_path / "out", *FEW, *words)
    before, half = pixels(given["image"]), PICTURE // 2
    made = [pixels(tmp_path / "out" / f"{number:05d}.png") for number in range(2)]
    assert all(np.array_equal(picture[:, half:], before[:, half:]) for picture in made)
    assert not np.array_equal(*made)


def test_what_is_missing_of_a_grid_is_made(
    done: Run, exported_model: Path, given: dict[str, Path], tmp_path: Path
) -> None:
    words = ["generate", exported_model, "--out", tmp_path / "out", *FEW, "--prompt", "red", "--image", given["image"]]
    done(*words, "--strengths", 0.4, 0.9)
    second = tmp_path / "out" / "00001.png"
    before = pixels(second)
    second.unlink()
    done(*words, "--strengths", 0.4, 0.9)
    assert np.array_equal(pixels(second), before)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mask", "mask"], "there is no picture under it; give --image too"),
        (["--image", "image", "--mask", "large"], "large.png is 64x32 and image"),
        (["--image", "image", "--mask", "black"], "black.png is black, so that nothing would change"),
        (["--image", "image", "--mask", "mask", "--runtime", "onnx"], "mask needs torch; leave out --runtime"),
        (["--strengths", "0.5"], "strengths is [0.5]; give one or more, with an --image to start from"),
        (["--image", "image", "--strengths", "0.5", "2"], "strength is 2.0; give more than 0 and at most 1"),
        (["--lora", "nowhere"], "adapter nowhere does not exist"),
    ],
)
def test_bad_input_is_one_line(
    run: Run, exported_model: Path, given: dict[str, Path], tmp_path: Path, words: list[str], message: str
) -> None:
    spelled = [given.get(word, word) for word in words]
    outcome = run("generate", exported_model, "--out", tmp_path / "out", *FEW, "--prompt", "red", *spelled)
    assert outcome.code == 2
    assert len(outcome.said) == 1
    assert message in outcome.said[0]
    assert not (tmp_path / "out").exists()


def test_a_model_for_in_painting_needs_a_mask(run: Run, models: dict[int, Path], tmp_path: Path) -> None:
    outcome = run("generate", models[9], "--out", tmp_path / "out", *FEW, "--prompt", "red")
    assert outcome.code == 2
    assert "is one for in-painting; give it --image and --mask" in outcome.said[0]


def test_a_student_for_in_painting_is_pruned_and_paints(
    done: Run, v1_teacher: StableDiffusionPipeline, given: dict[str, Path], tmp_path: Path
) -> None:
    unet = {**v1_teacher.unet.config, "in_channels": 9}
    save_pipeline(build_pipeline({key: value for key, value in unet.items() if key[0] != "_"}), tmp_path / "teacher")
    done("prune", tmp_path / "teacher", "--recipe", "tiny", "--out", tmp_path / "tiny")
    words = ["--prompt", "red", "--image", given["image"], "--mask", given["mask"]]
    done("generate", tmp_path / "tiny", "--out", tmp_path / "out", *FEW, *words)
    half = PICTURE // 2
    assert np.array_equal(pixels(tmp_path / "out" / "00000.png")[:, half:], pixels(given["image"])[:, half:])
