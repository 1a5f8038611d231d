"""`bksdm export`: what every format has in common, and ONNX, which all others can be held against."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import psutil
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file

from bksdm.common.errors import InputError
from bksdm.export import formats, parity, to_onnx, to_tensorrt
from bksdm.export import run as verb
from bksdm.export.components import components
from bksdm.export.formats import Needs, Source, format_named
from bksdm.export.run import Exported, export
from bksdm.families import families_for
from bksdm.models.pipelines import load_pipeline, save_pipeline
from bksdm.options.export import ExportOptions
from bksdm.options.pruning import PruneOptions
from bksdm.pruning.run import prune
from bksdm.runtime.onnx_networks import OnnxNetworks
from tiny_models import V1_UNET, V2_UNET, XL_TWO_STAGES, build_pipeline, build_xl_pipeline
from verbs import Run

pytest_plugins = ["verbs_fixtures"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of a tiny random teacher, by the recipe that has all peculiarities."""
    folder = tmp_path_factory.mktemp("export")
    save_pipeline(build_pipeline(V1_UNET), folder / "teacher")
    prune(PruneOptions(str(folder / "teacher"), "tiny", str(folder / "tiny")))
    return folder / "tiny"


def unet_parameters(folder: Path) -> int:
    tensors = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    return sum(tensor.numel() for tensor in tensors.values())


def weights_size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.data"))


# Components


def test_examples_have_the_shapes_of_the_pictures() -> None:
    made = components(build_pipeline(V1_UNET), 64, 32, batch_size=3)
    assert list(made) == ["text_encoder", "unet", "vae_decoder", "vae_encoder"]
    assert made["unet"].inputs["sample"].shape == (3, 4, 16, 8)
    assert made["vae_encoder"].inputs["sample"].shape == (3, 3, 64, 32)
    for component in made.values():
        with torch.no_grad():
            found = component.module(*component.inputs.values())
        assert len(found) == len(component.outputs)


# Parity


def test_parity_of_equal_pictures_has_no_end() -> None:
    picture = np.full((1, 4, 4, 3), 7, np.uint8)
    found = parity.compare(picture, picture)
    assert (found.largest, found.psnr) == (0, float("inf"))
    assert json.dumps(found.to_dict()) == '{"largest": 0, "psnr": null}'


def test_parity_by_hand() -> None:
    ours, theirs = np.zeros((1, 2, 2, 3), np.uint8), np.zeros((1, 2, 2, 3), np.uint8)
    theirs[0, 0, 0, 0] = 6  # mean square 36 / 12 = 3
    found = parity.compare(ours, theirs)
    assert found.largest == 6
    assert found.psnr == pytest.approx(10 * np.log10(255**2 / 3))


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("build", [partial(build_pipeline, V2_UNET), partial(build_xl_pipeline, XL_TWO_STAGES)])
def test_the_picture_that_is_compared_is_that_of_diffusers(build: Callable[[str], Any], steps: int) -> None:
    pipeline = build("v_prediction")
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    ours = parity.draw(pipeline, parity.TorchNetworks(pipeline), latents.numpy(), steps)
    theirs = pipeline(
        parity.PROMPT, latents=latents, num_inference_steps=steps, guidance_scale=2.5, output_type="np"
    ).images
    assert np.abs(ours - (theirs * 255).round()).max() <= 1


# ONNX


def test_onnx_is_torch_to_within_two_of_255(onnx_folder: Path, exported_model: Path) -> None:
    found = json.loads((onnx_folder / "export.json").read_text())
    assert found["format"] == "onnx"
    assert (found["precision"], found["recipe"], found["height"]) == ("fp32", None, None)
    assert found["parameters"]["unet"] == unet_parameters(exported_model)
    assert found["parity"]["largest"] <= 2


@pytest.mark.parametrize(("batch", "height", "width"), [(1, 8, 8), (3, 16, 8), (2, 8, 24)])
def test_onnx_takes_other_sizes_than_it_was_traced_with(
    onnx_folder: Path, exported: StableDiffusionPipeline, batch: int, height: int, width: int
) -> None:
    rng = torch.Generator().manual_seed(1)
    given = {
        "sample": torch.randn(batch, 4, height, width, generator=rng),
        "timestep": torch.tensor([700.5]),
        "encoder_hidden_states": torch.randn(batch, 8, 32, generator=rng),
    }
    session = onnxruntime.InferenceSession(onnx_folder / "unet" / "model.onnx")
    (ours,) = session.run(None, {name: value.numpy() for name, value in given.items()})
    with torch.no_grad():
        theirs = exported.unet(*given.values()).sample
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-4)


def test_weights_lie_beside_the_graph(onnx_folder: Path) -> None:
    for name in ("text_encoder", "unet", "vae_decoder", "vae_encoder"):
        graph = onnx.load(onnx_folder / name / "model.onnx", load_external_data=False).graph
        outside = [tensor for tensor in graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
        assert sum(np.prod(tensor.dims) for tensor in outside) > 0.9 * sum(
            np.prod(tensor.dims) for tensor in graph.initializer
        )


def test_the_same_command_again_leaves_the_folder_as_it_is(exported_model: Path, onnx_folder: Path) -> None:
    before = (onnx_folder / "unet" / "model.onnx").stat().st_mtime_ns
    again = export(ExportOptions(str(exported_model), "onnx", str(onnx_folder)))
    assert (onnx_folder / "unet" / "model.onnx").stat().st_mtime_ns == before
    assert isinstance(again, Exported)
    assert again.parity is not None
    assert again.parity.largest <= 2


@pytest.mark.parametrize(("change", "share"), [(to_onnx.to_half, 0.51), (to_onnx.to_integers, 0.4)])
def test_smaller_weights_are_smaller_and_near(
    exported: StableDiffusionPipeline, onnx_folder: Path, tmp_path: Path, change: Callable[[Path], None], share: float
) -> None:
    folder = Path(shutil.copytree(onnx_folder, tmp_path / "smaller"))
    change(folder / "unet" / "model.onnx")
    before, after = (weights_size(made / "unet") for made in (onnx_folder, folder))
    assert after < share * before
    assert parity.check_parity(exported, OnnxNetworks(folder), 32, 32).psnr > 30


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_the_verb_writes_smaller_weights(model: Path, tmp_path: Path, precision: str) -> None:
    whole = export(ExportOptions(str(model), "onnx", str(tmp_path / "whole")))
    made = export(ExportOptions(str(model), "onnx", str(tmp_path / precision), precision=precision))
    assert made.parity is not None
    assert made.parity.psnr > 30
    assert made.bytes < whole.bytes


@pytest.mark.parametrize("to", ["coreml", "gguf", "executorch", "taesd", "tensorrt"])
def test_formats_that_tell_a_caption_alone_refuse_models_that_are_told_more(to: str) -> None:
    kind = format_named(to)
    told = [kind.why_not_family(family) for family in families_for("export") if to in family.exports]
    assert told == ["not for SDXL yet; export to onnx or openvino", None]


def test_the_verb_says_so(run: Run, xl_exported_model: Path, tmp_path: Path) -> None:
    said = run("export", xl_exported_model, "--to", "tensorrt", "--out", tmp_path / "trt").said
    assert said[-1].endswith("exported to tensorrt: not for SDXL yet; export to onnx or openvino")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("precision", ["keep", "fp16"])
def test_a_folder_of_sdxl_becomes_a_folder(xl_exported_model: Path, tmp_path: Path, precision: str) -> None:
    made = export(ExportOptions(str(xl_exported_model), "diffusers", str(tmp_path / "out"), precision=precision))
    assert made.parity is not None
    assert made.parity.psnr > 30
    assert load_pipeline(tmp_path / "out").text_encoder_2.config.projection_dim == 16


def test_what_overflows_stays_in_float32(xl_exported: StableDiffusionXLPipeline) -> None:
    upcast = {name: component.upcast for name, component in components(xl_exported, 32, 32).items()}
    assert [name for name in upcast if upcast[name]] == ["vae_decoder", "vae_encoder"]


# TensorRT


def test_tensorrt_scripts_name_every_input_with_its_sizes() -> None:
    networks = components(build_pipeline(V1_UNET), 32, 32)
    text = to_tensorrt.script(networks, 2, "10", " --stronglyTyped")
    assert "--minShapes=sample:1x4x8x8,encoder_hidden_states:1x8x32" in text
    assert "--maxShapes=sample:4x4x8x8,encoder_hidden_states:4x8x32" in text
    assert "--maxShapes=latent_sample:2x4x8x8" in text
    assert text.count("--stronglyTyped") == 4


@pytest.mark.slow
def test_tensorrt_graphs_say_their_number_format(model: Path, tmp_path: Path) -> None:
    made = export(ExportOptions(str(model), "tensorrt", str(tmp_path / "trt"), batch_size=2))
    assert "--stronglyTyped" in (made.out / "build_engines_trt10.sh").read_text()
    assert "--stronglyTyped" not in (made.out / "build_engines_trt11.sh").read_text()
    graph = onnx.load(made.out / "unet" / "model.onnx").graph
    kinds = {tensor.data_type for tensor in graph.initializer if np.prod(tensor.dims) > 16}
    assert onnx.TensorProto.FLOAT16 in kinds
    assert onnx.TensorProto.FLOAT not in kinds


# Bad input


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"precision": "int4"}, "precision is int4, and onnx has fp32, fp16, int8"),
        ({"height": 30}, "height is 30; give a multiple of 8"),
        ({"width": 40}, "width is 40, and this model's U-Net takes multiples of 16"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"model": "nowhere/at/all"}, "nowhere/at/all does not exist"),
        ({"scheduler": "Euler"}, "unknown scheduler 'Euler'; give one of"),
        (
            {"scheduler": "DEISMultistepScheduler"},
            "exported to onnx: scheduler DEISMultistepScheduler is not",
        ),
        ({"scheduler": "DEISMultistepScheduler"}, "give --scheduler with one of DDIMScheduler, DDPMScheduler, PNDM"),
        ({"to": "coreml", "scheduler": "DDIMScheduler"}, "scheduler is DDIMScheduler, and coreml holds none; leave"),
        (
            {"to": "gguf", "out": "x.gguf", "scheduler": "DDIMScheduler"},
            "scheduler is DDIMScheduler, and gguf holds none; leave",
        ),
        ({"pool_keys": 0}, "pool_keys is 0; give at least 1"),
        ({"to": "diffusers", "pool_keys": 2}, "pool_keys is 2, and diffusers has no pooled keys; leave"),
    ],
)
def test_options_that_cannot_be_are_refused(model: Path, tmp_path: Path, changes: dict[str, object], said: str) -> None:
    options = dataclasses.replace(ExportOptions(str(model), "onnx", str(tmp_path / "out")), **changes)
    with pytest.raises(InputError, match=said):
        export(options)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_something_else_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("words")
    with pytest.raises(InputError, match="choose another --out"):
        export(ExportOptions(str(model), "onnx", str(tmp_path)))
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_half_written_folder_is_made_anew(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "onnx"
    kind = format_named("onnx")

    def stopped(source: Source, folder: Path) -> None:
        (folder / "model_index.json").write_text("{")
        raise KeyboardInterrupt

    monkeypatch.setattr(verb, "format_named", lambda name: dataclasses.replace(kind, write=stopped))
    with pytest.raises(KeyboardInterrupt):
        export(ExportOptions(str(model), "onnx", str(out)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("form", "out"), [("onnx", "onnx"), ("ldm", "model.safetensors")])
def test_sigterm_leaves_nothing(
    run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, out: str
) -> None:
    kind = format_named(form)

    def stopped(source: Source, path: Path) -> None:
        (path / "half" if path.is_dir() else path).write_text("half")
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(verb, "format_named", lambda name: dataclasses.replace(kind, write=stopped))
    assert run("export", model, "--to", form, "--out", tmp_path / out).code == 143
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_real_export_that_is_ended_by_sigterm_leaves_nothing(exported_model: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "bksdm", "export", exported_model, "--to", "onnx", "--out", tmp_path / "onnx"]
    process = subprocess.Popen(list(map(str, words)), stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (tmp_path / ".onnx.partial" / "text_encoder").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 143
    assert said.splitlines()[-1] == "bksdm: stopped by SIGTERM"
    assert not list(tmp_path.iterdir())


def test_what_a_kill_left_goes_with_the_next_export(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.safetensors"
    for left in (".model.safetensors.partial.safetensors", "..model.safetensors.partial.safetensors.partial"):
        (tmp_path / left).write_text("half")
    export(ExportOptions(str(model), "ldm", str(out)))
    assert list(tmp_path.iterdir()) == [out]


def test_an_export_that_differs_from_torch_is_not_kept(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = format_named("onnx")

    class Wrong(parity.TorchNetworks):
        def predict(self, *given: object) -> parity.Array:
            return 1.1 * super().predict(*given)

    other = dataclasses.replace(
        kind, write=lambda source, folder: None, networks=lambda folder, source: Wrong(source.pipeline)
    )
    monkeypatch.setattr(verb, "format_named", lambda name: other)
    with pytest.raises(RuntimeError, match="differs from torch"):
        export(ExportOptions(str(model), "onnx", str(tmp_path / "out")))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("needs", "said"), [(Needs(2**60, 0), "GiB of memory"), (Needs(0, 2**60), "on the disk")])
def test_what_takes_more_than_there_is_is_refused_before_it_starts(tmp_path: Path, needs: Needs, said: str) -> None:
    with pytest.raises(InputError, match=said):
        verb.check_room(needs, tmp_path / "out")


def test_what_there_is_room_for_is_not_refused(tmp_path: Path) -> None:
    verb.check_room(Needs(psutil.virtual_memory().available // 2, 1), tmp_path / "far" / "away" / "out")


@pytest.mark.parametrize("name", ["onnx", "tensorrt"])
def test_a_missing_package_is_one_line_with_the_mend(name: str) -> None:
    kind = dataclasses.replace(format_named(name), packages={"no_such_module": "no-such-package"})
    with pytest.raises(InputError, match=rf"needs no-such-package; run pip install 'bksdm\[{name}\]'"):
        kind.check_packages()


@pytest.mark.parametrize("name", formats.FORMATS)
def test_every_format_has_a_module(name: str) -> None:
    assert format_named(name).name == name
    assert format_named(name).precisions
