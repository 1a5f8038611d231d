"""Students of transformers for OpenVINO and ONNX: they compute what torch does, and other programs draw from them."""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from numpy.typing import NDArray
from PIL import Image

from bksdm.common.errors import InputError
from bksdm.export.components import Component, components
from bksdm.export.layout import component_folder, write_layout
from bksdm.export.parity import TorchNetworks
from bksdm.families import family_of_pipeline
from bksdm.generate.runtimes import _NOT_MEASURED, Choice, choose, open_drawer
from bksdm.models.pipelines import load_pipeline, scheduler_config, tokenizing
from bksdm.runtime.flow import even_mu, fitted_mu, flow_way, why_no_flow
from bksdm.runtime.folder import open_folder
from bksdm.runtime.folder_networks import FolderNetworks, Input, Network
from bksdm.runtime.networks import Part
from tiny_flow import BUILDS, SIDE
from verbs import Run, done_here

pytest_plugins = ["verbs_fixtures"]

FLUX = pytest.param("flux", marks=pytest.mark.slow)
KLEIN = pytest.param("klein", marks=pytest.mark.slow)  # whose text encoder has 28 layers
every = pytest.mark.parametrize("kind", ["flux", "klein", "z"], indirect=True)
CAPTIONS = ("red", "a green car on a hill")


@pytest.fixture(scope="module", params=[FLUX, KLEIN, "z"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def student(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pipeline, folder = BUILDS[kind](), tmp_path_factory.mktemp(kind)
    factor = pipeline.vae_scale_factor * family_of_pipeline(pipeline).patch
    pipeline.transformer.register_to_config(_sample_size=SIDE // factor)
    pipeline.save_pretrained(folder / "teacher")
    done_here("prune", folder / "teacher", "--recipe", "half", "--out", folder / "half")
    return folder / "half"


@pytest.fixture(scope="module")
def pipeline(student: Path) -> DiffusionPipeline:
    return load_pipeline(student)


@pytest.fixture(scope="module")
def folder(student: Path) -> Path:
    pytest.importorskip("openvino")
    out = student.with_name("openvino")
    done_here("export", student, "--to", "openvino", "--out", out)
    return out


# What is traced


class InTorch(Network):
    """A network that is to be exported, as it is traced."""

    def __init__(self, component: Component) -> None:
        self._component = component
        self.inputs = {
            name: Input(example.numpy().dtype, tuple(example.shape)) for name, example in component.inputs.items()
        }

    @torch.no_grad()
    def run(self, inputs: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> list[NDArray[Any]]:
        given = [torch.from_numpy(inputs[name]) for name in self._component.inputs]
        found = dict(zip(self._component.outputs, self._component.module(*given), strict=True))
        return [found[name].numpy() for name in outputs]


class Traced(FolderNetworks):
    """The networks of a pipeline, called as those of a folder."""

    file = "config.json"

    def __init__(self, pipeline: DiffusionPipeline, folder: Path) -> None:
        super().__init__(folder)
        write_layout(pipeline, folder)
        self._components = components(pipeline, SIDE, SIDE)
        for component in self._components.values():
            component_folder(component, folder)

    def load(self, file: Path, part: Part = "whole") -> Network:  # noqa: ARG002
        return InTorch(self._components[file.parent.name])

    def is_parted(self, file: Path) -> bool:  # noqa: ARG002
        return False


@every
def test_what_is_traced_computes_what_the_family_answers(pipeline: DiffusionPipeline, tmp_path: Path) -> None:
    """For captions of several lengths side by side, and for pictures that are no squares."""
    ours, torchs, tokenize = Traced(pipeline, tmp_path), TorchNetworks(pipeline), tokenizing(pipeline)
    tokens = torch.stack([tokenize(caption) for caption in CAPTIONS]).numpy()
    told = torchs.encode(tokens)
    for name, value in ours.encode(tokens).items():
        np.testing.assert_allclose(value, told[name], atol=1e-5)
    channels = family_of_pipeline(pipeline).latent_channels(pipeline.transformer.config)
    for height, width in ((8, 8), (4, 12)):
        latents = torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(0)).numpy()
        wanted = torchs.predict(latents, 612.5, told)
        np.testing.assert_allclose(ours.predict(latents, 612.5, told), wanted, atol=1e-5)
        assert wanted.std() > 0.1


@every
def test_guidance_is_told_where_it_was_taught(pipeline: DiffusionPipeline, tmp_path: Path) -> None:
    ours, tokenize = Traced(pipeline, tmp_path), tokenizing(pipeline)
    told = ours.encode(torch.stack([tokenize("red")]).numpy())
    channels = family_of_pipeline(pipeline).latent_channels(pipeline.transformer.config)
    latents = np.ones((1, channels, 4, 4), np.float32)
    usual, more = (ours.predict(latents, 500.0, told | more) for more in ({}, {"guidance": np.float32([9.0])}))
    taught = family_of_pipeline(pipeline).taught_guidance(pipeline.transformer.config)
    assert np.array_equal(usual, more) is not taught


# The way from noise to picture


@pytest.mark.parametrize(
    "options",
    [
        {"shift": 3.0},
        {"use_dynamic_shifting": True},
        {"use_dynamic_shifting": True, "time_shift_type": "linear", "max_shift": 1.3},
    ],
)
@pytest.mark.parametrize("levels", [None, [1.0, 0.8, 0.25]])
def test_a_way_is_that_of_diffusers(options: dict[str, Any], levels: list[float] | None) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(**options)
    way = flow_way(scheduler_config(scheduler), 3, 1024, even_mu, levels)
    mu = even_mu({**scheduler.config}, 1024, 3)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 3, 3) if levels is None else levels, mu=mu)
    np.testing.assert_allclose(way.timesteps, scheduler.timesteps.numpy(), rtol=1e-6)
    rng = np.random.default_rng(0)
    ours = theirs = rng.standard_normal((1, 4, 2, 2), np.float32)
    for timestep in scheduler.timesteps:
        answer = rng.standard_normal(ours.shape, np.float32)
        ours = way.step(answer, ours, partial(rng.standard_normal, ours.shape))
        theirs = scheduler.step(torch.from_numpy(answer), timestep, torch.from_numpy(theirs)).prev_sample.numpy()
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("tokens", [16, 1024, 4300, 4301, 16384])
@pytest.mark.parametrize("steps", [4, 50])
def test_the_shift_of_flux2_is_that_of_its_pipelines(tokens: int, steps: int) -> None:
    assert fitted_mu({}, tokens, steps) == pytest.approx(compute_empirical_mu(tokens, steps), rel=1e-12)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"_class_name": "FlowMatchHeunDiscreteScheduler"}, "FlowMatchHeunDiscreteScheduler is not known here for"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift_terminal": 0.1}, "has shift_terminal 0.1"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "stochastic_sampling": True}, "has stochastic_sampling"),
    ],
)
def test_a_way_that_is_not_known_is_refused(config: dict[str, Any], said: str) -> None:
    assert said in str(why_no_flow(config))
    with pytest.raises(InputError, match="use torch"):
        flow_way(config, 4, 16, even_mu)


# OpenVINO


def test_the_export_is_torch(folder: Path) -> None:
    assert json.loads((folder / "export.json").read_text())["parity"]["largest"] <= 1


@pytest.mark.parametrize(("height", "width"), [(SIDE, SIDE), (3 * SIDE, SIDE // 2)])
def test_the_torch_free_runtime_draws_the_picture_of_diffusers(
    folder: Path, pipeline: DiffusionPipeline, height: int, width: int
) -> None:
    """In other sizes than were traced, and for captions of several lengths."""
    drawn = open_folder(folder, threads=1)
    how = {"height": height, "width": width}
    for seed, caption in enumerate(CAPTIONS):
        (ours,) = drawn.sample([caption], [seed], steps=2, guidance=2.0, **how)
        generator = [torch.Generator().manual_seed(seed)]
        given = {"generator": generator, "num_inference_steps": 2, "guidance_scale": 2.0, **how}
        torchs = pipeline(prompt=[caption], output_type="np", **given).images
        assert np.abs(ours - np.round(torchs * 255)).max() <= 1
        assert ours.std() > 5


def test_generate_draws_from_the_folder_what_it_draws_from_the_student(
    done: Run, folder: Path, student: Path, tmp_path: Path
) -> None:
    for model, out in ((folder, tmp_path / "ours"), (student, tmp_path / "torchs")):
        done("generate", model, "--prompt", CAPTIONS[1], "--steps", 2, "--device", "cpu", "--out", out)
    ours, torchs = (np.asarray(Image.open(tmp_path / name / "00000.png")).astype(int) for name in ("ours", "torchs"))
    assert np.abs(ours - torchs).max() <= 1


@pytest.mark.parametrize("kind", ["z"], indirect=True)
def test_auto_stays_with_torch_and_other_schedulers_are_refused(student: Path) -> None:
    asked = torch.device("cpu"), "auto", None
    assert choose(str(student), *asked, None, 1) == Choice("torch", _NOT_MEASURED)
    with pytest.raises(InputError, match="DDIMScheduler is not known here for flow matching"):
        open_drawer(str(student), "openvino", *asked[:2], scheduler="DDIMScheduler")


def test_noise_levels_that_were_learnt_go_along(folder: Path, pipeline: DiffusionPipeline, tmp_path: Path) -> None:
    levels = [1.0, 0.7]
    (ours,) = open_folder(folder, threads=1).sample(["red"], [0], sigmas=levels, steps=2, guidance=0.0)
    given = {"generator": [torch.Generator().manual_seed(0)], "height": SIDE, "width": SIDE, "sigmas": levels}
    torchs = pipeline(prompt=["red"], output_type="np", num_inference_steps=2, guidance_scale=0.0, **given).images
    assert np.abs(ours - np.round(torchs * 255)).max() <= 1


ENCODERS = {
    "flux": {
        "text_encoder": (["input_ids[?,8]"], ["last_hidden_state", "pooler_output"]),
        "text_encoder_2": (["input_ids[?,?]"], ["last_hidden_state"]),
    },
    "klein": {
        "text_encoder": (
            ["input_ids[?,?]", "attention_mask[?,?]"],
            ["last_hidden_state", *(f"hidden_states.{layer}" for layer in range(29))],
        )
    },
    "z": {"text_encoder": (["input_ids[?,?]", "attention_mask[?,?]"], ["last_hidden_state"])},
}
OF_FLUX = ["hidden_states[?,?,16]", "timestep[?]"]
TRANSFORMERS = {
    "flux": (
        [
            *OF_FLUX,
            "encoder_hidden_states[?,?,24]",
            "pooled_projections[?,32]",
            "txt_ids[?,3]",
            "img_ids[?,3]",
            "guidance[?]",
        ],
        ["out_sample"],
    ),
    "klein": ([*OF_FLUX, "encoder_hidden_states[?,?,48]", "txt_ids[?,?,4]", "img_ids[?,?,4]"], ["out_sample"]),
    "z": (
        [
            "hidden_states[?,4,?,?]",
            "timestep[?]",
            "encoder_hidden_states[?,?,16]",
            "encoder_attention_mask[?,?]",
            "txt_ids[?,?,3]",
            "img_ids[?,?,3]",
        ],
        ["sample"],
    ),
}


def test_names_and_shapes_are_those_of_optimums_folders(kind: str, folder: Path) -> None:
    import openvino

    for name, (inputs, outputs) in (ENCODERS[kind] | {"transformer": TRANSFORMERS[kind]}).items():
        model = openvino.Core().read_model(folder / name / "openvino_model.xml")
        assert [f"{port.any_name}{port.partial_shape.to_string()}" for port in model.inputs] == inputs
        assert [port.any_name for port in model.outputs] == outputs


def test_stock_genai_draws_torchs_picture(kind: str, folder: Path, pipeline: DiffusionPipeline) -> None:
    """Guidance of Z-Image is one more there than in diffusers."""
    import openvino

    genai = pytest.importorskip("openvino_genai")
    given = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))

    class Given(genai.Generator):
        def __init__(self) -> None:
            genai.Generator.__init__(self)

        def next(self) -> float:
            raise AssertionError("no single numbers are asked for")

        def randn_tensor(self, shape: object) -> object:
            return openvino.Tensor(given.numpy().reshape(list(shape)))

    how = {"height": SIDE, "width": SIDE, "num_inference_steps": 3}
    drawn = genai.Text2ImagePipeline(folder, "CPU", INFERENCE_PRECISION_HINT="f32")
    theirs = drawn.generate("red apple", generator=Given(), guidance_scale=2.0 + (kind == "z"), **how).data
    latents = {"flux": lambda: pipeline._pack_latents(given, 1, 4, 8, 8), "z": lambda: given}
    begun = latents.get(kind, lambda: pipeline._patchify_latents(given))()
    torchs = pipeline(prompt="red apple", latents=begun, guidance_scale=2.0, output_type="np", **how).images
    # genai cuts off what is behind the point where diffusers rounds.
    assert np.abs(theirs.astype(int) - np.floor(torchs * 255).astype(int)).max() <= 1
    assert theirs.std() > 5


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
def test_fewer_bits_are_fewer_bytes_and_near(student: Path, tmp_path: Path, precision: str) -> None:
    out = tmp_path / precision
    done_here("export", student, "--to", "openvino", "--precision", precision, "--out", out)
    assert json.loads((out / "export.json").read_text())["parity"]["psnr"] > 20
    weights = (out / "transformer" / "openvino_model.bin").stat().st_size
    assert weights < 3 * sum(p.numel() for p in load_pipeline(student).transformer.parameters())


# ONNX


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_onnx_is_torch_too(student: Path, pipeline: DiffusionPipeline, tmp_path: Path, precision: str) -> None:
    done_here("export", student, "--to", "onnx", "--precision", precision, "--out", tmp_path / "onnx")
    parity = json.loads((tmp_path / "onnx" / "export.json").read_text())["parity"]
    assert parity["largest"] <= 2 or precision != "fp32"
    assert parity["psnr"] is None or parity["psnr"] > 20
    if precision == "fp32":
        test_the_torch_free_runtime_draws_the_picture_of_diffusers(tmp_path / "onnx", pipeline, 3 * SIDE, SIDE // 2)


# Bad input


@pytest.mark.parametrize(
    ("kind", "arguments", "said"),
    [
        ("z", {"image": np.zeros((SIDE, SIDE, 3), np.uint8)}, "does not start from a picture here"),
        # The one export of FLUX.1 that the quick tests would need, and generate refuses the same.
        pytest.param("flux", {"negative_prompt": "blue"}, "takes no negative prompt", marks=pytest.mark.slow),
        ("z", {"height": SIDE + 4}, "height is 36; give a multiple of 8"),
        ("z", {"steps": 0}, "steps is 0; give at least 1"),
    ],
    indirect=["kind"],
)
def test_what_the_runtime_cannot_do_is_refused(folder: Path, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        open_folder(folder, threads=1).sample(["red"], [0], **arguments)


@pytest.mark.parametrize("kind", ["z"], indirect=True)
def test_a_folder_that_says_nothing_of_chats_is_refused(folder: Path, tmp_path: Path) -> None:
    for part in folder.iterdir():
        (tmp_path / part.name).symlink_to(part)
    (tmp_path / "export.json").unlink()
    with pytest.raises(InputError, match="does not say how captions are written"):
        open_folder(tmp_path)
