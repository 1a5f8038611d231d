"""Stable Diffusion v1.4 at full size on a CPU: its U-Net and its students', by runtime and precision.

    python benchmarks/cpu_speed.py convert     # networks and pipelines with random weights, under runs/cpu_speed
    python benchmarks/cpu_speed.py measure     # steps and decoders, each beside torch in float32, taking turns
    python benchmarks/cpu_speed.py whole       # whole 512-px pictures
    python benchmarks/cpu_speed.py table       # what is known so far; writes benchmarks/results/cpu_speed.md
    python benchmarks/cpu_speed.py fast [--unet w8a8|fp32]   # a stock picture and ways with less work, call by call;
                                               # writes benchmarks/results/cpu_fast.md, or cpu_fast_avx2.md

Every rival is measured in a process of its own beside diffusers' network in float32, in turns, and the ratio is taken
within a round. What is measured already is not measured again. Guidance is on: the U-Net is called with a batch of two.
`fast` counts seconds of processors, since those of the clock say little on a machine with other work, and sets them
beside what a picture's operations take at the pace of a big matrix product. On a processor with more than AVX2,
`ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2` keeps both libraries to that.
"""

import argparse
import dataclasses
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import psutil
import torch
from decoder import gmacs
from diffusers import AutoencoderKL, AutoencoderTiny, LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from full_size import DATA, NOISE_SCHEDULE, folders, stable_diffusion
from plan import VAE

from bksdm.common.devices import peak_inside
from bksdm.common.runs import provenance, read_lines, write_text
from bksdm.evaluate.timing import Interval, Spread, take_turns
from bksdm.export import to_onnx, to_openvino
from bksdm.export.calibration import Step, denoising_steps
from bksdm.export.components import DECODER, TEXT_ENCODER, UNET, Component, components, least_side
from bksdm.export.formats import Source
from bksdm.export.run import export
from bksdm.families import derive, family_of, family_of_pipeline
from bksdm.families.recipe import load_recipe
from bksdm.options.export import ExportOptions
from bksdm.pruning.inherit import prune_unet, with_denoiser
from bksdm.runtime.networks import Array, Networks, PartedNetworks, Told
from bksdm.runtime.onnx_networks import OnnxNetworks
from bksdm.runtime.openvino_networks import OpenvinoNetworks
from bksdm.runtime.reuse import Reusing
from bksdm.runtime.schedulers import trajectory, with_scheduler
from bksdm.runtime.spared import Spared

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
SIDE, TOKENS, WIDTH = 64, 77, 768
MODELS = ("teacher", "base", "small", "tiny")
EXPORTED, EXPORTED_SMALL, EXPORTED_FEW = "tiny-openvino", "tiny-openvino-small-decoder", "tiny-openvino-few-steps"
W8A8_SMALL, W8A8_FEW = "tiny-openvino-w8a8-small-decoder", "tiny-openvino-w8a8-few-steps"
CPU = torch.device("cpu")
_PRODUCT, _TIMES = 4096, 3
_KEYS = ", keys pooled"
_KINDS = {"integers": "in int8", "floats": "in the arithmetic of the rest", "stock": "in float32"}


@dataclass(frozen=True)
class Rival:
    """One network in one runtime.

    Attributes:
        part: text_encoder, unet or vae_decoder.
        model: Of MODELS; for the decoder kl or tiny.
        runtime: torch, openvino or onnx.
        precision: Of the weights.
        arithmetic: f32, or bf16 for processors that multiply it faster.
        pool_keys: Of a U-Net, whose speed alone is measured then.
    """

    part: str
    model: str
    runtime: str
    precision: str
    arithmetic: str = "f32"
    pool_keys: int | None = None

    @property
    def folder(self) -> str:
        """Where the network lies, whatever it is computed in."""
        pooled = f"-keys{self.pool_keys}" if self.pool_keys else ""
        return f"{self.part}-{self.model}-{self.runtime}-{self.precision}{pooled}"

    @property
    def name(self) -> str:
        return f"{self.folder}{_note(self.arithmetic)}"


@dataclass(frozen=True)
class Picture:
    """A whole picture: by which model or exported folder, how many steps, which guidance and what arithmetic.

    And by which scheduler where not its own, at which noise levels guided, every how many steps inside, and the side of
    squares of tokens whose keys are pooled.
    """

    name: str
    steps: int
    guidance: float = 7.5
    arithmetic: str = "f32"
    scheduler: str | None = None
    interval: tuple[float, float] | None = None
    reuse: int | None = None
    pool_keys: int | None = None

    @property
    def key(self) -> str:
        pooled = f"keys{self.pool_keys}" if self.pool_keys else None
        spared = [self.scheduler, *(self.interval or ()), self.reuse, pooled]
        words = [
            self.name,
            f"{self.steps}{_note(self.arithmetic)}",
            *(str(word) for word in spared if word is not None),
        ]
        return " ".join(words)

    @property
    def how(self) -> dict[str, Any]:
        """What `sample` is told of it."""
        return {"steps": self.steps, "guidance": self.guidance, "spared": Spared(self.interval, self.reuse)}


def _note(arithmetic: str) -> str:
    return "" if arithmetic == "f32" else f"-{arithmetic}"


PICTURES = [
    *(Picture(name, steps) for name in ("teacher", EXPORTED, EXPORTED_SMALL) for steps in (10, 25)),
    *(Picture(EXPORTED_FEW, steps, guidance=1.0) for steps in (1, 4, 8)),
    *(Picture(EXPORTED_SMALL, steps, arithmetic="bf16") for steps in (10, 25)),
    *(Picture(W8A8_SMALL, steps, arithmetic="bf16") for steps in (10, 25)),
    *(Picture(W8A8_FEW, steps, guidance=1.0, arithmetic="bf16") for steps in (1, 4, 8)),
]
_POOLED = 2
_MULTIPLIED = "bf16" if torch.cpu._is_avx512_bf16_supported() else "f32"


def ways(precision: str = "w8a8") -> list[Picture]:
    """A stock picture, and Tiny's with the U-Net in this precision and ever less work."""
    tiny = Picture(W8A8_SMALL if precision == "w8a8" else EXPORTED_SMALL, 10, arithmetic=_MULTIPLIED)
    solved = dataclasses.replace(tiny, scheduler="DPMSolverMultistepScheduler")
    spared = dataclasses.replace(solved, reuse=3)
    within = [dataclasses.replace(solved, interval=(0.3, 5.0), reuse=reuse) for reuse in (3, 4)]
    few = [spared, *within, dataclasses.replace(solved, steps=6, reuse=2)]
    return [Picture("teacher", 10), tiny, *few, *(dataclasses.replace(way, pool_keys=_POOLED) for way in few)]


RIVALS = [
    *(Rival(UNET, "tiny", "openvino", precision) for precision in ("fp32", "w8a8", "int8")),
    *(Rival(DECODER, model, "openvino", "fp32") for model in ("kl", "tiny")),
    *(Rival(UNET, "tiny", "onnx", precision) for precision in ("fp32", "int8")),
    *(Rival(UNET, model, "torch", "fp32") for model in ("tiny", "base", "small")),
    *(Rival(UNET, model, "openvino", "fp32") for model in ("base", "small", "teacher")),
    Rival(DECODER, "tiny", "torch", "fp32"),
    Rival(TEXT_ENCODER, "teacher", "openvino", "fp32"),
    *(Rival(UNET, "tiny", "openvino", precision, "bf16") for precision in ("fp32", "w8a8")),
    *(Rival(UNET, model, "openvino", "fp32", "bf16") for model in ("base", "small", "teacher")),
    *(Rival(DECODER, model, "openvino", "fp32", "bf16") for model in ("kl", "tiny")),
    Rival(UNET, "tiny", "torch", "bf16", "bf16"),
]


# Networks


def unet(model: str) -> UNet2DConditionModel:
    config = json.loads((DATA / "unet_sd_v1.4.json").read_text())
    if model != "teacher":
        config = derive(load_recipe(model), config).student_config
    torch.manual_seed(0)
    return UNet2DConditionModel.from_config(config).eval()


def decoder(model: str) -> Any:
    torch.manual_seed(0)
    return (AutoencoderKL(**VAE) if model == "kl" else AutoencoderTiny()).eval()


def student(model: str) -> StableDiffusionPipeline:
    teacher = stable_diffusion()
    if model in MODELS[1:]:
        return with_denoiser(teacher, prune_unet(teacher.unet, load_recipe(model))[0])
    return teacher


def convert(rival: Rival, out: Path) -> None:
    """Write a network for its runtime, and how long that took and what it needed."""
    folder = out / rival.folder / rival.part
    pipeline = student(rival.model)
    if rival.part == DECODER and rival.model == "tiny":
        pipeline.vae.decoder, pipeline.vae.post_quant_conv = decoder("tiny").decoder, torch.nn.Identity()
    least = least_side(pipeline)
    component = components(pipeline, least, least)[rival.part]
    folder.mkdir(parents=True)
    began = time.perf_counter()
    pooled = Spared(pool_keys=rival.pool_keys)
    pooling = family_of_pipeline(pipeline).sparing(pipeline.unet, pipeline.scheduler, pooled)
    with peak_inside(CPU) as peak, pooling:
        if rival.runtime == "onnx":
            to_onnx.write_graph(component, folder / to_onnx.MODEL_FILE)
            if rival.precision == "int8":
                to_onnx.to_integers(folder / to_onnx.MODEL_FILE)
        else:
            calibration = ("red apple",)
            source = Source(rival.model, pipeline, None, rival.precision, 8 * SIDE, 8 * SIDE, calibration=calibration)
            steps: list[Step] = []
            if rival.precision == "w8a8":
                steps = [any_step(component)] if rival.pool_keys else denoising_steps(source)
            to_openvino.write_graph(component, folder / to_openvino.MODEL_FILE, rival.precision, steps)
    if rival.part == UNET:
        pipeline.unet.save_config(folder)
    done = {"seconds": time.perf_counter() - began, "peak": peak.bytes}
    write_text(folder / "conversion.json", json.dumps(done))


def any_step(component: Component) -> Step:
    """What w8a8 may be fitted to where nothing but speed is asked for: a step of small latents."""
    rng = np.random.default_rng(0)
    noise = {name: rng.normal(size=value.shape).astype(np.float32) for name, value in component.inputs.items()}
    return noise | {"timestep": np.array([901])}


def export_pictures(out: Path) -> None:
    """Tiny in OpenVINO: as it is, with a small decoder, in 8-bit integers, and with the scheduler of `bksdm lcm`."""
    models = out / "models"
    tiny = folders(models, ["tiny"])["tiny"]
    decoder("tiny").save_pretrained(models / "decoder")
    wanted = ExportOptions(str(tiny), "openvino", "", precision="fp32", height=8 * SIDE, width=8 * SIDE)
    for name, small in ((EXPORTED, None), (EXPORTED_SMALL, str(models / "decoder"))):
        if not (out / name).exists():
            print("export", name, flush=True)
            export(dataclasses.replace(wanted, out=str(out / name), decoder=small))
    integers = out / Rival(UNET, "tiny", "openvino", "w8a8").folder / UNET
    scheduler = models / "lcm" / "scheduler"
    LCMScheduler(**NOISE_SCHEDULE).save_pretrained(scheduler)
    _with_part(out / EXPORTED_SMALL, integers, out / W8A8_SMALL)
    _with_part(out / EXPORTED_SMALL, scheduler, out / EXPORTED_FEW)
    _with_part(out / W8A8_SMALL, scheduler, out / W8A8_FEW)


def _with_part(exported: Path, part: Path, out: Path) -> None:
    """A copy of an exported folder, with another network or scheduler."""
    if not out.exists():
        half = out.with_name(f"{out.name}.part")
        shutil.rmtree(half, ignore_errors=True)
        shutil.copytree(exported, half)
        shutil.copytree(part, half / part.name, dirs_exist_ok=True)
        half.rename(out)


# Timing


def task(rival: Rival, out: Path) -> Callable[[], object]:
    """One call of a network, as a picture under guidance asks for it."""
    rng = torch.Generator().manual_seed(0)
    latents, context = (torch.randn(*shape, generator=rng) for shape in ((2, 4, SIDE, SIDE), (2, TOKENS, WIDTH)))
    tokens = torch.zeros(2, TOKENS, dtype=torch.int64)
    if rival.runtime == "torch":
        if rival.part == UNET:
            dtype = torch.bfloat16 if rival.arithmetic == "bf16" else torch.float32
            network = unet(rival.model).to(dtype)
            return partial(network, latents.to(dtype), torch.tensor(901), context.to(dtype), return_dict=False)
        if rival.part == DECODER:
            return partial(decoder(rival.model).decode, latents[:1], return_dict=False)
        return partial(stable_diffusion().text_encoder, tokens)
    networks: Networks
    if rival.runtime == "onnx":
        networks = OnnxNetworks(out / rival.folder, threads=torch.get_num_threads())
    else:
        networks = OpenvinoNetworks(out / rival.folder, threads=torch.get_num_threads(), precision=rival.arithmetic)
    if rival.part == UNET:
        return partial(networks.predict, latents.numpy(), 901.0, {"context": context.numpy()})
    if rival.part == DECODER:
        return partial(networks.decode, latents[:1].numpy())
    return partial(networks.encode, tokens.numpy())


def measure(rival: Rival, out: Path, rounds: int) -> dict[str, Any]:
    first = "kl" if rival.part == DECODER else "teacher"
    stock = Rival(rival.part, first, "torch", "fp32")
    tasks = [task(stock, out), task(rival, out)]
    theirs, ours = take_turns({"": tasks}, rounds=rounds, warmup=1, device=CPU)[""]
    folder = out / rival.folder
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.suffix in (".bin", ".data", ".xml", ".onnx"))
    return {
        **dataclasses.asdict(rival),
        "stock": dataclasses.asdict(Spread.of(theirs)),
        "seconds": dataclasses.asdict(Spread.of(ours)),
        "ratio": dataclasses.asdict(Interval.of([a / b for a, b in zip(theirs, ours, strict=True)])),
        "bytes": size,
    }


def whole(wanted: Picture, out: Path) -> dict[str, Any]:
    """One 512-px picture: seconds, and the peak of this process over what its libraries took."""
    from bksdm.generate.exported import open_exported, sample_exported  # noqa: PLC0415
    from bksdm.generate.requests import Request  # noqa: PLC0415
    from bksdm.generate.sampling import sample  # noqa: PLC0415

    libraries = psutil.Process().memory_info().rss
    request = [Request("red apple", 0)]
    draw: Callable[..., Any]
    if wanted.name in MODELS:
        draw = partial(sample, student(wanted.name), request)
    else:
        pipeline = open_exported(out / wanted.name, wanted.arithmetic, wanted.scheduler)
        list(sample_exported(pipeline, request, **{**wanted.how, "steps": 2}))  # compiled, and loaded
        draw = partial(sample_exported, pipeline, request)
    began = time.perf_counter()
    with peak_inside(CPU) as peak, torch.inference_mode():
        picture = np.asarray(next(iter(draw(**wanted.how)))[0])
    assert picture.shape == (8 * SIDE, 8 * SIDE, 3)
    seconds = time.perf_counter() - began
    return {**dataclasses.asdict(wanted), "seconds": seconds, "peak": (peak.bytes or 0) - libraries}


# What the picture's operations take at best


@dataclass(frozen=True)
class Work:
    """Multiply-accumulates (MACs) in 8-bit integers and in floating point."""

    integers: float = 0.0
    floats: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.integers + other.integers, self.floats + other.floats)

    def times(self, many: float) -> "Work":
        return Work(self.integers * many, self.floats * many)

    def seconds(self, paces: Mapping[str, float]) -> float:
        """At so many MACs a second of either kind."""
        return self.integers / paces["integers"] + self.floats / paces["floats"]


def of_unet(model: str, *, rounded: bool, pool_keys: int = 1) -> tuple[Work, Work]:
    """One sample through all of a U-Net, and through its outermost stage; `rounded` has weights in integers."""
    config = dict(unet(model).config)
    whole = outer = Work()
    for layer in family_of(config).layers_of(config, (SIDE, SIDE), TOKENS) or []:
        half = layer.products / 2  # queries by keys; the other is of values
        integers = rounded and layer.path not in ("conv_in", "conv_out")
        work = Work(layer.macs + half, half) if integers else Work(0, layer.macs + 2 * half)
        last = f"up_blocks.{len(config['up_block_types']) - 1}."
        inside = layer.path.startswith(("down_blocks", "mid_block", "up_blocks"))
        outermost = layer.path.startswith(("down_blocks.0.", last)) and ".downsamplers." not in layer.path
        if outermost and layer.path.endswith((".attn1", ".attn1.to_k", ".attn1.to_v")):
            work = work.times(1 / pool_keys**2)
        whole += work
        outer += work if outermost or not inside else Work()
    return whole, outer


def of_picture(wanted: Picture) -> Work:
    """From the first U-Net call to pixels; text encoders take a hundredth of it, and are left out."""
    stock = wanted.name in MODELS
    name, pool_keys = wanted.name if stock else "tiny", wanted.pool_keys or 1
    whole, outer = of_unet(name, rounded="w8a8" in wanted.name, pool_keys=pool_keys)
    total = Work(0, 1e9 * gmacs(decoder("kl" if stock else "tiny"), torch.zeros(1, 4, SIDE, SIDE)))
    for samples, computes in calls(wanted):
        total += (whole if computes else outer).times(samples)
    return total


def calls(wanted: Picture) -> list[tuple[int, bool]]:
    """Of every U-Net call its samples, and whether the inside computes, as the runtime has it."""
    found: list[tuple[int, bool]] = []
    deep = np.zeros((2, 0, 0, 0), np.float32)

    class Counted:
        def check_parted(self) -> None: ...
        def keeping(self, latents: Array, timestep: float, told: Told) -> tuple[Array, Array]:  # noqa: ARG002
            found.append((len(latents), True))
            return latents, deep[: len(latents)]

        def outer(self, latents: Array, timestep: float, told: Told, deep: Array) -> Array:  # noqa: ARG002
            found.append((len(latents), False))
            return latents

    config = {"_class_name": "PNDMScheduler", **NOISE_SCHEDULE, "skip_prk_steps": True}
    way = trajectory(config if wanted.scheduler is None else with_scheduler(config, wanted.scheduler), wanted.steps)
    reusing = Reusing(cast(PartedNetworks, Counted()), wanted.reuse or 1)
    low, high = wanted.interval or (0.0, float("inf"))
    for timestep in way.timesteps:
        reusing.predict(np.zeros((1 + (low <= way.level(timestep) <= high), 4, 1, 1), np.float32), timestep, {})
    return found


def paces() -> dict[str, float]:
    """MACs a second of processor time of a big matrix product, the best of some."""
    wide = torch.randn(_PRODUCT, _PRODUCT)
    floats = wide.bfloat16() if _MULTIPLIED == "bf16" else wide
    integers = torch.randint(-100, 100, (_PRODUCT, _PRODUCT), dtype=torch.int8)
    kinds: dict[str, Callable[[], object]] = {
        "integers": partial(torch._int_mm, integers, integers),
        "floats": partial(torch.mm, floats, floats),
        "stock": partial(torch.mm, wide, wide),
    }
    found = {}
    for kind, product in kinds.items():
        spent = []
        for _ in range(_TIMES):
            began = time.process_time()
            product()
            spent.append(time.process_time() - began)
        found[kind] = _PRODUCT**3 / min(spent)
    return found


# Tables


def table(lines: list[dict[str, Any]], wholes: list[dict[str, Any]]) -> str:
    rows = [
        "| network | runtime | weights | arithmetic | seconds a call | diffusers in f32 | times as fast | MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        ratio, network = line["ratio"], f"{line['part']} {line['model']}"
        size = format(line["bytes"] / 2**20, ".0f") if line["bytes"] else ""
        rows.append(
            f"| {network} | {line['runtime']} | {line['precision']} | {_arithmetic(line)} "
            f"| {line['seconds']['median']:.2f} | {line['stock']['median']:.2f} "
            f"| {ratio['median']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f}) | {size} |"
        )
    rows += ["", "| whole 512-px picture | steps | guidance | arithmetic | seconds | peak memory, GiB |"]
    rows += ["|---|---|---|---|---|---|"]
    rows += [
        f"| {_drawn(line)} | {line['steps']} | {line['guidance']} | {_arithmetic(line)} | {line['seconds']:.1f} "
        f"| {line['peak'] / 2**30:.2f} |"
        for line in wholes
    ]
    return "\n".join(rows)


def _drawn(line: dict[str, Any]) -> str:
    """By what a picture was drawn, and what was spared."""
    interval = " to ".join(str(level) for level in line.get("interval") or ())
    words = [line["name"], line.get("scheduler"), interval and f"guidance at {interval}"]
    words += [line.get("reuse") and f"inside every {line['reuse']} steps"]
    return ", ".join(word for word in words if word)


def _arithmetic(line: dict[str, Any]) -> str:
    """What is multiplied: w8a8 has integers on both sides where it can."""
    return f"int8, {line['arithmetic']}" if "w8a8" in line["key"] else str(line["arithmetic"])


# Order of work


def child(*words: str) -> str | None:
    """What this script prints for one thing in a process of its own, with its own memory; nothing if that fails."""
    done = subprocess.run([sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True, check=False)
    return done.stdout if done.returncode == 0 else None


def each(what: str, out: Path, rounds: int, keys: Mapping[str, list[str]]) -> None:
    """Do `what` for every key that the ledger does not have."""
    ledger = out / f"{what}.jsonl"
    lines = read_lines(ledger)
    for key, words in keys.items():
        if any(line["key"] == key for line in lines):
            continue
        print(what, key, flush=True)
        said = child(what, "--out", str(out), "--rounds", str(rounds), *words)
        if said is None:
            print(f"{key} failed, and is tried again next time", flush=True)
            continue
        lines.append({"key": key, **json.loads(said.splitlines()[-1])})
        write_text(ledger, "".join(json.dumps(line) + "\n" for line in lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("convert", "measure", "whole", "table", "fast", "paces", "calls"))
    parser.add_argument("--out", type=Path, default=Path("runs/cpu_speed"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--unet", choices=("w8a8", "fp32"), default="w8a8", help="its precision in `fast`")
    parser.add_argument("--one", help="a network or a picture, in this process")
    given = parser.parse_args()
    out: Path = given.out
    rivals = {rival.name: rival for rival in (*RIVALS, *_of_fast("w8a8"), *_of_fast("fp32"))}
    pictures = {one.key: one for one in (*PICTURES, *ways())}  # of which some are the same
    at_once: dict[str, Callable[[], None]] = {
        "table": lambda: show(out),
        "fast": lambda: fast(out, given.unet, given.rounds),
        "paces": lambda: print(json.dumps(paces())),
        "calls": lambda: print(json.dumps(call_seconds(out, given.unet, given.rounds))),
    }
    if given.what in at_once:
        at_once[given.what]()
    elif given.one is None:
        if given.what == "convert":
            for name, rival in reversed(rivals.items()):
                if rival.runtime != "torch" and not (out / rival.folder / rival.part / "conversion.json").exists():
                    print("convert", name, flush=True)
                    child("convert", "--out", str(out), "--one", name)
            export_pictures(out)
        elif given.what == "measure":
            each("measure", out, given.rounds, {name: ["--one", name] for name in rivals})
        else:
            each("whole", out, given.rounds, {name: ["--one", name] for name in pictures})
    elif given.what == "convert":
        convert(rivals[given.one], out)
    elif given.what == "measure":
        print(json.dumps(measure(rivals[given.one], out, given.rounds)))
    else:
        print(json.dumps(whole(pictures[given.one], out)))


def fast(out: Path, precision: str, rounds: int) -> None:
    """Stock and what spares work, composed of the calls that they make."""
    for rival in _of_fast(precision):
        if not (out / rival.folder / rival.part / "conversion.json").exists():
            child("convert", "--out", str(out), "--one", rival.name)
    each("paces", out, 1, {_capability(): []})
    key = f"{precision} {_capability()}"
    each("calls", out, rounds, {key: ["--unet", precision]})
    pace = _line(out / "paces.jsonl", _capability())
    spent = _line(out / "calls.jsonl", key)
    text = f"{fast_table(ways(precision), spent, pace)}\n\n{machine()}"
    print(text)
    file = "cpu_fast_avx2.md" if _capability() == "AVX2" else "cpu_fast.md"
    command = f"`python benchmarks/cpu_speed.py fast --unet {precision}`, rounds: {rounds}"
    write_text(RESULTS / file, f"# A picture with less work\n\n{command}\n\n{text}\n")


def _of_fast(precision: str) -> tuple[Rival, Rival, Rival]:
    own = Rival(UNET, "tiny", "openvino", precision)
    return own, dataclasses.replace(own, pool_keys=_POOLED), Rival(DECODER, "tiny", "openvino", "fp32")


def _capability() -> str:
    return str(torch.backends.cpu.get_cpu_capability())


def _line(ledger: Path, key: str) -> dict[str, Any]:
    return next(line for line in read_lines(ledger) if line["key"] == key)


def call_seconds(out: Path, precision: str, rounds: int) -> dict[str, Any]:
    """Processor seconds of the calls that pictures of `ways` consist of, in turns, and the load of the machine."""
    *unets, decoders = (out / rival.folder for rival in _of_fast(precision))
    networks, pooled = (_opened(decoders, folder) for folder in unets)
    latents, context = np.zeros((2, 4, SIDE, SIDE), np.float32), np.zeros((2, TOKENS, WIDTH), np.float32)
    stock, decode = unet("teacher"), decoder("kl").decode
    deep = networks.keeping(latents[:1], 901.0, {"context": context[:1]})[1].repeat(2, axis=0)
    noisy, told = torch.from_numpy(latents), torch.from_numpy(context)
    works: dict[str, Callable[[], object]] = {"decoder tiny": lambda: networks.decode(latents[:1])}
    for count, (keys, own) in itertools.product((2, 1), (("", networks), (_KEYS, pooled))):
        given = latents[:count], 901.0, {"context": context[:count]}
        works[f"{count} keeping{keys}"] = partial(own.keeping, *given)
        works[f"{count} outer{keys}"] = partial(own.outer, *given, deep[:count])
    for work in works.values():  # OpenVINO makes ready for a size when it meets it
        work()
    works["stock"] = lambda: stock(noisy, torch.tensor(901), told, return_dict=False)
    works["decoder kl"] = lambda: decode(noisy[:1], return_dict=False)
    spent: dict[str, list[float]] = {name: [] for name in works}
    with torch.inference_mode():
        for _ in range(rounds):
            for name, work in works.items():
                began = time.process_time()
                work()
                spent[name].append(time.process_time() - began)
                print(name, spent[name], file=sys.stderr, flush=True)
    return {"seconds": {name: float(np.median(each)) for name, each in spent.items()}, "load": os.getloadavg()[1]}


def _opened(decoder: Path, unet: Path) -> OpenvinoNetworks:
    _with_part(decoder, unet / UNET, both := unet.with_name(f"fast-{unet.name}"))
    return OpenvinoNetworks(both, threads=torch.get_num_threads(), precision=_MULTIPLIED)


def composed(way: Picture, seconds: Mapping[str, float]) -> float:
    """Processor seconds of a picture, from its first U-Net call to pixels."""
    if way.name in MODELS:
        return len(calls(way)) * seconds["stock"] + seconds["decoder kl"]
    keys = _KEYS if way.pool_keys else ""
    each = (seconds[f"{samples} {'keeping' if computes else 'outer'}{keys}"] for samples, computes in calls(way))
    return sum(each) + seconds["decoder tiny"]


def fast_table(found: list[Picture], spent: Mapping[str, Any], pace: Mapping[str, float]) -> str:
    """Of pictures, the first of which the others are compared with."""
    rows = [
        "| 512-px picture, steps, guidance 7.5 | TMACs, int8 + float | seconds of one processor | times less "
        "| at best, s |",
        "|---|---|---|---|---|",
    ]
    first = composed(found[0], spent["seconds"])
    for way in found:
        work, own = of_picture(way), composed(way, spent["seconds"])
        least = work.seconds({**pace, "floats": pace["stock"]} if way.name in MODELS else pace)
        rows.append(
            f"| {way.key} | {work.integers / 1e12:.2f} + {work.floats / 1e12:.2f} | {own:.1f} | {first / own:.2f} "
            f"| {least:.1f} |"
        )
    products = ", ".join(f"{pace[kind] / 1e9:.0f} {name}" for kind, name in _KINDS.items())
    each = ", ".join(f"{name} {seconds:.2f}" for name, seconds in spent["seconds"].items())
    notes = [f"Seconds of one processor a call: {each}; others waited for it too (load {spent['load']:.0f})."]
    notes += [f"At best: at the pace of a product of {_PRODUCT}, in GMACs a second {products}."]
    return "\n".join([*rows, "", *notes])


def show(out: Path) -> None:
    lines, wholes = (read_lines(out / f"{what}.jsonl") for what in ("measure", "whole"))
    text = f"{table(lines, wholes)}\n\n{machine()}"
    print(text)
    write_text(
        RESULTS / "cpu_speed.md", f"# Speed on a CPU at full size\n\n`python benchmarks/cpu_speed.py`\n\n{text}\n"
    )


def machine() -> str:
    about = provenance()
    extras = [("8-bit dot products", torch.cpu._is_vnni_supported()), ("bf16", torch.cpu._is_avx512_bf16_supported())]
    capability = _capability()
    arithmetic = [capability, *(name for name, there in extras if there and capability != "AVX2")]
    processor = f"{about['processor']} ({', '.join(arithmetic)})"
    cores = f"{about['processors']} cores, threads: {torch.get_num_threads()}"
    return f"{processor}, {cores}; {about['started'][:10]}; torch {about['versions']['torch']}."


if __name__ == "__main__":
    main()
