"""How many images a second does retraining learn from, and in how much memory, beside the published loop?

    python benchmarks/train_throughput.py                       # small U-Nets, on this machine's CPU
    python benchmarks/train_throughput.py --sizes sd --recipes base small tiny --batch-sizes 16 64 --variants 0 6 7

Every variant of a size runs on the same models (random weights: neither time nor memory depends on them), the
same pictures, order and random numbers. Variants take turns, several steps each, so that a machine whose
speed changes is fair to all; the figure is the median over the turns. Memory is the most that one step holds
on the device; on a CPU each variant's is measured in a process of its own. The first step's losses are those of equal
weights; later ones part where number formats do, and more so in fp16, whose loss scaler skips the first steps.
"""

import argparse
import copy
import gc
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from published_loop import PublishedLoop
from transformers import CLIPTextConfig, CLIPTextModel

from bksdm.common.devices import (
    VAE_LAYOUT,
    channels_last_is_faster,
    choose_device,
    choose_precision,
    peak_memory,
    plain_attention_is_faster,
)
from bksdm.common.runs import provenance, write_text
from bksdm.data.cache import CachedSamples
from bksdm.data.folder import data_folder, read_captions
from bksdm.data.pictures import PictureSamples
from bksdm.data.stream import Samples, Stream
from bksdm.distill.conditions import Conditions
from bksdm.distill.loop import Schedule, train
from bksdm.distill.objective import Distillation
from bksdm.distill.openvino import openvino_is_faster
from bksdm.distill.state import Checkpoints, Ema, TrainState
from bksdm.families.noise import NoiseSchedule
from bksdm.families.recipe import Pruning, load_recipe
from bksdm.models.pipelines import load_pipeline, quiet_libraries, tokenizing
from bksdm.pruning.inherit import prune_unet

LR = 5e-5
LOSSES = ("loss", "task", "output_kd", "feature_kd")


@dataclass(frozen=True)
class Size:
    """A pipeline to measure on: U-Net widths, VAE widths, picture side, width and length of the caption's embedding."""

    unet: tuple[int, ...]
    vae: tuple[int, ...]
    picture: int
    text_width: int
    tokens: int
    about: str

    @property
    def latent(self) -> int:
        return int(self.picture // 2 ** (len(self.vae) - 1))


SIZES = {
    "small": Size((32, 64, 128, 128), (32, 64, 128, 128), 64, 128, 16, "U-Net (32, 64, 128, 128), latents 8 x 8 x 4"),
    "small-f4": Size((32, 64, 128, 128), (32, 64, 128), 64, 128, 16, "U-Net (32, 64, 128, 128), latents 16 x 16 x 4"),
    "emoji": Size((48, 80, 112, 112), (32, 64, 64), 64, 128, 16, "the embedded model, latents 16 x 16 x 4"),
    "sd": Size(
        (320, 640, 1280, 1280), (128, 256, 512, 512), 512, 768, 77, "Stable Diffusion v1.4, latents 64 x 64 x 4"
    ),
}


def build(size: Size, device: torch.device) -> StableDiffusionPipeline:
    """A pipeline of this size with random weights, drawn where they are used; SD's own layers, heads and stages."""
    torch.manual_seed(0)
    with device:
        return _pipeline(size).to(device)


def _pipeline(size: Size) -> StableDiffusionPipeline:
    if size == SIZES["emoji"]:
        return load_pipeline("emoji")
    embedded = load_pipeline("emoji", with_denoiser=False)
    tokenizer = embedded.tokenizer
    full = size == SIZES["sd"]
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.text_width,
        intermediate_size=4 * size.text_width,
        num_hidden_layers=12 if full else 4,
        num_attention_heads=size.text_width // 64,
        max_position_embeddings=size.tokens,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    tokenizer.model_max_length = size.tokens
    return StableDiffusionPipeline(
        vae=AutoencoderKL(
            block_out_channels=size.vae,
            down_block_types=("DownEncoderBlock2D",) * len(size.vae),
            up_block_types=("UpDecoderBlock2D",) * len(size.vae),
            layers_per_block=2,
            latent_channels=4,
            sample_size=size.picture,
        ).eval(),
        text_encoder=CLIPTextModel(text).eval(),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(
            sample_size=size.latent,
            block_out_channels=size.unet,
            cross_attention_dim=size.text_width,
            attention_head_dim=8,
        ).eval(),
        scheduler=PNDMScheduler.from_config(embedded.scheduler.config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@dataclass(frozen=True)
class Variant:
    """A way to run a step; the first is the published loop, the others add one measure after the other."""

    name: str
    ours: bool = True
    latents_once: bool = True
    checkpointing: bool = False
    fused: bool = True
    low_precision: bool = True
    layout: bool = True
    compiled: bool = False


PLAIN = {"fused": False, "low_precision": False, "layout": False}
VARIANTS = (
    Variant("published loop", ours=False),
    Variant("our loop, nothing else", latents_once=False, checkpointing=True, **PLAIN),
    Variant("+ latents and captions once", checkpointing=True, **PLAIN),
    Variant("+ no gradient checkpointing", **PLAIN),
    Variant("+ fused AdamW", low_precision=False, layout=False),
    Variant("+ number format of the device", layout=False),
    Variant("+ attention and memory layout of the device"),
    Variant("+ compiled teacher", compiled=True),
)


@dataclass(frozen=True)
class Bench:
    """What all variants of a size have in common."""

    pipeline: StableDiffusionPipeline
    student: UNet2DConditionModel
    pruning: Pruning
    batch_size: int
    device: torch.device

    @classmethod
    def of(cls, size: Size, recipe: str, batch_size: int, device: torch.device) -> "Bench":
        pipeline = build(size, device)
        student, pruning = prune_unet(pipeline.unet, load_recipe(recipe))
        return cls(pipeline, student, pruning, batch_size, device)

    def pictures(self, size: Size) -> PictureSamples:
        entries = read_captions(data_folder("emoji/train"))[: 917 if size.picture < 512 else 2 * self.batch_size]
        return PictureSamples(entries, size.picture, tokenizing(self.pipeline.tokenizer))


Steps = Callable[[int], list[dict[str, float]]]


def prepare(bench: Bench, size: Size, variant: Variant, work: Path) -> Steps:
    """A function that trains for some steps and returns their losses."""
    pipeline, student = copy.deepcopy(bench.pipeline).to(bench.device), copy.deepcopy(bench.student).to(bench.device)
    low = choose_precision("auto", bench.device, training=True) if variant.low_precision else torch.float32
    if not variant.ours:
        autocast = torch.float16 if bench.device.type == "cuda" else None  # as published, where there are tensor cores
        loop = PublishedLoop(
            pipeline, student, bench.pruning.taps, bench.pictures(size), bench.batch_size, LR, autocast
        )
        return lambda count: [loop.step() for _ in range(count)]
    return _ours(bench, size, variant, pipeline, student, low, work)


def _ours(
    bench: Bench,
    size: Size,
    variant: Variant,
    pipeline: StableDiffusionPipeline,
    student: UNet2DConditionModel,
    low: torch.dtype,
    work: Path,
) -> Steps:
    from diffusers.models.attention_processor import AttnProcessor  # noqa: PLC0415

    student.train()
    pipeline.unet.to(low)
    if variant.checkpointing:
        student.enable_gradient_checkpointing()
    if variant.layout and plain_attention_is_faster(bench.device, low):
        student.set_attn_processor(AttnProcessor())
    if variant.layout and channels_last_is_faster(bench.device, low):
        student.to(memory_format=torch.channels_last)
        pipeline.unet.to(memory_format=torch.channels_last)
    conditions = Conditions.of(pipeline)
    if variant.layout:
        pipeline.vae.to(memory_format=VAE_LAYOUT)
    schedule = NoiseSchedule.from_scheduler(pipeline.scheduler)
    objective = Distillation(student, pipeline.unet, bench.pruning.taps, conditions, schedule)
    samples: Samples = bench.pictures(size)
    if variant.latents_once:
        samples = CachedSamples(
            bench.pictures(size),
            lambda pixels: conditions.posterior(pixels.to(bench.device)),
            lambda ids: conditions.embedded(ids.to(bench.device)),
        )
    stream = Stream(samples, bench.batch_size)
    if variant.compiled:
        from bksdm.common.randomness import Draws  # noqa: PLC0415

        batch = {name: value.to(bench.device) for name, value in next(stream.batches()).items()}
        by_openvino = openvino_is_faster(bench.device, low)
        apart = objective.compile_teacher(batch, Draws(0, "compile"), by_openvino=by_openvino)
        print(f"  compiled teacher differs by {apart:.1e}", flush=True)
    optimizer = torch.optim.AdamW(student.parameters(), lr=LR, weight_decay=1e-2, fused=variant.fused or None)
    scaler = torch.amp.GradScaler(bench.device.type, enabled=low == torch.float16)
    state = TrainState(student, optimizer, Ema(student, 0.9999), scaler)

    def steps(count: int) -> list[dict[str, float]]:
        seen: list[dict[str, float]] = []
        pace = Schedule(state.step + count, lr=LR, log_every=1, checkpoint_every=10**9)
        train(
            state,
            objective,
            stream,
            pace,
            _NoCheckpoints(work),
            device=bench.device,
            precision=low,
            report=lambda _, record: seen.append(record),
        )
        return seen

    return steps


class _NoCheckpoints(Checkpoints):
    """Writing them takes the same time in every loop."""

    def save(self, state: TrainState) -> None: ...


@dataclass
class Measured:
    """Seconds a step over the turns, the losses of all steps, and the peak memory in bytes."""

    seconds: list[float]
    losses: list[dict[str, float]]
    memory: int = 0


def measure(
    size: Size, variants: Sequence[Variant], recipe: str, batch_size: int, turns: int, steps: int, device: torch.device
) -> list[Measured]:
    """The variants, taking turns where they fit in memory together."""
    bench, work = Bench.of(size, recipe, batch_size, device), Path("runs/throughput")
    found = [Measured([], []) for _ in variants]
    together = size.picture < 512
    ready: dict[str, Steps] = {}
    for turn in range(turns if together else 1):
        for variant, result in zip(variants, found, strict=True):
            if variant.name not in ready:
                held = (
                    torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
                )  # that of other variants, too
                ready[variant.name] = prepare(bench, size, variant, work)
                result.losses += ready[variant.name](2)  # the first steps are slower: allocation, choice of kernels
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(device)
            began = time.perf_counter()
            result.losses += ready[variant.name](steps)
            _finish(device)
            result.seconds.append((time.perf_counter() - began) / steps)
            if device.type == "cuda" and not result.memory:
                result.memory = peak_memory(device) - held
            print(f"  turn {turn}: {variant.name}: {result.seconds[-1]:.3f} s a step", flush=True)
            if not together:
                del ready[variant.name]
                gc.collect()
                torch.cuda.empty_cache()
    return found


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_since() -> int:
    """The most memory in bytes since the peak was forgotten."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def memory_of(size: str, recipe: str, batch_size: int, number: int) -> int:
    """Peak memory in bytes of one variant in a process of its own, above what it held before the first step."""
    command = [sys.executable, __file__, "--sizes", size, "--recipes", recipe, "--batch-sizes", str(batch_size)]
    done = subprocess.run([*command, "--memory-of", str(number)], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def difference(ours: Measured, published: Measured, steps: int | None = None) -> float:
    """The largest relative difference of a loss in the first steps, or in any."""
    pairs = itertools.islice(zip(ours.losses, published.losses, strict=False), steps)
    return max(abs(a[name] - b[name]) / abs(b[name]) for a, b in pairs for name in LOSSES)


def rows(variants: Sequence[Variant], found: list[Measured], batch_size: int) -> Iterator[dict[str, Any]]:
    published = statistics.median(found[0].seconds)
    for variant, result in zip(variants, found, strict=True):
        seconds = statistics.median(result.seconds)
        yield {
            "variant": variant.name,
            "seconds": seconds,
            "fastest": min(result.seconds),
            "slowest": max(result.seconds),
            "images_per_second": batch_size / seconds,
            "times": published / seconds,
            "memory": result.memory,
            "first_loss_difference": difference(result, found[0], 1),
            "loss_difference": difference(result, found[0]),
        }


def table(about: str, found: list[dict[str, Any]]) -> str:
    lines = [
        about,
        "",
        "| | s a step, median (fastest to slowest) | images/s | times | peak memory, GiB | loss difference, first step "
        "| largest |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['variant']} | {row['seconds']:.3f} ({row['fastest']:.3f} to {row['slowest']:.3f}) "
        f"| {row['images_per_second']:.1f} | {row['times']:.2f} | {row['memory'] / 2**30:.2f} "
        f"| {row['first_loss_difference']:.1e} | {row['loss_difference']:.1e} |"
        for row in found
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["small", "small-f4", "emoji"])
    parser.add_argument("--recipes", nargs="+", default=["small"])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[32])
    parser.add_argument("--variants", type=int, nargs="+", default=range(len(VARIANTS)), help="by their number, from 0")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="steps a turn")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "benchmarks" / "results")
    parser.add_argument("--memory-of", type=int, help="print the peak memory of one variant and stop")
    arguments = parser.parse_args()
    quiet_libraries()
    device = choose_device(arguments.device)
    if arguments.memory_of is not None:
        size = SIZES[arguments.sizes[0]]
        bench = Bench.of(size, arguments.recipes[0], arguments.batch_sizes[0], device)
        steps = prepare(bench, size, VARIANTS[arguments.memory_of], Path("runs/throughput"))
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far (Linux)
        steps(2)
        print(_peak_since())
        return
    variants = [VARIANTS[number] for number in arguments.variants]
    results, tables, made_by = [], [], provenance()
    for name in arguments.sizes:
        for recipe in arguments.recipes:
            for batch_size in arguments.batch_sizes:
                about = f"{SIZES[name].about}; recipe {recipe}, batch {batch_size}"
                print(about, flush=True)
                found = measure(SIZES[name], variants, recipe, batch_size, arguments.turns, arguments.steps, device)
                if device.type != "cuda":
                    for number, result in zip(arguments.variants, found, strict=True):
                        result.memory = memory_of(name, recipe, batch_size, number)
                measured = list(rows(variants, found, batch_size))
                results.append({"size": name, "recipe": recipe, "batch_size": batch_size, "rows": measured})
                tables.append(table(about, measured))
                file = arguments.out / f"train_throughput_{device.type}"
                arguments.out.mkdir(parents=True, exist_ok=True)
                write_text(file.with_suffix(".json"), json.dumps({**made_by, "results": results}, indent=2) + "\n")
                write_text(file.with_suffix(".md"), "\n\n".join([*tables, _machine(made_by, device)]) + "\n")
    print("\n\n".join(tables))


def _machine(made_by: dict[str, Any], device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{made_by['processors']} cores"
    versions = ", ".join(f"{package} {version}" for package, version in made_by["versions"].items())
    return f"{name}; {made_by['processor']}; {made_by['started'][:10]}; {versions}."


if __name__ == "__main__":
    main()
