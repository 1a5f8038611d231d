"""`bksdm benchmark`: what models cost and how fast they are, side by side.

Every round does everything once with every model in turn: the text encoder, one step of the U-Net, the decoder, and
a whole picture from prompt to pixels. Ratios to the first model are taken within a round, see `timing`; the peak of
memory is measured in processes of their own, see `peak`.
"""

import csv
import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from bksdm.common.devices import choose_device, choose_precision
from bksdm.common.errors import InputError
from bksdm.common.progress import bar
from bksdm.common.runs import open_run, provenance, run_files, write_text
from bksdm.common.tables import aligned
from bksdm.evaluate.peak import Work, peaks
from bksdm.evaluate.rivals import PARTS, Drawing, Rival, Task, TorchRival, load_rivals
from bksdm.evaluate.timing import Interval, Spread, take_turns
from bksdm.generate.exported import is_exported
from bksdm.generate.requests import check as check_generation
from bksdm.generate.runtimes import choose
from bksdm.models.configs import check_ready
from bksdm.models.drawing import drawings, say_unlike
from bksdm.models.folders import decoder_fingerprint, fingerprint
from bksdm.options.evaluate import BenchmarkOptions
from bksdm.options.generate import GenerateOptions
from bksdm.pruning.cost import UNetCost
from bksdm.runtime.defaults import Defaults

_NAME_WIDTH = 28

Seconds = dict[tuple[int, str], list[list[float]]]  # of batch size and part, by model and round


@dataclass(frozen=True)
class BatchResult:
    """What was measured at one batch size.

    Attributes:
        batch_size: Pictures at a time.
        peak_memory: Bytes that the model took at most; see `bksdm.evaluate.peak.peaks`.
        seconds: Of each of `PARTS` for the whole batch: the text encoder on the prompts (and the empty ones, with
            guidance), one call of the U-Net (on twice the batch, with guidance), the decoder, and all of it with
            every step, the scheduler and, where the model has one, the safety checker.
        speedup: How many times as fast as the first model, by part, from the ratios within a round.
    """

    batch_size: int
    peak_memory: int
    seconds: Mapping[str, Spread]
    speedup: Mapping[str, Interval]

    @property
    def images_per_second(self) -> float:
        return self.batch_size / self.seconds["whole"].median

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "images_per_second": self.images_per_second}


@dataclass(frozen=True)
class ModelResult:
    """One model.

    Attributes:
        model: As it was named, with the small decoder if it has one.
        height, width: Of its pictures in pixels.
        precision: Of its weights.
        steps, guidance: Of its whole pictures.
        params: Parameters of text_encoder, unet and decoder.
        cost: Of its U-Net for one picture, without guidance.
        batches: By batch size, rising.
    """

    model: str
    height: int
    width: int
    precision: str
    steps: int
    guidance: float
    params: Mapping[str, int]
    cost: UNetCost
    batches: tuple[BatchResult, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "height": self.height,
            "width": self.width,
            "precision": self.precision,
            "steps": self.steps,
            "guidance": self.guidance,
            "params": dict(self.params),
            "unet_gmacs_modules": self.cost.gmacs_modules,
            "unet_gmacs_all": self.cost.gmacs_all,
            "batches": [batch.to_dict() for batch in self.batches],
        }


@dataclass(frozen=True)
class Benchmark:
    """Models side by side.

    Attributes:
        device: Where they computed.
        hardware: Its name; for a CPU, with the number of threads.
        precision: Type of the weights.
        rounds, warmup: Rounds that count, and rounds before those.
        models: In the order given; the first is compared with.
        auto: For every MODEL, the runtime that `generate --runtime auto` takes for one such picture, and why.
    """

    device: str
    hardware: str
    precision: str
    rounds: int
    warmup: int
    models: tuple[ModelResult, ...]
    auto: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The object that `bksdm benchmark --json` prints."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return values | {"models": [model.to_dict() for model in self.models]}

    def csv(self) -> str:
        """A line for each model and batch size, with the values of `to_dict` under names joined by points."""
        shared = {key: value for key, value in self.to_dict().items() if key not in ("models", "auto")}
        rows = []
        for model in self.to_dict()["models"]:
            batches = model.pop("batches")
            rows += [_flat(model | batch | shared) for batch in batches]
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def text(self) -> str:
        """A column for each model."""
        rows = [
            ["", *(_short(model.model) for model in self.models)],
            ["precision", *(model.precision for model in self.models)],
            ["pixels", *(f"{model.height}x{model.width}" for model in self.models)],
            ["steps", *(str(model.steps) for model in self.models)],
            ["guidance", *(f"{model.guidance:g}" for model in self.models)],
            *(
                [f"{name}, M parameters", *(f"{model.params[part] / 1e6:.4g}" for model in self.models)]
                for part, name in (("text_encoder", "text encoder"), ("unet", "U-Net"), ("decoder", "decoder"))
            ),
            ["U-Net, GMACs of modules", *(f"{model.cost.gmacs_modules:.4g}" for model in self.models)],
            ["U-Net, GMACs of all", *(f"{model.cost.gmacs_all:.4g}" for model in self.models)],
        ]
        for batches in zip(*(model.batches for model in self.models), strict=True):
            rows += [[], *_batch_rows(batches)]
        return "\n".join([aligned(rows), "", *self._legend()])

    def _legend(self) -> list[str]:
        lines = [
            f"{self.device} ({self.hardware}), {self.precision}",
            f"times: median (quartiles) of {self.rounds} rounds, for a whole batch",
        ]
        if len(self.models) > 1:
            confidence = self.models[0].batches[0].speedup["whole"].confidence
            lines.append(
                f"times as fast as {self.models[0].model}: median of the ratios within a round (interval around the "
                f"true median, {confidence:.0%} confidence)"
            )
        lines += [f"for one picture of {_short(model)}, --runtime auto takes {why}" for model, why in self.auto.items()]
        return lines


def benchmark(options: BenchmarkOptions) -> Benchmark:
    """Measure, and write `benchmark.json` and `benchmark.csv` where a folder is named.

    Raises:
        InputError: An option or a model is unfit; see the message.
    """
    check_ready("benchmark", *options.models, options=dataclasses.asdict(options))
    _check(options)
    device = choose_device(options.device)
    dtype = choose_precision(options.precision, device, training=False)
    ways = drawings({model: model for model in options.models}, options.steps, options.guidance, options.spared())
    asked = [(model, Drawing(ways[model], options.height, options.width)) for model in options.models]
    models = load_rivals(asked, dtype, runtimes=options.runtimes, decoder=options.decoder)
    say_unlike(ways)
    costs = [model.cost() for model in models]
    precision = str(dtype).removeprefix("torch.")
    out = Path(options.out) if options.out else None
    files = _open_folder(out, options, {"device": str(device), "precision": precision}) if out else {}
    sizes = tuple(sorted(set(options.batch_sizes)))
    held = _peaks(models, sizes, device, precision)  # before the models themselves are on the device
    seconds = _seconds(models, sizes, device, options.rounds, options.warmup)
    result = Benchmark(
        device=str(device),
        hardware=_hardware(device),
        precision=precision,
        rounds=options.rounds,
        warmup=options.warmup,
        models=tuple(
            ModelResult(
                model=model.title,
                height=model.size[0],
                width=model.size[1],
                precision=model.precision,
                steps=model.drawing.how.steps,
                guidance=model.drawing.how.guidance,
                params=model.params(),
                cost=costs[number],
                batches=tuple(_batch_result(number, size, held[number][size], seconds) for size in sizes),
            )
            for number, model in enumerate(models)
        ),
        auto={name: _automatic(name, how, options, device) for name, how in ways.items() if not is_exported(name)},
    )
    if out:
        files |= {"benchmark.json": json.dumps(result.to_dict(), indent=2) + "\n", "benchmark.csv": result.csv()}
        for name, text in files.items():
            write_text(out / name, text)
    return result


def latencies(
    pipelines: Mapping[str, DiffusionPipeline],
    *,
    steps: int = 25,
    guidance: float = 7.5,
    batch_size: int = 1,
    height: int | None = None,
    width: int | None = None,
    rounds: int = 7,
    warmup: int = 1,
) -> dict[str, Spread]:
    """Seconds for a whole batch of pictures from prompts to pixels, the models taking turns.

    Arguments:
        pipelines: By name; all on one device, their networks in eval mode.
        steps: Denoising steps.
        guidance: Guidance scale; 1 or less for none.
        batch_size: Pictures in the batch.
        height: In pixels; each model's own by default.
        width: In pixels; each model's own by default.
        rounds: How many rounds count.
        warmup: Rounds before those.
    """
    drawing = Drawing(Defaults(steps, guidance), height, width)
    rivals = {name: TorchRival(name, pipeline, drawing) for name, pipeline in pipelines.items()}
    return whole_pictures(rivals, batch_size=batch_size, rounds=rounds, warmup=warmup)


def whole_pictures(
    rivals: Mapping[str, TorchRival], *, batch_size: int = 1, rounds: int = 7, warmup: int = 1
) -> dict[str, Spread]:
    """`latencies` of models that draw in ways of their own."""
    tasks = [rival.tasks(batch_size)["whole"] for rival in rivals.values()]
    device = next(iter(rivals.values())).pipeline.device
    seconds = take_turns({"whole": tasks}, rounds=rounds, warmup=warmup, device=device)["whole"]
    return {name: Spread.of(values) for name, values in zip(rivals, seconds, strict=True)}


def _automatic(model: str, how: Defaults, options: BenchmarkOptions, device: torch.device) -> str:
    calls = how.steps * (2 if how.guidance > 1 else 1)
    choice = choose(model, device, options.precision, options.decoder, None, calls)
    return f"{choice.runtime}: {choice.reason}"


def _check(options: BenchmarkOptions) -> None:
    """Refuse options that no model could serve."""
    if not options.models:
        raise InputError("no model is named; name one or several")
    if not options.batch_sizes:
        raise InputError("batch_sizes is empty; give one number or several, such as 1 4")
    smallest = min(options.batch_sizes)
    if smallest < 1:
        raise InputError(f"batch_sizes has {smallest}; give at least 1")
    if options.rounds < 1:
        raise InputError(f"rounds is {options.rounds}; give at least 1")
    if options.warmup < 0:
        raise InputError(f"warmup is {options.warmup}; give 0 or more")
    shared = ("steps", "guidance", "height", "width", "device")
    check_generation(GenerateOptions("", "", **{name: getattr(options, name) for name in shared}))


def _open_folder(folder: Path, options: BenchmarkOptions, chosen: Mapping[str, str]) -> dict[str, str]:
    """Take the folder; returns the files, name -> content, that tell what the measurement is made from."""
    settings = dataclasses.asdict(options) | {
        "models_content": [fingerprint(model) for model in options.models],
        "decoder_content": decoder_fingerprint(options.decoder),
    }
    open_run(folder, "benchmark", settings, may_change=("json",), chosen=chosen)
    return run_files("benchmark", settings, chosen)


def _peaks(
    models: Sequence[Rival], sizes: tuple[int, ...], device: torch.device, precision: str
) -> list[dict[int, int]]:
    """Bytes by model and batch size."""
    found, threads = [], torch.get_num_threads()
    with bar(len(models), "models' memory") as progress:
        for model in models:
            given = (*model.size, str(device), precision, threads, model.decoder)
            found.append(peaks(Work(model.model, sizes, model.drawing.how.guidance, *given)))
            progress.advance()
    return found


def _seconds(models: Sequence[Rival], sizes: Sequence[int], device: torch.device, rounds: int, warmup: int) -> Seconds:
    """Measured while all models are on the device."""
    works: dict[tuple[int, str], list[Task]] = {(size, part): [] for size in sizes for part in PARTS}
    try:
        for model in models:
            model.to(device)
            for size in sizes:
                for part, task in model.tasks(size).items():
                    works[size, part].append(task)
        return take_turns(works, rounds=rounds, warmup=warmup, device=device)
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"the models together take more memory than {device} has; name fewer or give smaller --batch_sizes"
        ) from error


def _batch_result(number: int, size: int, peak_memory: int, seconds: Seconds) -> BatchResult:
    speedup = {}
    for part in PARTS:
        first, own = seconds[size, part][0], seconds[size, part][number]
        speedup[part] = Interval.of([theirs / ours for theirs, ours in zip(first, own, strict=True)])
    return BatchResult(
        batch_size=size,
        peak_memory=peak_memory,
        seconds={part: Spread.of(seconds[size, part][number]) for part in PARTS},
        speedup=speedup,
    )


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{provenance()['processor']}, threads: {torch.get_num_threads()}"


def _batch_rows(batches: Sequence[BatchResult]) -> list[list[str]]:
    """Lines of the table for one batch size."""
    rows = [[f"batch {batches[0].batch_size}"]]
    for part, name in PARTS.items():
        rows.append([f"  {name}", *(_spread(batch.seconds[part]) for batch in batches)])
        if len(batches) > 1:
            rows.append(["    times as fast", "1", *(_interval(batch.speedup[part]) for batch in batches[1:])])
    rows.append(["  pictures/s", *(f"{batch.images_per_second:.4g}" for batch in batches)])
    rows.append(["  peak memory, MiB", *(f"{batch.peak_memory / 2**20:.1f}" for batch in batches)])
    return rows


def _spread(values: Spread) -> str:
    factor, unit = (1, "s") if values.median >= 1 else (1000, "ms")
    return f"{values.median * factor:.4g} {unit} ({values.lower * factor:.4g} - {values.upper * factor:.4g})"


def _interval(values: Interval) -> str:
    return f"{values.median:.3g} ({values.low:.3g} - {values.high:.3g})"


def _short(name: str) -> str:
    """The end of a long name, where names of one folder differ."""
    return name if len(name) <= _NAME_WIDTH else "..." + name[3 - _NAME_WIDTH :]


def _flat(values: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Nested values under names joined by points."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{path}{key}.") if isinstance(value, Mapping) else {path + key: value}
    return found
