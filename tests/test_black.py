"""Pictures that come out black: half precision that overflows is mended, and what a safety checker does is said."""

import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from bksdm.common.errors import InputError
from bksdm.data.pictures import open_picture
from bksdm.data.prepared import read_prepared
from bksdm.data.source import read_source
from bksdm.generate.demo import Drawer, Wish, draw
from bksdm.generate.requests import Request
from bksdm.generate.run import generate
from bksdm.generate.sampling import decode, sample
from bksdm.models.pipelines import load_pipeline, save_pipeline
from bksdm.options.generate import DemoOptions, GenerateOptions
from bksdm.runtime.defaults import Defaults
from bksdm.runtime.folder import open_folder
from tiny_models import LATENT, TWO_STAGES, age, build_pipeline
from verbs import Run, captioned, read_lines, told

pytest_plugins = ["verbs_fixtures"]
pytestmark = pytest.mark.usefixtures("without_charts")

TOO_LARGE = 3e4  # times weights of the decoder's first layer, whose outputs a later layer normalises
CHECKER = Path("safety_checker", "model.safetensors")


def pixels(pictures: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(picture, dtype=int) for picture in pictures])


def latents() -> Tensor:
    """Of four pictures, the second and the last of which stay within half precision."""
    drawn = torch.randn(4, 4, LATENT, LATENT, generator=torch.Generator().manual_seed(0))
    drawn[1::2] /= 1e4
    return drawn


@pytest.fixture
def overflowing() -> StableDiffusionPipeline:
    """A pipeline whose VAE computes in float32 and not in half precision."""
    pipeline = build_pipeline(TWO_STAGES)
    with torch.no_grad():
        pipeline.vae.decoder.conv_in.weight *= TOO_LARGE
    return pipeline


# Half precision


def test_what_overflows_is_decoded_again_in_float32(
    overflowing: StableDiffusionPipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    given = latents()
    wanted = pixels(decode(overflowing, given.half().float()))
    overflowing.to(torch.float16)
    weights = {name: tensor.clone() for name, tensor in overflowing.vae.state_dict().items()}
    with torch.no_grad():
        plain = overflowing.vae.decode(given.half() / overflowing.vae.config.scaling_factor).sample
    assert plain.isfinite().flatten(1).all(dim=1).tolist() == [False, True, False, True]
    found = pixels(decode(overflowing, given.half()))
    assert np.abs(found - wanted)[::2].max() <= 1
    assert np.ptp(found[0]) > 20
    kept = overflowing.image_processor.postprocess(plain[1::2], output_type="pil")
    assert (found[1::2] == pixels(kept)).all()  # the others are as they were
    assert all(torch.equal(tensor, weights[name]) for name, tensor in overflowing.vae.state_dict().items())
    decode(overflowing, given.half())
    said = capsys.readouterr().err.splitlines()
    assert said == ["the VAE overflows in float16: such pictures are decoded again in float32"]


def test_generate_mends_it(done: Run, overflowing: StableDiffusionPipeline, tmp_path: Path) -> None:
    save_pipeline(overflowing, tmp_path / "model")
    words = ["--prompt", "red apple", "green car", "--steps", 2, "--device", "cpu", "--batch_size", 1]
    half, whole = (
        done("generate", tmp_path / "model", *words, "--precision", name, "--out", tmp_path / name)
        for name in ("fp16", "fp32")
    )
    assert half.said == ["the VAE overflows in float16: such pictures are decoded again in float32"]
    assert not whole.said
    for number in range(2):
        own, other = (Image.open(tmp_path / name / f"0000{number}.png") for name in ("fp16", "fp32"))
        difference = np.abs(pixels([own]) - pixels([other]))
        assert difference.mean() < 5
        assert np.ptp(pixels([own])) > 20


def with_weights(folder: Path, network: str, change: Any) -> Path:
    """A model's folder, some weights of which are changed."""
    file = folder / network / "diffusion_pytorch_model.safetensors"
    save_file({name: change(name, tensor) for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("network", "precision", "said"),
    [
        ("unet", "fp16", "the U-Net gives numbers that are not finite in float16; give --precision bf16 or fp32"),
        (
            "unet",
            "fp32",
            "the U-Net gives numbers that are not finite in float32; its weights are damaged, or its training has "
            "diverged",
        ),
        ("vae", "fp32", "the VAE gives numbers that are not finite in float32; its weights are damaged"),
        ("vae", "fp16", "the VAE gives numbers that are not finite in float32; its weights are damaged"),
    ],
)
def test_numbers_that_nothing_mends_are_refused(
    run: Run, folder: Path, tmp_path: Path, network: str, precision: str, said: str
) -> None:
    with_weights(folder, network, lambda name, tensor: tensor * (torch.nan if "conv_out" in name else 1))
    words = ["--prompt", "red", "--steps", 1, "--device", "cpu", "--precision", precision]
    outcome = run("generate", folder, *words, "--out", tmp_path / "o")
    assert (outcome.code, outcome.said) == (2, [f"bksdm: {said}"])
    assert not list((tmp_path / "o").glob("*.png"))


def test_exported_folders_refuse_them_too(onnx_folder: Path, tmp_path: Path) -> None:
    nothing = np.full((1, 4, LATENT, LATENT), np.nan, np.float32)
    with pytest.raises(InputError, match="the U-Net gives numbers that are not finite, as half precision does where"):
        list(open_folder(onnx_folder, threads=1).sample(["red"], steps=1, latents=nothing))
    damaged = Path(shutil.copytree(onnx_folder, tmp_path / "damaged"))
    file = damaged / "vae_decoder" / "model.onnx"
    model = onnx.load(file)
    (bias,) = (tensor for tensor in model.graph.initializer if tensor.name.endswith("conv_out.bias"))
    bias.CopyFrom(onnx.numpy_helper.from_array(np.full(3, np.nan, np.float32), bias.name))
    onnx.save(model, file)
    with pytest.raises(InputError, match="the decoder gives numbers that are not finite, as half precision does where"):
        list(open_folder(damaged, threads=1).sample(["red"], steps=1))


# The safety checker


@pytest.fixture(scope="module")
def flagging(exported_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 2022 whose safety checker finds fault with everything. Shared: not to be changed."""
    folder = age(Path(shutil.copytree(exported_model, tmp_path_factory.mktemp("flagging") / "model")))
    weights = load_file(folder / CHECKER)
    save_file(weights | {"concept_embeds_weights": torch.full((17,), -2.0)}, folder / CHECKER, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def content(exported_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with one that finds none. Shared: not to be changed."""
    return age(Path(shutil.copytree(exported_model, tmp_path_factory.mktemp("content") / "model")))


SAID = "the model's safety checker has made 3 of 3 pictures black: 00000.png, 00001.png, 00002.png"


def test_pictures_that_it_has_made_black_are_named(done: Run, flagging: Path, pictures: Path, tmp_path: Path) -> None:
    for name, more in (("text", []), ("image", ["--image", pictures / "0.png"])):
        words = ["generate", flagging, "--prompt", "red", "--images_per_prompt", 3, "--steps", 2, *more]
        words += ["--out", tmp_path / name]
        assert done(*words).said == [SAID]
        assert [line["flagged"] for line in read_lines(tmp_path / name / "metadata.jsonl")] == [True] * 3
        for number in range(3):
            path = tmp_path / name / f"0000{number}.png"
            assert not pixels([Image.open(path)]).any()
            assert told(path)["flagged"]
        (tmp_path / name / "00001.png").unlink()
        assert done(*words).said == [SAID]  # of those too that were there


def test_one_that_finds_none_changes_nothing(done: Run, content: Path, exported_model: Path, tmp_path: Path) -> None:
    for name, model in (("with", content), ("without", exported_model)):
        words = ["--prompt", "red", "--steps", 2, "--out", tmp_path / name]
        assert not done("generate", model, *words).said
    own, other = (pixels([Image.open(tmp_path / name / "00000.png")]) for name in ("with", "without"))
    assert np.abs(own - other).max() <= 1
    assert "flagged" not in read_lines(tmp_path / "with" / "metadata.jsonl")[0]


@pytest.mark.parametrize("checker", ["flagging", "content"])
def test_pictures_are_those_of_diffusers(request: pytest.FixtureRequest, checker: str) -> None:
    folder = request.getfixturevalue(checker)
    asked = [Request("red", 0), Request("green car", 1)]
    ours = [picture for batch in sample(load_pipeline(folder), asked, steps=2, batch_size=2) for picture in batch]
    stock = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    stock.set_progress_bar_config(disable=True)
    noise = [torch.Generator().manual_seed(request.seed) for request in asked]
    theirs = stock([one.prompt for one in asked], num_inference_steps=2, guidance_scale=7.5, generator=noise).images
    assert (pixels(ours) == pixels(theirs)).all()


def test_a_score_of_such_pictures_is_refused(
    run: Run, done: Run, flagging: Path, pictures: Path, tmp_path: Path
) -> None:
    done("generate", flagging, "--prompts", pictures, "--steps", 1, "--out", tmp_path / "made")
    words = ["--reference", pictures, "--encoder", "emoji", "--scores", "clip_score", "--latency", 0, "--steps", 1]
    outcome = run("evaluate", tmp_path / "made", *words, "--out", tmp_path / "o")
    assert outcome.code == 2
    assert outcome.said == [
        f"bksdm: 8 of 8 pictures of {tmp_path / 'made'} were made black by the model's safety checker (00000.png, "
        f"00001.png, 00002.png, 00003.png, 00004.png and 3 more), and are worth nothing in a score; bksdm evaluate "
        f"MODEL draws without it"
    ]
    outcome = run("evaluate", flagging, *words, "--reference", tmp_path / "made", "--out", tmp_path / "q")
    assert outcome.code == 2
    assert f"8 of 8 pictures of {tmp_path / 'made'} were made black by the model's safety checker" in outcome.said[0]
    drawn = done("evaluate", flagging, *words, "--limit", 2, "--out", tmp_path / "p", "--json").json
    assert drawn["models"][f"{flagging.parent.name}-model"]["of_one_colour"] == []


def test_a_class_of_such_pictures_is_not_learnt(run: Run, flagging: Path, pictures: Path, tmp_path: Path) -> None:
    words = ["--images", pictures, "--prompt", "sks car", "--class_images", 2, "--class_steps", 1, "--steps", 1]
    outcome = run("personalize", flagging, *words, "--out", tmp_path / "run")
    assert outcome.code == 2
    assert outcome.said[-1] == (
        "bksdm: the model's safety checker has made every picture of 'car' black; give another --class_prompt, or "
        "--class_images 0"
    )


@pytest.fixture(scope="module")
def black(flagging: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two such pictures. Shared: not to be changed."""
    out = tmp_path_factory.mktemp("black") / "made"
    generate(GenerateOptions(str(flagging), str(out), ["red"], images_per_prompt=2, steps=1))
    return out


def as_the_table_says(black: Path, folder: Path) -> Path:
    """The same, of which the table alone tells what they are."""
    captioned(folder, [open_picture(black / f"0000{number}.png") for number in range(2)])
    lines = [{"file_name": f"{number}.png", "text": "red", "flagged": True} for number in range(2)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def as_the_pictures_say(black: Path, folder: Path) -> Path:
    """The same, of which no table tells."""
    folder.mkdir()
    for number in range(2):
        shutil.copy(black / f"0000{number}.png", folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("red")
    return folder


def as_another_table_lists_them(black: Path, folder: Path) -> Path:
    as_the_pictures_say(black, folder)
    (folder / "metadata.csv").write_text("file_name,text\n0.png,red\n1.png,red\n")
    return folder


@pytest.mark.parametrize("layout", [as_the_table_says, as_the_pictures_say])
def test_nothing_is_learnt_from_a_folder_of_them(
    layout: Callable[[Path, Path], Path], run: Run, black: Path, exported_model: Path, tmp_path: Path
) -> None:
    data = layout(black, tmp_path / "data")
    words = ["--teacher", exported_model, "--student", exported_model, "--data", data, "--out", tmp_path / "run"]
    outcome = run("distill", *words)
    assert (outcome.code, outcome.said) == (
        2,
        [
            f"bksdm: 2 of 2 pictures of {data} were made black by a model's safety checker (0.png, 1.png), and show "
            f"nothing; take them and their captions away"
        ],
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("layout", [as_the_table_says, as_the_pictures_say, as_another_table_lists_them])
def test_such_pictures_are_refused_when_they_are_opened(
    layout: Callable[[Path, Path], Path], black: Path, tmp_path: Path
) -> None:
    data = layout(black, tmp_path / "data")
    for picture in read_source(data).pictures:
        with pytest.raises(InputError) as refused:
            picture.open()
        assert str(refused.value) == (
            f"{data / picture.name} was made black by a model's safety checker, and shows nothing; take it away"
        )


def test_such_pictures_are_refused_in_tars_too(black: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for file in as_the_pictures_say(black, tmp_path / "data").iterdir():
            tar.add(file, file.name)
    with pytest.raises(InputError, match=r"^a.tar/[01].png was made black by a model's safety checker"):
        read_source(tmp_path / "a.tar").pictures[0].open()


@pytest.mark.parametrize("layout", [as_the_table_says, as_another_table_lists_them])
def test_prepare_skips_them(
    layout: Callable[[Path, Path], Path], done: Run, black: Path, exported_model: Path, pictures: Path, tmp_path: Path
) -> None:
    data = layout(black, tmp_path / "data")
    shutil.copy(pictures / "0.png", data / "2.png")
    table = next(data.glob("metadata.*"))
    line = '{"file_name": "2.png", "text": "green"}\n' if table.suffix == ".jsonl" else "2.png,green\n"
    table.write_text(table.read_text() + line)
    done("prepare", data, "--teacher", exported_model, "--out", tmp_path / "out", "--max_broken", 0.7, "--workers", 0)
    skipped = read_lines(tmp_path / "out" / "skipped.jsonl")
    assert [line["name"] for line in skipped] == ["0.png", "1.png"]
    assert all("was made black by a model's safety checker" in line["reason"] for line in skipped)
    assert read_prepared(tmp_path / "out").pictures == 1


def test_a_subject_is_not_learnt_from_them(run: Run, black: Path, exported_model: Path, tmp_path: Path) -> None:
    words = ["personalize", exported_model, "--images", black, "--prompt", "sks car", "--out", tmp_path / "run"]
    outcome = run(*words)
    assert (outcome.code, outcome.said) == (
        2,
        [f"bksdm: {black}/00000.png was made black by a model's safety checker, and shows nothing; take it away"],
    )


def test_fidelity_does_not_score_them(run: Run, flagging: Path, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a {subject}\n")
    words = ["--prompts", tmp_path / "prompts.txt", "--images", pictures, "--subject", "car", "--encoder", "emoji"]
    outcome = run("fidelity", flagging, *words, "--images_per_prompt", 1, "--steps", 1, "--out", tmp_path / "o")
    assert outcome.code == 2
    assert f"1 of 1 pictures of model {flagging} were made black" in outcome.said[-1]


def test_the_page_says_it_under_the_picture(flagging: Path, tmp_path: Path) -> None:
    drawer = Drawer.load(str(flagging), Defaults(1, 1.0), DemoOptions(device="cpu"))
    made = draw(drawer, Wish("red car red car red car, été", 0, 1, 1.0, None, 1.0), tmp_path, lambda: None)
    assert list(made.notes) == [
        "the model's safety checker has made it black",
        "the prompt is longer than the model reads; cut off: , été",
    ]


# Finished pictures


def test_pictures_of_one_colour_are_named(done: Run, pictures: Path, tmp_path: Path) -> None:
    good = [Image.open(pictures / f"{number}.png") for number in range(2)]
    folder = captioned(tmp_path / "finished", [Image.new("RGB", (32, 32)), *good, Image.new("RGB", (32, 32), "red")])
    words = ["--reference", pictures, "--encoder", "emoji", "--scores", "clip_score", "--resamples", 2]
    said = "2 of 4 pictures of its are of one colour, such as black: 0.png, 3.png"
    for _ in range(2):
        outcome = done("evaluate", f"its={folder}", *words, "--out", tmp_path / "o")
        assert outcome.said == [said]
    assert json.loads((tmp_path / "o" / "scores.json").read_text())["models"]["its"]["of_one_colour"] == [
        "0.png",
        "3.png",
    ]
    assert "4, 2 of one colour" in (tmp_path / "o" / "report.html").read_text()
