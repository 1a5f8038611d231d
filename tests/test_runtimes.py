"""Exported folders and other runtimes where `generate` and `benchmark` take a model."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bksdm.common.errors import InputError
from bksdm.evaluate.benchmark import benchmark
from bksdm.export.formats import FORMATS, format_named
from bksdm.export.run import export
from bksdm.generate import runtimes
from bksdm.generate.exported import export_facts, is_exported, open_exported
from bksdm.generate.run import generate
from bksdm.generate.runtimes import Choice, choose, converted, open_drawer
from bksdm.models.folders import fingerprint
from bksdm.models.pipelines import load_pipeline
from bksdm.options.evaluate import BenchmarkOptions
from bksdm.options.export import ExportOptions
from bksdm.options.generate import GenerateOptions
from fast import slow
from tiny_models import add_safety_checker

CPU = torch.device("cpu")
DRAWING = {"prompt": ["red apple", "green car"], "steps": 3, "guidance": 3.0, "batch_size": 2}


def drawn(model: Path, out: Path, **changes: object) -> list[np.ndarray]:
    given = GenerateOptions(str(model), str(out), **(DRAWING | changes))
    return [np.asarray(Image.open(path), np.int64) for path in generate(given)]


def difference(ours: list[np.ndarray], theirs: list[np.ndarray]) -> int:
    return max(int(np.abs(one - other).max()) for one, other in zip(ours, theirs, strict=True))


# Generate


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("", "onnx_folder"),
        ("", "openvino_folder"),
        *(slow("xl_", kind) for kind in ("onnx_folder", "openvino_folder")),
    ],
)
def test_an_exported_folder_draws_what_its_model_draws(
    request: pytest.FixtureRequest, family: str, kind: str, tmp_path: Path
) -> None:
    folder, model = (request.getfixturevalue(f"{family}{name}") for name in (kind, "exported_model"))
    assert difference(drawn(folder, tmp_path / "ours"), drawn(model, tmp_path / "theirs")) <= 2
    assert kind.removesuffix("_folder") in (tmp_path / "ours" / "provenance.json").read_text()


def test_an_exported_folder_starts_from_a_picture(openvino_folder: Path, exported_model: Path, tmp_path: Path) -> None:
    Image.new("RGB", (40, 50), "orange").save(tmp_path / "orange.png")
    start = {"image": str(tmp_path / "orange.png"), "strength": 0.7}
    ours, theirs = (drawn(model, tmp_path / model.name, **start) for model in (openvino_folder, exported_model))
    assert difference(ours, theirs) <= 2


def test_a_runtime_that_is_asked_for_is_converted_to_once(
    exported_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BKSDM_CACHE", str(tmp_path / "cache"))
    ours = drawn(exported_model, tmp_path / "ours", runtime="openvino")
    assert difference(ours, drawn(exported_model, tmp_path / "theirs", runtime="torch")) <= 2
    (kept,) = (tmp_path / "cache").iterdir()
    assert export_facts(kept)["precision"] == "fp32"
    monkeypatch.setattr(runtimes, "export", None)  # is not called again
    assert converted(str(exported_model), "openvino") == kept
    assert choose(str(exported_model), CPU, "auto", None, None, 1).runtime == "openvino"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"runtime": "onnx"}, "was exported to openvino, and runtime is onnx"),
        ({"scheduler": "KDPM2DiscreteScheduler"}, "KDPM2DiscreteScheduler is not known here; give --scheduler with"),
        ({"decoder": "emoji"}, "exported with its decoder"),
        ({"height": 36}, "height is 36"),
    ],
)
def test_what_an_export_cannot_do_is_refused(
    openvino_folder: Path, tmp_path: Path, changes: dict[str, object], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        drawn(openvino_folder, tmp_path / "out", **changes)


def test_openvino_computes_in_bfloat16_if_asked(
    openvino_folder: Path, exported_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torchs = drawn(exported_model, tmp_path / "theirs")
    ours = drawn(openvino_folder, tmp_path / "ours", precision="bf16")
    assert difference(ours, torchs) <= 64  # exact where the processor has no bfloat16
    assert "computed in bf16" in (tmp_path / "ours" / "provenance.json").read_text()
    monkeypatch.setattr(runtimes, "converted", lambda *_: openvino_folder)
    assert difference(drawn(exported_model, tmp_path / "asked", precision="bf16", runtime="openvino"), ours) == 0


def test_onnxruntime_has_no_other_precision(onnx_folder: Path, exported_model: Path) -> None:
    for model, runtime in ((onnx_folder, "auto"), (exported_model, "onnx")):
        with pytest.raises(InputError, match="precision is fp16, and runtime onnx computes in fp32"):
            open_drawer(str(model), runtime, CPU, "fp16")


@pytest.mark.parametrize("name", ["UniPCMultistepScheduler", slow("DDIMScheduler")])
def test_exports_and_other_runtimes_draw_by_the_scheduler_that_is_asked_for(
    openvino_folder: Path, exported_model: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = drawn(exported_model, tmp_path / "theirs", scheduler=name)
    assert difference(drawn(openvino_folder, tmp_path / "ours", scheduler=name), theirs) <= 2
    monkeypatch.setattr(runtimes, "converted", lambda *_: openvino_folder)
    assert difference(drawn(exported_model, tmp_path / "asked", scheduler=name, runtime="openvino"), theirs) <= 2


def test_a_scheduler_that_torch_alone_has_needs_torch(exported_model: Path) -> None:
    with pytest.raises(InputError, match="KDPM2DiscreteScheduler is not known here; give --runtime torch"):
        open_drawer(str(exported_model), "openvino", CPU, "auto", scheduler="KDPM2DiscreteScheduler")


def test_a_format_that_does_not_run_here_is_refused(tmp_path: Path) -> None:
    (tmp_path / "export.json").write_text('{"format": "coreml"}')
    with pytest.raises(InputError, match="has format 'coreml'; give a folder of onnx or web or openvino"):
        open_exported(tmp_path)


def test_a_damaged_export_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "export.json").write_text("{")
    assert is_exported(tmp_path)
    with pytest.raises(InputError, match="cannot be read"):
        drawn(tmp_path, tmp_path / "out")


# A model with a safety checker, which torch alone has

UNCHECKED = "{} holds no safety checker: that of {} stays behind, and pictures are drawn unchecked\n"


@pytest.fixture
def checked(exported_model: Path, openvino_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Such a model, which was converted already."""
    monkeypatch.setenv("BKSDM_CACHE", str(tmp_path / "cache"))
    kept = runtimes._kept(fingerprint(exported_model), "openvino", None, None)
    shutil.copytree(openvino_folder, kept)
    monkeypatch.setitem(runtimes.FASTER, "openvino", 2.0)
    assert choose(str(exported_model), CPU, "auto", None, None, 1).runtime == "openvino"
    return add_safety_checker(Path(shutil.copytree(exported_model, tmp_path / "checked")))


def test_auto_stays_with_torch(checked: Path) -> None:
    found = choose(str(checked), CPU, "auto", None, None, 1)
    assert found == Choice("torch", "no other runtime has the model's safety checker")


def test_another_runtime_says_that_it_draws_unchecked(
    checked: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert drawn(checked, tmp_path / "out", runtime="openvino", steps=1)
    assert UNCHECKED.format("openvino", checked) in capfd.readouterr().err


def test_an_export_says_that_it_stays_behind(checked: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    export(ExportOptions(str(checked), "ldm", str(tmp_path / "one.safetensors")))
    assert UNCHECKED.format("ldm", checked) in capfd.readouterr().err
    export(ExportOptions(str(checked), "diffusers", str(tmp_path / "again")))
    assert "unchecked" not in capfd.readouterr().err
    assert load_pipeline(tmp_path / "again").safety_checker is not None
    assert [name for name in FORMATS if format_named(name).is_model] == ["diffusers"]


# The choice


def chosen(model: Path, calls: int, **changes: object) -> Choice:
    given = {"device": CPU, "precision": "auto", "decoder": None, "scheduler": None} | changes
    return choose(str(model), unet_calls=calls, **given)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine of one GFLOP/s, on which OpenVINO is twice as fast, and nothing is converted yet."""
    monkeypatch.setattr(runtimes, "_gflops", lambda: 1.0)
    monkeypatch.setitem(runtimes.FASTER, "openvino", 2.0)
    monkeypatch.setenv("BKSDM_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("measured")
def test_a_conversion_has_to_save_more_than_it_takes(v1_folder: Path) -> None:
    from bksdm.models.pipelines import load_denoiser_config
    from bksdm.pruning.cost import unet_cost

    config = load_denoiser_config(v1_folder)
    saved_by_call = unet_cost(config).gmacs_all  # 2 GFLOP a GMAC, half of it saved
    fixed, grows = runtimes._CONVERSION["openvino"]
    conversion = fixed + grows * unet_cost(config).params / 1e6
    enough = int(conversion / saved_by_call) + 1
    assert chosen(v1_folder, enough).runtime == "openvino"
    assert chosen(v1_folder, enough - 2).runtime == "torch"


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize(
    "changes", [{"device": torch.device("cuda")}, {"precision": "bf16"}, {"scheduler": "KDPM2DiscreteScheduler"}]
)
def test_what_only_torch_does_is_done_by_torch(v1_folder: Path, changes: dict[str, object]) -> None:
    assert chosen(v1_folder, 10**9, **changes).runtime == "torch"


@pytest.mark.usefixtures("measured")
def test_a_model_whose_scheduler_torch_alone_has_is_drawn_by_torch(folder: Path) -> None:
    assert chosen(folder, 10**9, scheduler="UniPCMultistepScheduler").runtime == "openvino"
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace("PNDMScheduler", "DEISMultistepScheduler"))
    assert chosen(folder, 10**9) == Choice("torch", "scheduler DEISMultistepScheduler is not known here")
    with pytest.raises(InputError, match="DEISMultistepScheduler is not known here; take torch, or export --scheduler"):
        converted(str(folder), "openvino")


@pytest.mark.usefixtures("measured")
def test_without_the_packages_torch_is_chosen(v1_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes, "_installed", lambda runtime: False)
    found = chosen(v1_folder, 10**9)
    assert found.runtime == "torch"
    assert "pip install 'bksdm[openvino]'" in found.reason


# Benchmark


@pytest.mark.slow
@pytest.mark.parametrize("family", ["", "xl_"], ids=["sd", "xl"])
def test_exported_folders_are_measured_beside_their_model(request: pytest.FixtureRequest, family: str) -> None:
    models = [str(request.getfixturevalue(f"{family}{name}")) for name in ("exported_model", "openvino_folder")]
    options = BenchmarkOptions(models, batch_sizes=[1], rounds=2, warmup=0, steps=2)
    ours, theirs = reversed(benchmark(options).models)
    assert (ours.precision, theirs.precision) == ("fp32", "float32")
    assert ours.params == theirs.params
    assert ours.cost == theirs.cost
    assert ours.params["text_encoder"] > 0
    assert all(spread.median > 0 for spread in ours.batches[0].seconds.values())
    assert ours.batches[0].peak_memory > 0


@pytest.mark.slow
def test_a_model_is_measured_in_several_runtimes(exported_model: Path) -> None:
    options = BenchmarkOptions([str(exported_model)], batch_sizes=[1], rounds=1, warmup=0, steps=1)
    found = benchmark(dataclasses.replace(options, runtimes=["torch", "openvino"]))
    assert [model.model for model in found.models] == [str(exported_model), f"{exported_model}, openvino"]
    assert found.auto == {str(exported_model): "openvino: the model is converted already"}
    assert "--runtime auto takes openvino: the model is converted already" in found.text()
