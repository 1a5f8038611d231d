"""A U-Net whose `sample_size` is height and width: every verb makes, takes and counts such pictures."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image

from bksdm.data.pictures import to_pixels
from bksdm.data.prepare import prepare
from bksdm.data.prepared import read_prepared
from bksdm.data.source import read_source
from bksdm.distill.data import open_data
from bksdm.distill.run import distill
from bksdm.evaluate.output_error import probes
from bksdm.evaluate.rivals import Drawing, TorchRival
from bksdm.export import run
from bksdm.generate.demo import Drawer, Wish, draw
from bksdm.generate.requests import Request
from bksdm.generate.sampling import sample, sample_latents
from bksdm.models.configs import load_config, load_denoiser_config
from bksdm.models.pipelines import load_pipeline, save_pipeline
from bksdm.options.data import PrepareOptions
from bksdm.options.distill import DistillOptions
from bksdm.options.export import ExportOptions
from bksdm.options.generate import DemoOptions
from bksdm.options.personalize import PersonalizeOptions
from bksdm.personalize.run import personalize
from bksdm.personalize.subject import SMALLEST_CUT, view
from bksdm.pruning.cost import unet_cost
from bksdm.runtime.defaults import Defaults
from tiny_models import MAX_TOKENS, TWO_STAGES, XL_SHALLOW_UNET, build_pipeline, build_xl_pipeline, write_json
from verbs import Run, make_student

pytest_plugins = ["verbs_fixtures"]
pytestmark = pytest.mark.usefixtures("without_charts")

LATENTS = (8, 16)
HEIGHT, WIDTH = 32, 64
ONE_STEP = {"steps": 1, "batch_size": 2, "accumulation": 1, "sample_every": 0}
ONE_STEP |= dict.fromkeys(("precision", "teacher_precision"), "fp32")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of wide pictures."""
    folder = tmp_path_factory.mktemp("wide") / "teacher"
    save_pipeline(build_pipeline(TWO_STAGES | {"sample_size": LATENTS}), folder)
    assert json.loads((folder / "unet" / "config.json").read_text())["sample_size"] == list(LATENTS)
    return folder


@pytest.fixture(scope="module")
def wide_xl() -> StableDiffusionXLPipeline:
    return build_xl_pipeline(XL_SHALLOW_UNET | {"sample_size": LATENTS})


@pytest.fixture(scope="module")
def student(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_student(load_pipeline(wide), tmp_path_factory.mktemp("wide") / "student")


@pytest.fixture(scope="module")
def prepared(wide: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide") / "prepared"
    prepare(PrepareOptions(str(pictures), str(wide), str(folder), workers=0))
    return folder


def size(path: Path) -> tuple[int, int]:
    """Height and width."""
    with Image.open(path) as picture:
        return picture.height, picture.width


def test_generate_draws_them_and_starts_from_them(done: Run, wide: Path, pictures: Path, tmp_path: Path) -> None:
    words = ["generate", wide, "--prompt", "red", "--steps", 2]
    done(*words, "--out", tmp_path / "drawn")
    done(*words, "--image", pictures / "0.png", "--out", tmp_path / "begun")
    assert size(tmp_path / "drawn" / "00000.png") == size(tmp_path / "begun" / "00000.png") == (HEIGHT, WIDTH)


def test_pipelines_of_every_family_draw_them_unasked(wide: Path, wide_xl: StableDiffusionXLPipeline) -> None:
    for pipeline in (load_pipeline(wide), wide_xl):
        request = [Request("red", 0)]
        assert next(sample_latents(pipeline, request, steps=1)).shape[2:] == LATENTS
        assert next(sample(pipeline, request, steps=1))[0].size == (WIDTH, HEIGHT)


def test_describe_says_both_sides_and_counts_what_they_cost(done: Run, wide: Path) -> None:
    found = done("describe", wide, "--json").json
    assert found["latent_size"] == list(LATENTS)
    square = unet_cost(load_denoiser_config(wide), 8, MAX_TOKENS)
    assert found["unet"]["gmacs_modules"] == pytest.approx(2 * square.gmacs_modules, rel=0.01), "twice the latents"
    assert "at 8x16 latents" in done("describe", wide).out


def test_latents_are_prepared_and_learnt_from(
    wide: Path, student: Path, prepared: Path, pictures: Path, tmp_path: Path
) -> None:
    about = read_prepared(prepared)
    assert (about.resolution, about.latent_shape) == ((HEIGHT, WIDTH), (4, *LATENTS))
    for name, data in (("prepared", prepared), ("pictures", pictures)):
        distill(DistillOptions(str(wide), str(student), str(data), str(tmp_path / name), **ONE_STEP))
    losses = [
        json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0])["loss"]
        for name in ("prepared", "pictures")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(("resolution", "latents"), [(None, LATENTS), (HEIGHT, (8, 8))])
def test_a_plan_foresees_them(wide: Path, pictures: Path, resolution: int | None, latents: tuple[int, int]) -> None:
    configs = *(load_config(wide, part) for part in ("unet", "vae")), MAX_TOKENS
    assert open_data(str(pictures), resolution, True, 4.0).fields(*configs)["latents_mean"] == (4, *latents)
    pixels = tuple(side * 4 for side in latents)
    assert open_data(str(pictures), resolution, True, 0.0).fields(*configs)["pixel_values"] == (3, *pixels)


def test_pictures_are_cut_to_the_shape(pictures: Path) -> None:
    picture = Image.linear_gradient("L").resize((100, 60)).convert("RGB")
    found = to_pixels(picture, (HEIGHT, WIDTH))
    assert found.shape == (3, HEIGHT, WIDTH)
    middle = picture.crop((0, 5, 100, 55)).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    assert torch.equal(found, to_pixels(middle, (HEIGHT, WIDTH)))


def test_views_of_a_subject_have_the_shape() -> None:
    picture = Image.new("RGB", (100, 80), "white")
    picture.paste("black", (0, 0, 100, 40))
    for number in range(6):
        found = view(picture, (HEIGHT, WIDTH), number, 3, flip=False)
        assert found.shape == (3, HEIGHT, WIDTH)
    share = float((view(picture, (HEIGHT, WIDTH), 0, 3, flip=False) < 0).float().mean())
    assert share == pytest.approx(0.5, abs=0.02), "the middle is half black"
    assert SMALLEST_CUT == 0.8


def test_personalize_learns_from_them(wide: Path, pictures: Path, tmp_path: Path) -> None:
    few = {"steps": 1, "class_images": 1, "class_steps": 1, "views": 2, "lora": True, "rank": 2}
    personalize(PersonalizeOptions(str(wide), str(pictures), "a sks car", str(tmp_path / "run"), **few))
    assert size(tmp_path / "run" / "class_images" / "00000.png") == (HEIGHT, WIDTH)


def test_outputs_are_compared_on_them(wide: Path, pictures: Path) -> None:
    (probe,) = probes(load_pipeline(wide), read_source(str(pictures)).pictures)
    assert probe.latents.shape == (8, 4, *LATENTS)


def test_evaluate_draws_them(done: Run, wide: Path, pictures: Path, tmp_path: Path) -> None:
    words = ["--reference", pictures, "--out", tmp_path / "out", "--encoder", "emoji", "--steps", 1, "--latency", 1]
    done("evaluate", wide, *words, "--teacher", wide, "--scores", "output_error", "clip_score")
    drawn = next((tmp_path / "out" / "models").rglob("*.png"))
    assert size(drawn) == (HEIGHT, WIDTH)


def test_benchmark_measures_them(wide: Path) -> None:
    rival = TorchRival.load(str(wide), Drawing(Defaults(1, 1.0)), torch.float32, None)
    assert rival.size == (HEIGHT, WIDTH)
    assert rival.cost() == unet_cost(load_denoiser_config(wide), LATENTS, MAX_TOKENS)
    assert {picture.size for picture in rival.tasks(1)["whole"]()[0]} == {(WIDTH, HEIGHT)}


def test_the_page_draws_them(wide: Path, tmp_path: Path) -> None:
    drawer = Drawer.load(str(wide), Defaults(), DemoOptions(str(wide), precision="fp32"))
    begin = Image.new("RGB", (50, 50), "red")
    for image in (None, begin):
        made = draw(drawer, Wish("red", 0, 2, 1.0, image, 0.8), tmp_path, lambda: None)
        assert size(made.file) == (HEIGHT, WIDTH)


def test_an_export_is_compared_on_them(wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    whole = run.check_parity
    monkeypatch.setattr(run, "check_parity", lambda *given: compared.append(given[2:]) or whole(*given))
    run.export(ExportOptions(str(wide), "diffusers", str(tmp_path / "again")))
    assert compared == [(HEIGHT, WIDTH)]


def test_an_exported_folder_draws_them(done: Run, onnx_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(onnx_folder, tmp_path / "onnx"))
    config = json.loads((folder / "unet" / "config.json").read_text())
    write_json(folder / "unet" / "config.json", config | {"sample_size": list(LATENTS)})
    done("generate", folder, "--prompt", "red", "--steps", 1, "--out", tmp_path / "drawn")
    assert size(tmp_path / "drawn" / "00000.png") == (HEIGHT, WIDTH)
