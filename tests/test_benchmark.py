"""Latency, memory and cost side by side: what is measured, in which order, and how it is written down."""

import contextlib
import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline

from bksdm.cli import main, parse
from bksdm.common.errors import InputError
from bksdm.evaluate.benchmark import BatchResult, Benchmark, ModelResult, benchmark, latencies
from bksdm.evaluate.peak import Work, peaks
from bksdm.evaluate.rivals import PARTS, Drawing, TorchRival
from bksdm.evaluate.timing import Interval, Spread
from bksdm.models.pipelines import load_pipeline, save_pipeline, text_encoders
from bksdm.options.evaluate import BenchmarkOptions
from bksdm.pruning.cost import UNetCost, unet_cost
from bksdm.runtime.defaults import SAMPLING_FILE, Defaults
from fast import slow
from tiny_models import LATENT, MAX_TOKENS, PICTURE, V1_UNET, build_pipeline
from verbs import Run

pytest_plugins = ["verbs_fixtures"]

ROUNDS = 2
WIDE_UNET = V1_UNET | {"block_out_channels": (64, 128, 128, 128)}


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model like the v1 teacher with some four times its U-Net's weights."""
    folder = tmp_path_factory.mktemp("wide") / "model"
    save_pipeline(build_pipeline(WIDE_UNET), folder, {SAMPLING_FILE: Defaults(9, 2.5).text()})
    return folder


@pytest.fixture(scope="module")
def out(v1_folder: Path, wide_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a benchmark of two models; what was printed is in printed.json."""
    folder = tmp_path_factory.mktemp("benchmark") / "run"
    words = ["benchmark", v1_folder, wide_folder, "--batch-sizes", 4, 1, "--rounds", ROUNDS, "--steps", 1]
    words += ["--precision", "fp32", "--device", "cpu", "--out", folder, "--json"]
    with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    assert not stop.value.code
    (folder / "printed.json").write_text(printed.getvalue())
    return folder


@pytest.fixture(scope="module")
def measured(out: Path) -> dict[str, Any]:
    return json.loads((out / "benchmark.json").read_text())


@pytest.fixture(scope="module")
def batches(measured: dict[str, Any]) -> list[dict[str, Any]]:
    """Of both models."""
    return [batch for model in measured["models"] for batch in model["batches"]]


# What is measured


def test_models_come_in_the_order_given(measured: dict[str, Any], v1_folder: Path, wide_folder: Path) -> None:
    assert [model["model"] for model in measured["models"]] == [str(v1_folder), str(wide_folder)]


def test_batch_sizes_rise(measured: dict[str, Any]) -> None:
    for model in measured["models"]:
        assert [batch["batch_size"] for batch in model["batches"]] == [1, 4]


def test_the_setting_is_told(measured: dict[str, Any]) -> None:
    told = {key: measured[key] for key in ("device", "precision", "rounds", "warmup")}
    assert told == {"device": "cpu", "precision": "float32", "rounds": ROUNDS, "warmup": 1}
    assert measured["hardware"].endswith(f"threads: {torch.get_num_threads()}")
    assert {(model["height"], model["width"]) for model in measured["models"]} == {(PICTURE, PICTURE)}


def test_each_model_draws_as_it_draws_best_where_nothing_is_asked_for(measured: dict[str, Any]) -> None:
    assert [(model["steps"], model["guidance"]) for model in measured["models"]] == [(1, 7.5), (1, 2.5)]


def test_macs_are_those_of_describe(measured: dict[str, Any]) -> None:
    for model, config in zip(measured["models"], (V1_UNET, WIDE_UNET), strict=True):
        cost = unet_cost(config, tokens=MAX_TOKENS)
        assert model["unet_gmacs_modules"] == cost.gmacs_modules
        assert model["unet_gmacs_all"] == cost.gmacs_all


def test_parameters_are_those_of_the_parts(measured: dict[str, Any], v1_teacher: StableDiffusionPipeline) -> None:
    found = measured["models"][0]["params"]
    assert found["unet"] == v1_teacher.unet.num_parameters()
    assert found["text_encoder"] == v1_teacher.text_encoder.num_parameters()
    vae = dict(v1_teacher.vae.named_parameters())
    encodes = sum(p.numel() for name, p in vae.items() if name.startswith(("encoder.", "quant_conv.")))
    assert found["decoder"] == sum(p.numel() for p in vae.values()) - encodes


def test_medians_lie_between_quartiles(batches: list[dict[str, Any]]) -> None:
    for batch in batches:
        assert list(batch["seconds"]) == list(PARTS)
        for seconds in batch["seconds"].values():
            assert 0 < seconds["lower"] <= seconds["median"] <= seconds["upper"]


def test_a_rate_is_pictures_by_seconds(batches: list[dict[str, Any]]) -> None:
    for batch in batches:
        assert batch["images_per_second"] == batch["batch_size"] / batch["seconds"]["whole"]["median"]


def test_models_are_compared_with_the_first(measured: dict[str, Any]) -> None:
    first, second = measured["models"]
    for own, other in zip(first["batches"], second["batches"], strict=True):
        assert all(ratio["low"] == ratio["median"] == ratio["high"] == 1 for ratio in own["speedup"].values())
        for part, ratio in other["speedup"].items():
            assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]
            assert ratio["confidence"] == 0.5
            fastest, slowest = (own["seconds"][part][end] for end in ("lower", "upper"))
            assert ratio["low"] <= slowest / other["seconds"][part]["lower"]
            assert ratio["high"] >= fastest / other["seconds"][part]["upper"]


def test_a_larger_model_and_a_larger_batch_take_more_memory(measured: dict[str, Any]) -> None:
    small, large = ([batch["peak_memory"] for batch in model["batches"]] for model in measured["models"])
    weights = [4 * model["params"]["unet"] for model in measured["models"]]
    assert large[0] - small[0] > 0.8 * (weights[1] - weights[0])
    assert small[0] > weights[0]
    assert small[1] >= small[0]
    assert large[1] > large[0]


@pytest.mark.parametrize(
    ("kind", "batch_size", "guidance"),
    [
        ("exported", 1, 7.5),
        ("exported", 3, 1.0),
        pytest.param("shallow_xl", 3, 7.5, id="xl-3-7.5"),
        slow("shallow_xl", 1, 1.0, id="xl-1-1.0"),
    ],
)
def test_parts_are_called_as_the_pipeline_calls_them(
    request: pytest.FixtureRequest, kind: str, guidance: float, batch_size: int
) -> None:
    pipeline = load_pipeline(request.getfixturevalue(f"{kind}_folder"))
    calls: list[tuple[str, Any]] = []

    def watch(name: str) -> Any:
        def hook(module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            flat = kwargs | (kwargs.get("added_cond_kwargs") or {})
            given = [*args, *(flat[key] for key in sorted(flat))]
            calls.append((name, [(value.shape, value.dtype) for value in given if isinstance(value, torch.Tensor)]))

        return hook

    encoders = {f"text {number}": network for number, network in enumerate(text_encoders(pipeline))}
    for name, network in (encoders | {"unet": pipeline.unet, "decoder": pipeline.vae.decoder}).items():
        network.register_forward_pre_hook(watch(name), with_kwargs=True)
    tasks = TorchRival("v1", pipeline, Drawing(Defaults(1, guidance), PICTURE, 2 * PICTURE)).tasks(batch_size)
    calls.clear()
    with torch.inference_mode():
        for part in ("text_encoder", "unet_step", "decoder"):
            tasks[part]()
        of_parts = list(calls)
        calls.clear()
        tasks["whole"]()
    assert of_parts == calls
    assert calls[-2][1][0][0] == (batch_size * (2 if guidance > 1 else 1), 4, LATENT, 2 * LATENT)


def test_latencies_are_medians_by_name(v1_folder: Path, wide_folder: Path) -> None:
    pipelines = {"wide": load_pipeline(wide_folder), "narrow": load_pipeline(v1_folder)}
    found = latencies(pipelines, steps=1, rounds=2, warmup=0)
    assert list(found) == ["wide", "narrow"]
    assert all(0 < spread.lower <= spread.median <= spread.upper for spread in found.values())


# What is written


def test_what_is_printed_is_what_is_written(out: Path, measured: dict[str, Any]) -> None:
    printed = (out / "printed.json").read_text()
    assert printed.count("\n") == 1
    assert json.loads(printed) == measured


def test_the_table_holds_what_the_object_holds(out: Path, measured: dict[str, Any]) -> None:
    with (out / "benchmark.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4
    expected = [(model, batch) for model in measured["models"] for batch in model["batches"]]
    for row, (model, batch) in zip(rows, expected, strict=True):
        assert row["model"] == model["model"]
        assert int(row["batch_size"]) == batch["batch_size"]
        assert int(row["peak_memory"]) == batch["peak_memory"]
        assert float(row["unet_gmacs_all"]) == model["unet_gmacs_all"]
        assert int(row["params.unet"]) == model["params"]["unet"]
        assert int(row["steps"]) == 1
        for part in PARTS:
            assert float(row[f"seconds.{part}.median"]) == batch["seconds"][part]["median"]
            assert float(row[f"speedup.{part}.high"]) == batch["speedup"][part]["high"]


def test_the_folder_says_what_it_is_made_from(out: Path, v1_folder: Path, wide_folder: Path) -> None:
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["verb"] == "benchmark"
    assert config["models"] == [str(v1_folder), str(wide_folder)]
    assert len(set(config["models_content"])) == 2
    assert json.loads((out / "provenance.json").read_text())["versions"]["torch"]


def result(*names: str, rounds: int = 7) -> Benchmark:
    """Made-up figures: a model takes as many seconds as its number, counted from one."""
    cost = UNetCost(params=2_000_000, macs_modules=3_000_000_000, macs_attention=500_000_000, latent_size=(8, 8))
    params = {"text_encoder": 1_000_000, "unet": 2_000_000, "decoder": 500_000}
    models = []
    for number, name in enumerate(names, start=1):
        seconds = {part: Spread(number, 0.9 * number, 1.1 * number) for part in PARTS}
        speedup = {part: Interval(1 / number, 0.9 / number, 1.1 / number, 0.984375) for part in PARTS}
        models.append(
            ModelResult(name, 32, 48, "float32", 25, 7.5, params, cost, (BatchResult(2, 3 * 2**20, seconds, speedup),))
        )
    return Benchmark("cpu", "a processor, threads: 1", "float32", rounds, 1, tuple(models))


def lines(text: str) -> dict[str, list[str]]:
    """Cells by the name of their line."""
    rows = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in text.splitlines()]
    return {row[0]: row[1:] for row in rows if len(row) > 1}


def test_people_get_a_column_for_each_model() -> None:
    text = result("one", "two").text()
    assert text.splitlines()[0].split() == ["one", "two"]
    table = lines(text)
    assert table["pixels"] == ["32x48"] * 2
    assert (table["steps"], table["guidance"]) == (["25"] * 2, ["7.5"] * 2)
    assert table["U-Net, M parameters"] == ["2", "2"]
    assert table["U-Net, GMACs of all"] == ["3.5", "3.5"]
    assert table["whole"] == ["1 s (0.9 - 1.1)", "2 s (1.8 - 2.2)"]
    assert table["times as fast"] == ["1", "0.5 (0.45 - 0.55)"]
    assert table["pictures/s"] == ["2", "1"]
    assert table["peak memory, MiB"] == ["3.0", "3.0"]
    assert "times as fast as one: " in text
    assert "98% confidence" in text


def test_one_model_is_compared_with_none() -> None:
    assert "as fast" not in result("one").text()


def test_long_names_keep_their_ends() -> None:
    name = "runs/" + "long/" * 10 + "student"
    heading = result(name).text().splitlines()[0].strip()
    assert len(heading) == 28
    assert heading.startswith("...")
    assert name.endswith(heading[3:])


def test_milliseconds_where_there_is_less_than_a_second() -> None:
    from bksdm.evaluate.benchmark import _spread

    assert _spread(Spread(0.5, 0.25, 1.25)) == "500 ms (250 - 1250)"


# What is refused


def test_several_models_and_sizes_may_be_named() -> None:
    words = ["a", "b", "--batch-sizes", "1", "8", "--json"]
    assert parse(BenchmarkOptions, "benchmark", words) == BenchmarkOptions(["a", "b"], batch_sizes=[1, 8], json=True)
    assert parse(BenchmarkOptions, "benchmark", ["a"]) == BenchmarkOptions(["a"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--models"], "no model is named; name one or several"),
        (
            ["./nowhere"],
            "model ./nowhere does not exist; give a folder, a .safetensors file, a hub id (OWNER",
        ),
        (["emoji", "./nowhere"], "model ./nowhere does not exist"),
        (["emoji", "--batch_sizes"], "batch_sizes is empty; give one number or several, such as 1 4"),
        (["emoji", "--batch_sizes", "4", "0"], "batch_sizes has 0; give at least 1"),
        (["emoji", "--batch_sizes", "many"], "see bksdm benchmark --help"),
        (["emoji", "--rounds", "0"], "rounds is 0; give at least 1"),
        (["emoji", "--warmup", "-1"], "warmup is -1; give 0 or more"),
        (["emoji", "--steps", "0"], "steps is 0; give at least 1"),
        (["emoji", "--height", "60"], "height is 60; give a multiple of 8"),
        (["emoji", "--width", "0"], "width is 0; give a multiple of 8"),
        (["emoji", "--device", "cuda:99"], "device 'cuda:99' is not available here"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(run: Run, tmp_path: Path, words: list[str], message: str) -> None:
    outcome = run("benchmark", *words, "--out", tmp_path / "out")
    assert (outcome.code, outcome.out, len(outcome.said)) == (2, "", 1)
    assert message in outcome.said[0]
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_model_is_refused(run: Run, tmp_path: Path) -> None:
    outcome = run("benchmark", "emoji", tmp_path)
    assert outcome.said == [f"bksdm: {tmp_path} is not a diffusers pipeline (no model_index.json); give the folder of "
                            "a pipeline"]  # fmt: skip


def test_a_model_for_inpainting_is_refused(run: Run, tmp_path: Path) -> None:
    save_pipeline(build_pipeline(V1_UNET | {"in_channels": 9}), tmp_path / "inpainting")
    outcome = run("benchmark", tmp_path / "inpainting", "--out", tmp_path / "out")
    assert outcome.code == 2
    assert "has a U-Net of 9 channels, and its latents have 4; give a text-to-image model" in outcome.said[0]
    assert not (tmp_path / "out").exists()


def test_the_folder_of_another_run_is_refused(out: Path, v1_folder: Path) -> None:
    before = (out / "benchmark.json").read_bytes()
    with pytest.raises(InputError, match="holds another run"):
        benchmark(BenchmarkOptions([str(v1_folder)], str(out), device="cpu"))
    assert (out / "benchmark.json").read_bytes() == before


@pytest.mark.slow
def test_what_does_not_fit_in_memory_is_named(v1_folder: Path) -> None:
    side = 8 * 10**6  # latents of sixty terabytes
    work = Work(str(v1_folder), (1, 2), 7.5, side, side, "cpu", "float32", 1)
    with pytest.raises(InputError, match=rf"at batch size 1 and {side}x{side} pixels takes more memory than cpu has"):
        peaks(work)


@pytest.mark.slow
def test_a_fault_of_the_process_is_told(tmp_path: Path) -> None:
    work = Work(str(tmp_path / "gone"), (1,), 7.5, PICTURE, PICTURE, "cpu", "float32", 1)
    with pytest.raises(RuntimeError, match=r"gone could not be measured: .*does not exist"):
        peaks(work)
