"""OpenVINO folders compute what torch does, and stock openvino-genai loads them."""

import copy
import ctypes
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from bksdm.export import to_openvino
from bksdm.export.calibration import denoising_steps
from bksdm.export.components import UNET, components
from bksdm.export.formats import Source
from bksdm.export.genai import for_genai, genai_draws
from bksdm.export.layout import write_scheduler
from bksdm.export.parity import TorchNetworks, check_parity
from bksdm.export.run import export
from bksdm.export.to_openvino import write_graph
from bksdm.families import family_of_pipeline
from bksdm.generate.sampling import scheduler_config, scheduler_named
from bksdm.models.adapters.lora import merge_lora
from bksdm.models.adapters.lora_files import LoraWeights
from bksdm.models.adapters.lora_out import write_lora
from bksdm.models.decoder import fresh_autoencoder, with_decoder
from bksdm.models.pipelines import save_pipeline, tokenizers
from bksdm.options.export import ExportOptions
from bksdm.runtime.openvino_networks import OpenvinoNetworks
from tiny_models import (
    LATENT,
    MAX_TOKENS,
    PICTURE,
    V1_UNET,
    V2_UNET,
    build_pipeline,
)

pytest.importorskip("openvino")
PROMPTS = ("", "red apple", "GREEN  car!", "a " * 50, "½ Üñï 🍎 don't 12", "red car\n")


@pytest.fixture(scope="module", params=["sd", "xl"])
def pipeline(request: pytest.FixtureRequest) -> DiffusionPipeline:
    """One of each family; `of_sd` leaves one. Not to be changed."""
    return request.getfixturevalue({"sd": "exported", "xl": "xl_exported"}[request.param])


of_sd = pytest.mark.parametrize("pipeline", ["sd"], indirect=True)


@pytest.fixture(scope="module")
def folder(pipeline: DiffusionPipeline, exported: DiffusionPipeline, request: pytest.FixtureRequest) -> Path:
    """The same for OpenVINO; an export of each is enough for all tests, in whichever order families come."""
    return request.getfixturevalue("openvino_folder" if pipeline is exported else "xl_openvino_folder")


def export_of(pipeline: DiffusionPipeline, made: Path, decoder: str | None = None) -> Path:
    save_pipeline(pipeline, made / "model")
    export(ExportOptions(model=str(made / "model"), to="openvino", out=str(made / "out"), decoder=decoder))
    return made / "out"


@pytest.fixture(scope="module")
def networks(folder: Path) -> OpenvinoNetworks:
    return OpenvinoNetworks(folder)


def source(pipeline: DiffusionPipeline, precision: str = "fp32", **more: object) -> Source:
    return Source("model", pipeline, None, precision, PICTURE, PICTURE, **more)


def told(pipeline: DiffusionPipeline, batch: int) -> dict[str, np.ndarray]:
    """What the U-Net is told of so many pictures."""
    shapes = family_of_pipeline(pipeline).condition_shapes(pipeline.unet.config, MAX_TOKENS)
    return {name: np.ones((batch, *shape), np.float32) for name, shape in shapes.items()}


def latents(batch: int, height: int = LATENT, width: int = LATENT) -> np.ndarray:
    return torch.randn(batch, 4, height, width, generator=torch.Generator().manual_seed(1)).numpy()


# float32


@of_sd
def test_the_picture_is_torchs(pipeline: DiffusionPipeline, folder: Path, networks: OpenvinoNetworks) -> None:
    assert json.loads((folder / "export.json").read_text())["parity"]["largest"] <= 1
    assert check_parity(pipeline, networks, PICTURE, PICTURE, steps=2).largest <= 1


def test_a_signal_is_heard_after_networks_have_gone(folder: Path) -> None:
    code = f"""
import signal
from pathlib import Path
from typing import Any
from bksdm.runtime.openvino_networks import OpenvinoNetworks

def loaded():
    networks = OpenvinoNetworks(Path({str(folder)!r}))
    networks.load(Path({str(folder)!r}) / "vae_decoder" / "openvino_model.xml")
    return networks

first = loaded()
second = loaded()
del first
del second
signal.signal(signal.SIGTERM, lambda number, frame: print("heard"))
signal.raise_signal(signal.SIGTERM)
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (process.returncode, process.stdout) == (0, "heard\n"), process.stderr


@pytest.mark.parametrize(("batch", "height", "width"), [(1, 8, 8), (3, 16, 8), (2, 8, 24)])
def test_batch_and_sides_are_open(
    pipeline: DiffusionPipeline, networks: OpenvinoNetworks, batch: int, height: int, width: int
) -> None:
    ours, torchs = networks, TorchNetworks(pipeline)
    noisy, given = latents(batch, height, width), told(pipeline, batch)
    each = len(family_of_pipeline(pipeline).encoders)
    shape = (batch, MAX_TOKENS) if each == 1 else (batch, each, MAX_TOKENS)
    tokens = np.arange(np.prod(shape), dtype=np.int64).reshape(shape)
    pixels = torchs.decode(noisy)
    for ours_found, found in (
        *((ours.encode(tokens)[name], value) for name, value in torchs.encode(tokens).items()),
        (ours.predict(noisy, 701.5, given), torchs.predict(noisy, 701.5, given)),
        (ours.decode(noisy), pixels),
        (ours.moments(pixels), torchs.moments(pixels)),
    ):
        np.testing.assert_allclose(ours_found, found, atol=2e-4)


HIDDEN = ["hidden_states.0", "hidden_states.1", "hidden_states.2"]
VAE_NAMES = {
    "vae_decoder": (["latent_sample[?,4,?,?]"], ["sample"]),
    "vae_encoder": (["sample[?,3,?,?]"], ["latent_parameters"]),
}
UNET_INPUTS = ["sample[?,4,?,?]", "timestep[1]", "encoder_hidden_states[?,8,32]"]
NAMES = {
    "sd": {
        "text_encoder": (["input_ids[?,8]"], ["last_hidden_state", "pooler_output"]),
        "unet": (UNET_INPUTS, ["out_sample"]),
    },
    "xl": {
        "text_encoder": (["input_ids[?,8]"], ["last_hidden_state", "pooler_output", *HIDDEN]),
        "text_encoder_2": (["input_ids[?,8]"], ["text_embeds", "last_hidden_state", *HIDDEN]),
        "unet": ([*UNET_INPUTS, "text_embeds[?,16]", "time_ids[?,6]"], ["out_sample"]),
    },
}


@pytest.mark.parametrize(("pipeline", "expected"), NAMES.items(), ids=list(NAMES), indirect=["pipeline"])
def test_names_and_shapes_are_those_of_optimums_folders(folder: Path, expected: dict) -> None:
    import openvino

    for name, (inputs, outputs) in (expected | VAE_NAMES).items():
        model = openvino.Core().read_model(folder / name / "openvino_model.xml")
        assert [f"{port.any_name}{port.partial_shape.to_string()}" for port in model.inputs] == inputs
        assert [port.any_name for port in model.outputs] == outputs


# openvino-genai


class _SignalStack(ctypes.Structure):
    """`stack_t` of sigaltstack(2)."""

    _fields_ = (("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@pytest.fixture(scope="module")
def genai() -> Iterator[object]:
    """openvino-genai, whose cores may end in an order that leaves no stack to handle later tests' signals on."""
    yield pytest.importorskip("openvino_genai")
    if sys.platform == "linux":
        none = _SignalStack(None, 2, 0)  # SS_DISABLE: the usual one
        assert ctypes.CDLL(None).sigaltstack(ctypes.byref(none), None) == 0


@pytest.fixture(scope="module")
def drawn(genai, folder: Path) -> object:
    return genai.Text2ImagePipeline(folder, "CPU", INFERENCE_PRECISION_HINT="f32")


def test_the_tokenizers_in_the_folder_are_the_pipelines(pipeline: DiffusionPipeline, folder: Path) -> None:
    import openvino
    import openvino_tokenizers  # noqa: F401 (brings the operations that the graph is made of)

    arguments = {"padding": "max_length", "truncation": True, "max_length": MAX_TOKENS, "return_tensors": "np"}
    for name, tokenizer in zip(family_of_pipeline(pipeline).tokenizers, tokenizers(pipeline), strict=True):
        graph = openvino.compile_model(folder / name / "openvino_tokenizer.xml", "CPU")
        prompts = [text for text in PROMPTS if tokenizer.pad_token not in text]  # which the graph takes for plain text
        wanted = tokenizer(prompts, **arguments).input_ids
        np.testing.assert_array_equal(graph(prompts)["input_ids"], wanted)


@pytest.mark.parametrize("scheduler", ["PNDMScheduler", "DDIMScheduler", "EulerDiscreteScheduler"])
def test_stock_genai_makes_torchs_picture(
    pipeline: DiffusionPipeline, genai, drawn, scheduler: str, tmp_path: Path
) -> None:
    ours = copy.copy(pipeline)
    ours.scheduler = scheduler_named(scheduler, pipeline.scheduler)
    if scheduler == "PNDMScheduler":
        ours.scheduler.register_to_config(skip_prk_steps=True)
    ours.scheduler.save_pretrained(tmp_path)
    drawn.set_scheduler(genai.Scheduler.from_config(tmp_path / "scheduler_config.json"))
    check_genai(genai, drawn, ours)


STABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@of_sd
@pytest.mark.parametrize(
    ("kind", "options", "draws"),
    [
        (PNDMScheduler, {"skip_prk_steps": True}, True),
        (PNDMScheduler, {}, False),
        (DDIMScheduler, {"clip_sample": False}, True),
        (DDIMScheduler, {}, False),
        (DDIMScheduler, {"clip_sample": False, "thresholding": True}, False),
        (DDIMScheduler, {"clip_sample": False, "rescale_betas_zero_snr": True}, True),
        (DDIMScheduler, {"clip_sample": False, "beta_schedule": "squaredcos_cap_v2"}, False),
        (LCMScheduler, {}, True),
        (EulerDiscreteScheduler, {}, True),
        (EulerDiscreteScheduler, {"use_karras_sigmas": True}, False),
        (EulerDiscreteScheduler, {"use_exponential_sigmas": True}, False),
        (EulerAncestralDiscreteScheduler, {}, True),
        (LMSDiscreteScheduler, {}, False),
        (LMSDiscreteScheduler, {"clip_sample": False}, False),
        (DPMSolverMultistepScheduler, {}, False),
        (UniPCMultistepScheduler, {}, False),
    ],
)
def test_genai_refuses_the_schedulers_that_it_is_said_not_to_draw_by(
    genai, drawn, kind: type, options: dict[str, object], draws: bool, tmp_path: Path
) -> None:
    config = scheduler_config(kind.from_config(STABLE | options))
    assert genai_draws(config) == draws
    (tmp_path / "scheduler").mkdir()
    write_scheduler(for_genai(config), tmp_path)

    def draw() -> None:
        drawn.set_scheduler(genai.Scheduler.from_config(tmp_path / "scheduler" / "scheduler_config.json"))
        drawn.generate("red apple", num_inference_steps=2)

    if draws:
        draw()
    else:
        with pytest.raises(RuntimeError, match=r"nsupported|not supported|must be one of|isn't supported"):
            draw()


@of_sd
def test_an_export_says_what_genai_does_not_draw_by(
    pipeline: DiffusionPipeline, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    scheduler = scheduler_named("LMSDiscreteScheduler", pipeline.scheduler)
    (tmp_path / "scheduler").mkdir()
    to_openvino._write_scheduler(scheduler, tmp_path)
    assert "openvino-genai does not draw by this LMSDiscreteScheduler" in capfd.readouterr().err


@of_sd
@pytest.mark.slow
def test_stock_genai_draws_with_a_small_decoder(pipeline: DiffusionPipeline, genai, tmp_path: Path) -> None:
    small = fresh_autoencoder(dict(pipeline.vae.config), channels=8, blocks=1, seed=0)
    small.save_pretrained(tmp_path / "decoder")
    decoder = str(tmp_path / "decoder")
    folder = export_of(pipeline, tmp_path, decoder)
    drawn = genai.Text2ImagePipeline(folder, "CPU", INFERENCE_PRECISION_HINT="f32")
    check_genai(genai, drawn, with_decoder(pipeline, decoder))


@of_sd
def test_stock_genai_draws_with_a_lora(pipeline: DiffusionPipeline, folder: Path, genai, tmp_path: Path) -> None:
    """Of attentions, their projections, feed-forwards and the text encoder; of a scale that is not 1 in the file."""
    torch.manual_seed(0)
    layers = {}
    for part in ("unet", "text_encoder"):
        for name, module in getattr(pipeline, part).named_modules():
            if isinstance(module, torch.nn.Linear) and "time_emb" not in name:
                outputs, inputs = module.weight.shape
                down, up = torch.randn(4, inputs) * 0.1, torch.randn(outputs, 4) * 0.3
                layers[f"{part}.{name}"] = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(2.0)}
    write_lora(LoraWeights(layers), tmp_path / "lora.safetensors", family_of_pipeline(pipeline))
    adapters = genai.AdapterConfig(genai.Adapter(tmp_path / "lora.safetensors"))
    drawn = genai.Text2ImagePipeline(folder, "CPU", adapters=adapters, INFERENCE_PRECISION_HINT="f32")
    merged = merge_lora(copy.deepcopy(pipeline), tmp_path / "lora.safetensors")
    assert not torch.equal(
        merged.text_encoder(torch.ones(1, 4, dtype=torch.long))[0],
        pipeline.text_encoder(torch.ones(1, 4, dtype=torch.long))[0],
    )
    check_genai(genai, drawn, merged)
    with pytest.raises(AssertionError):
        check_genai(genai, drawn, pipeline)


def test_stock_genai_keeps_away_from_a_negative_prompt(pipeline: DiffusionPipeline, genai, drawn, folder: Path) -> None:
    drawn.set_scheduler(genai.Scheduler.from_config(folder / "scheduler" / "scheduler_config.json"))
    check_genai(genai, drawn, pipeline, negative_prompt="green car")


def check_genai(genai, drawn, ours: DiffusionPipeline, **more: object) -> None:
    """From the same latents, genai's pipeline draws the picture of ours."""
    given = latents(1)

    class Given(genai.Generator):
        def __init__(self) -> None:
            genai.Generator.__init__(self)

        def next(self) -> float:
            raise AssertionError("no single numbers are asked for")

        def randn_tensor(self, shape: object) -> object:
            import openvino

            return openvino.Tensor(given.reshape(list(shape)))

    settings = {"num_inference_steps": 4, "guidance_scale": 3.0, **more}
    theirs = drawn.generate("red apple", generator=Given(), **settings).data
    with torch.inference_mode():
        torchs = ours("red apple", latents=torch.from_numpy(given), output_type="np", **settings).images
    # genai cuts off what is behind the point where diffusers rounds.
    difference = theirs.astype(int) - np.floor(torchs * 255).astype(int)
    assert theirs.shape == (1, PICTURE, PICTURE, 3)
    assert np.abs(difference).max() <= 1
    assert theirs.std() > 5


@of_sd
def test_stock_genai_starts_from_a_picture(folder: Path, genai) -> None:
    import openvino

    drawn = genai.Image2ImagePipeline(folder, "CPU", INFERENCE_PRECISION_HINT="f32")
    picture = np.random.default_rng(0).integers(0, 256, (1, PICTURE, PICTURE, 3), dtype=np.uint8)
    settings = {"num_inference_steps": 8, "rng_seed": 0}
    made = [
        drawn.generate("red car", openvino.Tensor(picture), strength=strength, **settings).data.copy()
        for strength in (0.3, 0.9)
    ]
    assert made[0].shape == picture.shape
    assert (made[0] != made[1]).any()


@of_sd
def test_stock_genai_paints_inside_a_mask(folder: Path, genai) -> None:
    import openvino

    drawn = genai.InpaintingPipeline(folder, "CPU", INFERENCE_PRECISION_HINT="f32")
    picture = np.random.default_rng(0).integers(0, 256, (1, PICTURE, PICTURE, 3), dtype=np.uint8)
    left = np.zeros_like(picture)
    left[:, :, : PICTURE // 2] = 255

    def painted(mask: np.ndarray, prompt: str) -> np.ndarray:
        settings = {"strength": 0.9, "num_inference_steps": 8, "rng_seed": 0}
        return drawn.generate(prompt, openvino.Tensor(picture), openvino.Tensor(mask), **settings).data.astype(int)

    inside, outside = (
        np.abs(painted(left, "red car") - painted(left, "green apple"))[:, :, side].mean()
        for side in (slice(PICTURE // 2), slice(PICTURE // 2, None))
    )
    assert inside > 2 * outside  # the decoder looks a little across the edge
    nothing = np.zeros_like(picture)
    np.testing.assert_array_equal(painted(nothing, "red car"), painted(nothing, "green apple"))


# Fewer bits


def unet_of(pipeline: DiffusionPipeline, precision: str, folder: Path) -> tuple[OpenvinoNetworks, int]:
    """The U-Net in a precision, and the bytes of its weights."""
    steps = denoising_steps(source(pipeline, calibration=("red apple",))) if precision == "w8a8" else []
    pipeline.unet.save_config(folder / UNET)
    write_graph(components(pipeline, PICTURE, PICTURE)[UNET], folder / UNET / "openvino_model.xml", precision, steps)
    return OpenvinoNetworks(folder), (folder / UNET / "openvino_model.bin").stat().st_size


def constants(file: Path) -> set[str]:
    """Number formats of what is stored, and "rounded" where what flows is rounded as well."""
    import openvino

    ops = openvino.Core().read_model(file).get_ops()
    found = {op.get_element_type().get_type_name() for op in ops if op.get_type_name() == "Constant"}
    return found | {"rounded" for op in ops if op.get_type_name() == "FakeQuantize"}


@pytest.mark.parametrize(
    ("precision", "stored", "bytes_each", "error"),
    [
        ("int8", "i8", 1.3, 0.03),
        pytest.param("fp16", "f16", 2.1, 0.003, marks=pytest.mark.slow),
        pytest.param("int4", "u4", 1.1, 0.15, marks=pytest.mark.slow),
        pytest.param("w8a8", "i8", 1.4, 0.15, marks=pytest.mark.slow),
    ],
)
@of_sd
def test_fewer_bits_are_fewer_bytes_and_near(
    pipeline: DiffusionPipeline, tmp_path: Path, precision: str, stored: str, bytes_each: float, error: float
) -> None:
    networks, size = unet_of(pipeline, precision, tmp_path)
    found = constants(tmp_path / UNET / "openvino_model.xml")
    assert stored in found
    assert ("rounded" in found) == (precision == "w8a8")
    assert size < bytes_each * sum(p.numel() for p in pipeline.unet.parameters())
    noisy, given = latents(2), told(pipeline, 2)
    exact = TorchNetworks(pipeline).predict(noisy, 501, given)
    rounded = networks.predict(noisy, 501, given)
    assert 0 < np.sqrt(np.mean((rounded - exact) ** 2) / np.mean(exact**2)) < error


@of_sd
@pytest.mark.slow
def test_w8a8_rounds_what_is_multiplied_but_at_the_ends(pipeline: DiffusionPipeline, tmp_path: Path) -> None:
    import openvino

    unet_of(pipeline, "w8a8", tmp_path)
    ops = openvino.Core().read_model(tmp_path / UNET / "openvino_model.xml").get_ordered_ops()
    convolutions, linear, attention = (
        ["FakeQuantize" in _sources(op) for op in ops if op.get_type_name() == kind]
        for kind in ("Convolution", "MatMul", "ScaledDotProductAttention")
    )
    assert convolutions == [False, *[True] * (len(convolutions) - 2), False]
    assert all(linear)
    assert len(linear) == sum(isinstance(module, torch.nn.Linear) for module in pipeline.unet.modules())
    assert attention
    assert all(attention), "queries and keys"


def _sources(op: Any) -> set[str]:
    """What kinds of operations an operation takes its inputs from, behind changes of format and shape."""
    found = set()
    for port in op.inputs():
        source = port.get_source_output().get_node()
        while source.get_type_name() in ("Convert", "Multiply", "Subtract", "Reshape", "Transpose"):
            source = source.input_value(0).get_node()
        found.add(source.get_type_name())
    return found


def test_calibration_is_the_models_own_denoising(pipeline: DiffusionPipeline) -> None:
    steps = denoising_steps(source(pipeline, calibration=("red apple", "green car")))
    each = len(steps) // 2
    assert each == (9 if type(pipeline.scheduler) is PNDMScheduler else 8)  # PNDM takes the second twice
    timesteps = [int(step["timestep"][0]) for step in steps[:each]]
    assert timesteps == sorted(timesteps, reverse=True)
    assert {step["sample"].shape for step in steps} == {(2, 4, LATENT, LATENT)}
    for name in set(steps[0]) - {"sample", "timestep", "time_ids"}:
        assert not np.array_equal(*steps[0][name])
        np.testing.assert_array_equal(steps[0][name][0], steps[each][name][0])
    inputs = components(pipeline, PICTURE, PICTURE)[UNET].inputs
    assert {name: value.shape for name, value in inputs.items()} == {n: v.shape for n, v in steps[0].items()}


@of_sd
@pytest.mark.slow
def test_a_whole_pipeline_in_four_bits(
    pipeline: DiffusionPipeline, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    save_pipeline(pipeline, tmp_path / "model")
    made = export(ExportOptions(str(tmp_path / "model"), "openvino", str(tmp_path / "out"), precision="int4"))
    assert capfd.readouterr().out == ""
    assert made.parity is not None
    assert made.parity.psnr > 15
    for name, kind in (("unet", "u4"), ("text_encoder", "i8"), ("vae_decoder", "i8"), ("vae_encoder", "i8")):
        assert kind in constants(tmp_path / "out" / name / "openvino_model.xml"), name


@pytest.mark.slow
@pytest.mark.parametrize(("unet", "prediction"), [(V1_UNET, "epsilon"), (V2_UNET, "v_prediction")])
def test_the_four_stages_of_both_generations(tmp_path: Path, unet: dict, prediction: str) -> None:
    save_pipeline(build_pipeline(unet, prediction), tmp_path / "model")
    made = export(ExportOptions(str(tmp_path / "model"), "openvino", str(tmp_path / "out")))
    assert made.parity is not None
    assert made.parity.largest <= 1
