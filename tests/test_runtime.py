"""The torch-free runner: what it draws is what diffusers draws, from any of its folders, for the same seed."""

import ast
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    SchedulerMixin,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image
from transformers import CLIPTokenizer

import bksdm.runtime
from bksdm.common.errors import InputError
from bksdm.export.run import export
from bksdm.generate.requests import Request
from bksdm.generate.sampling import sample, scheduler_named
from bksdm.models.pipelines import load_pipeline
from bksdm.options.export import ExportOptions
from bksdm.runtime import png
from bksdm.runtime.__main__ import main
from bksdm.runtime.folder import open_folder
from bksdm.runtime.folder_networks import Input, _as_declared
from bksdm.runtime.noise import Generator
from bksdm.runtime.onnx_networks import OnnxNetworks
from bksdm.runtime.pipeline import Pixels
from bksdm.runtime.schedulers import SCHEDULERS
from bksdm.runtime.tokens import Tokenizer
from fast import slow
from tiny_models import MAX_TOKENS, build_tokenizer, write_json
from verbs import told

PACKAGE = Path(bksdm.runtime.__file__).parent
MAY_IMPORT = {*sys.stdlib_module_names, "numpy", "tokenizers", "onnxruntime", "openvino"}
HEAVY = ("torch", "diffusers", "transformers", "PIL")
PROMPTS, SEEDS = ("red apple", "green car", "a red"), (7, 2**33 + 5, 0)
LARGEST = 2


@pytest.fixture
def damaged(onnx_folder: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return Path(shutil.copytree(onnx_folder, tmp_path / "copy"))


def picture(side: int = 32) -> Pixels:
    ramp = np.arange(side * side * 3) * 7 % 256
    return ramp.astype(np.uint8).reshape(side, side, 3)


def theirs(pipeline: StableDiffusionPipeline, scheduler: SchedulerMixin | None = None, **arguments: object) -> Pixels:
    """What diffusers draws."""
    stock = pipeline.scheduler
    pipeline.scheduler = scheduler or stock
    image = arguments.pop("image", None)
    requests = [Request(prompt, seed) for prompt, seed in zip(PROMPTS, SEEDS, strict=True)]
    given = None if image is None else Image.fromarray(image)
    try:
        batches = list(sample(pipeline, requests, image=given, **arguments))
    finally:
        pipeline.scheduler = stock
    return np.stack([np.asarray(drawn) for batch in batches for drawn in batch])


def ours(folder: Path, scheduler: str | None = None, **arguments: object) -> Pixels:
    pipeline = open_folder(folder, threads=1, scheduler=scheduler)
    return np.concatenate(list(pipeline.sample(PROMPTS, SEEDS, **arguments)))


def difference(one: Pixels, other: Pixels) -> int:
    assert one.shape == other.shape
    assert one.dtype == other.dtype == np.uint8
    return int(np.abs(one.astype(int) - other.astype(int)).max())


WAYS = {
    "guidance": {"steps": 4, "guidance": 5.0},
    "no guidance": {"steps": 3, "guidance": 1.0},
    "negative prompt, batches": {"steps": 3, "guidance": 4.0, "negative_prompt": "green", "batch_size": 2},
    "another size": {"steps": 2, "guidance": 3.0, "height": 48, "width": 64},
    "image to image": {"steps": 5, "guidance": 3.0, "image": picture(), "strength": 0.6, "batch_size": 2},
}


@pytest.fixture(params=["", "xl_"], ids=["sd", "xl"])
def made(request: pytest.FixtureRequest) -> Callable[[str], Any]:
    """Fixtures by their names, of each family."""
    return lambda name: request.getfixturevalue(f"{request.param}{name}")


# The slowest export of all; OpenVINO's, below, asks the same runtime the same of both families.
@pytest.mark.parametrize("made", ["", pytest.param("xl_", marks=pytest.mark.slow)], ids=["sd", "xl"], indirect=True)
@pytest.mark.parametrize("way", WAYS.values(), ids=list(WAYS))
def test_onnx_draws_what_diffusers_draws(made: Callable[[str], Any], way: dict) -> None:
    drawn = ours(made("onnx_folder"), **way)
    assert drawn.std() > LARGEST  # a picture, not one colour
    assert difference(drawn, theirs(made("exported"), **way)) <= LARGEST


def test_graphs_do_not_tell_which_files_of_python_they_came_from(onnx_folder: Path) -> None:
    graphs = [file for file in onnx_folder.glob("*/model.onnx*") if file.suffix != ".data"]
    assert len(graphs) >= 4
    assert not [file for file in graphs if b"site-packages" in file.read_bytes()]


@pytest.mark.parametrize("way", [WAYS["guidance"], slow(WAYS["image to image"], id="image")], ids=["text", None])
def test_openvino_draws_what_diffusers_draws(made: Callable[[str], Any], way: dict) -> None:
    assert difference(ours(made("openvino_folder"), **way), theirs(made("exported"), **way)) <= LARGEST


def test_the_empty_prompt_is_embedded_where_the_model_does_so(
    xl_exported_model: Path, xl_openvino_folder: Path, tmp_path: Path
) -> None:
    pictures = []
    for zeros in (True, False):
        pipeline = StableDiffusionXLPipeline.from_pretrained(xl_exported_model, force_zeros_for_empty_prompt=zeros)
        folder = Path(shutil.copytree(xl_openvino_folder, tmp_path / str(zeros)))
        index = json.loads((folder / "model_index.json").read_text())
        write_json(folder / "model_index.json", index | {"force_zeros_for_empty_prompt": zeros})
        pictures.append(ours(folder, **WAYS["guidance"]))
        assert difference(pictures[-1], theirs(pipeline, **WAYS["guidance"])) <= LARGEST
    assert difference(*pictures) > LARGEST


# From a picture, one that counts noise as others do, one in its own measure, and one that remembers.
BEGUN = ("DDIMScheduler", "EulerAncestralDiscreteScheduler", "PNDMScheduler")


@pytest.mark.parametrize(
    ("name", "from_picture"),
    [
        *(pytest.param(name, False, id=f"text-{name}") for name in SCHEDULERS),
        *((pytest.param if name in BEGUN else slow)(name, True, id=f"image-{name}") for name in SCHEDULERS),
    ],
)
def test_another_scheduler_draws_what_it_draws_in_diffusers(
    exported, exported_model: Path, onnx_folder: Path, name: str, from_picture: bool
) -> None:
    way = {"steps": 5, "guidance": 2.0} | ({"image": picture(), "strength": 0.6} if from_picture else {})
    scheduler = scheduler_named(name, PNDMScheduler.from_pretrained(exported_model / "scheduler"))
    drawn = ours(onnx_folder, scheduler=name, **way)
    assert difference(drawn, theirs(exported, scheduler, **way)) <= LARGEST
    assert (difference(drawn, theirs(exported, **way)) <= LARGEST) == (name == "PNDMScheduler")


FOLDERS = {
    "zero terminal SNR": (
        DDIMScheduler,
        {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
    ),
    "begun by Runge and Kutta": (PNDMScheduler, {"skip_prk_steps": False}),
    "between timesteps": (EulerDiscreteScheduler, {"timestep_spacing": "linspace", "use_karras_sigmas": True}),
    "with noise": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True}),
}


# The networks of both kinds are asked by one loop, of which the one that asks between timesteps says the most.
@pytest.mark.parametrize(
    ("folder", "kind", "options"),
    [
        *(pytest.param("onnx_folder", *scheduler, id=f"onnx-{name}") for name, scheduler in FOLDERS.items()),
        pytest.param("openvino_folder", *FOLDERS["between timesteps"], id="openvino-between timesteps"),
    ],
)
def test_the_scheduler_of_the_folder_is_used(
    exported, request: pytest.FixtureRequest, folder: str, kind: type, options: dict, tmp_path: Path
) -> None:
    scheduler = kind.from_config(exported.scheduler.config, clip_sample=False, **options)
    shutil.copytree(request.getfixturevalue(folder), tmp_path / "copy", ignore=shutil.ignore_patterns("scheduler"))
    scheduler.save_pretrained(tmp_path / "copy" / "scheduler")
    way = {"steps": 5, "guidance": 2.0}
    assert difference(ours(tmp_path / "copy", **way), theirs(exported, scheduler, **way)) <= LARGEST


def test_fractions_of_timesteps_are_refused_where_whole_ones_are_taken() -> None:
    whole = Input(np.dtype(np.int64), (1,))
    assert _as_declared("timestep", np.array(749.0), whole).tolist() == [749]
    with pytest.raises(InputError, match=r"timestep 749\.25, and the exported U-Net takes whole ones; export"):
        _as_declared("timestep", np.array(749.25), whole)


def test_a_scheduler_that_is_not_known_is_refused_with_those_that_are(onnx_folder: Path) -> None:
    with pytest.raises(InputError, match="DEISMultistepScheduler is not known here; give --scheduler with one of DDIM"):
        open_folder(onnx_folder, scheduler="DEISMultistepScheduler")


def test_latents_take_the_place_of_seeds(onnx_folder: Path) -> None:
    pipeline = open_folder(onnx_folder, threads=1, low_memory=True)
    latents = np.concatenate([Generator(seed).normal((1, 4, 8, 8)) for seed in SEEDS])
    from_latents = np.concatenate(list(pipeline.sample(PROMPTS, steps=2, latents=latents, batch_size=2)))
    np.testing.assert_array_equal(from_latents, ours(onnx_folder, steps=2, batch_size=2))


def test_every_step_is_told(onnx_folder: Path) -> None:
    told = []
    for _ in open_folder(onnx_folder, threads=1).sample(
        ["car"], steps=3, guidance=1.0, on_step=lambda *at: told.append(at)
    ):
        pass
    assert told == [(number, 4) for number in range(1, 5)]  # PNDM takes its second step twice


def test_low_memory_holds_one_network(onnx_folder: Path) -> None:
    networks = OnnxNetworks(onnx_folder, threads=1, low_memory=True)
    networks.encode(np.zeros((1, MAX_TOKENS), dtype=np.int64))
    networks.decode(np.zeros((1, 4, 8, 8), dtype=np.float32))
    assert list(networks._held) == [("vae_decoder", "whole")]


def test_without_an_encoder_text_to_image_goes_on(damaged: Path) -> None:
    shutil.rmtree(damaged / "vae_encoder")
    assert ours(damaged, steps=1, guidance=1.0).shape == (3, 32, 32, 3)
    with pytest.raises(InputError, match="vae_encoder"):
        ours(damaged, steps=2, image=picture())


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"height": 36}, "height is 36; give a multiple of 8"),
        ({"width": 0}, "width is 0"),
        ({"steps": 0}, "steps is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"image": picture(36)}, "height is 36"),
        ({"image": picture(), "width": 64}, "resize"),
        ({"image": picture().astype(np.float32)}, "float32"),
        ({"image": picture(), "strength": 0.0}, "strength is 0.0"),
        ({"latents": np.zeros((2, 4, 8, 8), np.float32)}, "latents have shape"),
        ({"image": picture(), "latents": np.zeros((3, 4, 8, 8), np.float32)}, "give one of them"),
    ],
)
def test_unfit_arguments_are_refused(onnx_folder: Path, arguments: dict, named: str) -> None:
    with pytest.raises(InputError, match=named):
        ours(onnx_folder, **arguments)


def test_a_seed_for_each_prompt(onnx_folder: Path) -> None:
    with pytest.raises(InputError, match="2 seeds for 1 prompts"):
        open_folder(onnx_folder, threads=1).sample(["car"], [1, 2])


def test_a_fixed_size_is_kept(damaged: Path) -> None:
    write_json(damaged / "export.json", {"format": "onnx", "height": 64, "width": 32})
    assert ours(damaged, steps=1, guidance=1.0).shape == (3, 64, 32, 3)
    with pytest.raises(InputError, match="height is 32, and this export makes 64"):
        ours(damaged, height=32)


def test_a_folder_of_optimum_needs_no_export_file(damaged: Path, onnx_folder: Path) -> None:
    (damaged / "export.json").unlink()
    np.testing.assert_array_equal(ours(damaged, steps=1), ours(onnx_folder, steps=1))


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:50])


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no U-Net": (lambda folder: (folder / "unet" / "model.onnx").unlink(), "unet"),
    "no weights": (lambda folder: (folder / "unet" / "model.onnx.data").unlink(), "unet"),
    "half a graph": (lambda folder: _cut(folder / "text_encoder" / "model.onnx"), "text_encoder"),
    "unknown format": (lambda folder: write_json(folder / "export.json", {"format": "tflite"}), "'tflite'"),
    "half an export file": (lambda folder: (folder / "export.json").write_text('{"form'), "export.json"),
    "no object": (lambda folder: (folder / "export.json").write_text("[]"), "export.json"),
    "no tokenizer": (lambda folder: (folder / "tokenizer" / "tokenizer.json").unlink(), "tokenizer.json"),
    "half a tokenizer": (lambda folder: _cut(folder / "tokenizer" / "tokenizer.json"), "tokenizer.json"),
    "no scheduler": (lambda folder: (folder / "scheduler" / "scheduler_config.json").unlink(), "scheduler_config"),
    "no config": (lambda folder: (folder / "vae_decoder" / "config.json").unlink(), "vae_decoder"),
    "an empty config": (lambda folder: write_json(folder / "vae_decoder" / "config.json", {}), "block_out_channels"),
    "guidance embedded": (
        lambda folder: write_json(folder / "unet" / "config.json", {"time_cond_proj_dim": 256}),
        "guidance scale",
    ),
}


@pytest.mark.parametrize(("damage", "named"), DAMAGES.values(), ids=list(DAMAGES))
def test_bad_folders_are_refused(damaged: Path, damage: Callable[[Path], object], named: str) -> None:
    damage(damaged)
    with pytest.raises(InputError, match=named) as caught:
        ours(damaged, steps=1)
    assert "\n" not in str(caught.value)


def test_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no folder"):
        open_folder(tmp_path / "nowhere")
    with pytest.raises(InputError, match="neither"):
        open_folder(tmp_path)


def test_damaged_openvino_is_refused(openvino_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(openvino_folder, tmp_path / "copy"))
    _cut(folder / "text_encoder" / "openvino_model.xml")
    with pytest.raises(InputError, match="text_encoder"):
        ours(folder, steps=1)


PROMPTS_READ = (
    "red apple",
    "",
    "a very long prompt, longer than eight tokens are, that has to be cut off somewhere",
    "  Crème   BRÛLÉE\n\t日本 🍎 <|endoftext|> it's 42!",
    "<|startoftext|>",
)


@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
def test_tokens_are_those_of_transformers(tmp_path: Path, pad: str) -> None:
    tokenizer = build_tokenizer()
    tokenizer.pad_token = pad
    tokenizer.save_pretrained(tmp_path)
    _tokens_agree(CLIPTokenizer.from_pretrained(tmp_path), tmp_path, MAX_TOKENS)


def test_tokens_of_the_embedded_model_are_those_of_transformers(tmp_path: Path) -> None:
    tokenizer = load_pipeline("emoji", with_denoiser=False).tokenizer
    tokenizer.save_pretrained(tmp_path)
    _tokens_agree(tokenizer, tmp_path, tokenizer.model_max_length)


def _tokens_agree(tokenizer: CLIPTokenizer, folder: Path, length: int) -> None:
    expected = tokenizer(
        list(PROMPTS_READ), padding="max_length", truncation=True, max_length=length, return_tensors="np"
    )
    found = Tokenizer(folder, length)(PROMPTS_READ)
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, expected.input_ids)


def test_noise_is_that_of_torch() -> None:
    rng = np.random.default_rng(0)
    for number in range(60):
        seed = number if number % 2 else int(rng.integers(-(2**40), 2**63 - 1))
        other, own = torch.Generator().manual_seed(seed), Generator(seed)
        for _ in range(5):
            shape = tuple(int(side) for side in rng.integers(1, 7, size=rng.integers(1, 5)))
            expected = torch.randn(shape, generator=other).numpy()
            found = own.normal(shape)
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-6)


def test_a_png_holds_its_pixels_and_texts(tmp_path: Path) -> None:
    drawn = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    (tmp_path / "x.png").write_bytes(png.encode(drawn, {"prompt": "crème 🍎", "seed": "1"}))
    with Image.open(tmp_path / "x.png") as read:
        read.load()
        np.testing.assert_array_equal(np.asarray(read), drawn)
        assert read.text == {"prompt": "crème 🍎", "seed": "1"}


def test_the_command_draws_without_torch(onnx_folder: Path, tmp_path: Path) -> None:
    refused = "".join(f"sys.modules[{name!r}] = None\n" for name in HEAVY)
    script = f"import sys\n{refused}from bksdm.runtime.__main__ import main\nsys.exit(main(sys.argv[1:]))"
    given = ["--prompt", PROMPTS[0], "--seed", str(SEEDS[0]), "--steps", "4", "--guidance", "5", "--threads", "1"]
    out = tmp_path / "new" / "x.png"
    command = [sys.executable, "-c", script, str(onnx_folder), *given, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == str(out)
    assert told(out)["prompt"] == PROMPTS[0]
    with Image.open(out) as read:
        drawn = np.asarray(read)
    assert difference(drawn, ours(onnx_folder, steps=4, guidance=5.0)[0]) == 0
    assert list(out.parent.iterdir()) == [out]


def test_the_command_starts_from_a_picture(onnx_folder: Path, tmp_path: Path) -> None:
    Image.fromarray(picture(50)).save(tmp_path / "start.png")
    out = tmp_path / "x.png"
    given = ["--prompt", "car", "--image", str(tmp_path / "start.png"), "--steps", "2", "--threads", "1"]
    assert main([str(onnx_folder), *given, "--out", str(out)]) == 0
    with Image.open(out) as read:
        assert read.size == (32, 32)


def test_sixteen_bits_of_grey_start_as_eight_do(onnx_folder: Path, tmp_path: Path) -> None:
    grey = picture(50)[:, :, 0]
    drawn = []
    for levels in (grey, grey.astype(np.uint16) * 257):
        Image.fromarray(levels).save(tmp_path / "start.png")
        given = ["--prompt", "car", "--image", str(tmp_path / "start.png"), "--steps", "2", "--threads", "1"]
        assert main([str(onnx_folder), *given, "--out", str(tmp_path / "x.png")]) == 0
        with Image.open(tmp_path / "x.png") as read:
            drawn.append(np.asarray(read))
    assert np.array_equal(*drawn)


@pytest.mark.parametrize(
    "given",
    [
        ["--steps", "0"],
        ["--image", "nowhere.png"],
        ["--out", "x.jpg"],
        ["--height", "33"],
        ["--threads", "0"],
        ["--image", "nowhere.png", "--width", "0"],
    ],
)
def test_the_command_refuses_in_one_line(
    onnx_folder: Path, given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([str(onnx_folder), "--prompt", "car", *given]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_package_imports_little() -> None:
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                own = name == "bksdm.common.errors" or name.startswith("bksdm.runtime")
                on_use = name == "PIL" and file.name in {"__main__.py", "rgb.py"}
                assert own or on_use or name.split(".")[0] in MAY_IMPORT, f"{file.name} imports {name}"


@pytest.mark.slow
def test_the_embedded_model_draws_the_same_pictures(tmp_path: Path) -> None:
    pipeline = load_pipeline("emoji")
    folder = export(ExportOptions("emoji", "onnx", str(tmp_path / "onnx"))).out
    side = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    ways = (
        {"steps": 20, "guidance": 5.0},
        {"steps": 10, "guidance": 1.0},
        {"steps": 10, "guidance": 5.0, "negative_prompt": "green", "batch_size": 2},
        {"steps": 10, "guidance": 5.0, "image": picture(side), "strength": 0.7},
    )
    for way in ways:
        assert difference(ours(folder, **way), theirs(pipeline, **way)) <= LARGEST, way
