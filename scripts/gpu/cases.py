"""What `run.py measure` measures: parts in order of their worth, each of cases that give a row of results."""

import contextlib
import dataclasses
import gc
import importlib
import importlib.util
import json
import math
import shlex
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from pretrain import STAGES, Workspace, adopt, train_teacher
from run import Row, Setting
from ship import assemble_model
from train_throughput import SIZES, VARIANTS, Size, build, rows
from train_throughput import measure as measure_steps

from bksdm.cli import VERBS, options_of, parse
from bksdm.common.assets import asset
from bksdm.common.devices import choose_device, choose_precision
from bksdm.common.runs import provenance, read_lines
from bksdm.evaluate.benchmark import latencies
from bksdm.families.recipe import load_recipe
from bksdm.models.pipelines import quiet_libraries, save_pipeline
from bksdm.pruning.inherit import prune_unet, with_denoiser

_GIB = 2**30
RECIPES = ("base", "small", "tiny")
FULL = SIZES["sd"]
TOY = Size((32, 32, 32, 32), (32, 32, 32), 32, 64, 16, "a toy, latents 8 x 8 x 4")
_LEARN = "--accumulation 1 --log_every 1 --sample_every 0"

Case = Callable[[Setting], Row]


class Skip(Exception):  # noqa: N818 - nothing is wrong
    """A case is for other machines than this one."""


@dataclass(frozen=True)
class Part:
    """Cases that share a part of the budget."""

    share: float
    cases: Mapping[str, Case]


def describe(setting: Setting) -> Row:
    """The card, and what computes on it.

    Raises:
        InputError: There is no such device.
    """
    quiet_libraries()
    device, about = choose_device(setting.device), provenance()
    del about["command"]
    for package in ("accelerate", "huggingface_hub", "peft", "torchvision"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            about["versions"][package] = metadata.version(package)
    if device.type != "cuda":
        return {"device": setting.device, "card": "no card", **about}
    card = torch.cuda.get_device_properties(device)
    memory = f"{card.total_memory / _GIB:.0f} GiB, CUDA {torch.version.cuda}"
    return {"device": setting.device, "card": f"{card.name}, {memory}", **about}


def result(case: Case, setting: Setting) -> Row:
    """What a case gives, or why it gives nothing."""
    if setting.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    try:
        return case(setting)
    except Skip as reason:
        return {"skipped": str(reason)}
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        return {"failed": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
    finally:
        gc.collect()
        if setting.device != "cpu":
            torch.cuda.synchronize()  # fails for good where an error has left the card unusable, and ends the process
            torch.cuda.empty_cache()


def command(setting: Setting, *, words: str, needs: tuple[str, ...] = (), on_a_card: bool = False) -> Row:
    """A verb of bksdm's with its words, and what it left in its folder, which is the last of them."""
    if on_a_card and setting.device == "cpu":
        raise Skip("is for a GPU")
    missing = [package for package in needs if importlib.util.find_spec(package) is None]
    if missing:
        raise Skip(f"needs {', '.join(missing)}, not installed here")
    for folder, maker in _MAKERS.items():
        if f"{{work}}/{folder}" in words.rpartition(" ")[0] and not (setting.work / folder).exists():
            command(setting, words=_COMMANDS[maker])
    name, *given = shlex.split(words.format(work=setting.work))
    _, run = VERBS[name]
    run(parse(options_of(name), name, given if name == "prune" else [*given, "--device", setting.device]))
    return left(Path(given[-1]))


def left(folder: Path) -> Row:
    """What the folder of a run says, in numbers.

    Raises:
        ValueError: A loss is not finite, or a picture is of one colour.
    """
    found: Row = {}
    if records := read_lines(folder / "metrics.jsonl"):
        found |= {name: records[-1][name] for name in ("loss", "images_per_second", "peak_memory_gib")}
        if not math.isfinite(found["loss"]):
            raise ValueError(f"the loss is {found['loss']}")
    if (scores := folder / "scores.json").exists():
        models = json.loads(scores.read_text())["models"]
        found |= {
            f"{score} of {name}": value["value"] for name, of in models.items() for score, value in of["scores"].items()
        }
    pictures = sorted(folder.glob("[0-9]*.png"))
    for picture in pictures:
        with Image.open(picture) as opened:
            if all(low == high for low, high in opened.convert("RGB").getextrema()):  # type: ignore[misc]
                raise ValueError(f"{picture.name} is of one colour")
    return found | ({"pictures": len(pictures)} if pictures else {})


def throughput(setting: Setting, *, recipe: str, batch_size: int) -> Row:
    """Pictures a second and memory of a step of ours and of the published loop."""
    size, steps = (TOY, 2) if setting.toy else (FULL, 5)
    count = batch_size // 8 if setting.toy else batch_size
    compared = [VARIANTS[0], VARIANTS[6]]
    found = measure_steps(size, compared, recipe, count, 1, steps, torch.device(setting.device))
    published, ours = rows(compared, found, count)
    speed = {
        "batch_size": count,
        "images_per_second": ours["images_per_second"],
        "published": published["images_per_second"],
    }
    memory = {"memory_gib": ours["memory"] / _GIB, "published_memory_gib": published["memory"] / _GIB}
    return (
        speed | {name: ours[name] for name in ("times", "first_loss_difference")} | (memory if ours["memory"] else {})
    )


def latency(setting: Setting) -> Row:
    """Seconds of one picture by the teacher and its students, taking turns."""
    device = torch.device(setting.device)
    steps, rounds = (2, 1) if setting.toy else (25, 3)
    teacher = build(TOY if setting.toy else FULL, device)
    teacher.to(choose_precision("auto", device, training=False))
    teacher.set_progress_bar_config(disable=True)
    models = {"teacher": teacher} | {
        recipe: with_denoiser(teacher, prune_unet(teacher.unet, load_recipe(recipe))[0].to(device).eval())
        for recipe in RECIPES
    }
    seconds = {name: spread.median for name, spread in latencies(models, steps=steps, rounds=rounds).items()}
    return seconds | {f"{name}, times": seconds["teacher"] / seconds[name] for name in RECIPES}


def learn(setting: Setting, *, words: str = "", on_a_card: bool = False) -> Row:
    """A step of the embedded model's student in some way."""
    out = f"{setting.work}/{words.replace('--', '').replace(' ', '-')}"
    pair = "--teacher emoji --student {work}/student --data emoji/heldout"
    return command(
        setting, words=f"distill {pair} {_LEARN} --steps 1 --batch_size 16 {words} --out {out}", on_a_card=on_a_card
    )


def learn_kind(setting: Setting, *, module: str, builder: str, recipe: str) -> Row:
    """A step of a student of a small random teacher of another kind; `builder` in `module` of the tests makes it."""
    folder = setting.work / builder
    save_pipeline(_built(module, builder), folder / "teacher")
    command(setting, words=f"prune {folder}/teacher --recipe {recipe} --out {folder}/student")
    pair = f"--teacher {folder}/teacher --student {folder}/student --data emoji/heldout"
    return command(
        setting, words=f"distill {pair} {_LEARN} --resolution 32 --steps 1 --batch_size 8 --out {folder}/run"
    )


def _built(module: str, builder: str) -> DiffusionPipeline:
    tiny = importlib.import_module(module)
    shape = (tiny.XL_SHALLOW_UNET,) if builder == "build_xl_pipeline" else ()
    pipeline: DiffusionPipeline = getattr(tiny, builder)(*shape)
    return pipeline


def train_longer(setting: Setting) -> Row:
    """Train the embedded teacher on from the weights that ship, for most of the time that is left."""
    few, many, size = (1, 3, 8) if setting.toy else (20, 120, 256)

    def run(name: str, steps: int) -> tuple[Workspace, float]:
        work, began = Workspace(setting.work / name), time.monotonic()
        (work.root / "art").mkdir(parents=True)
        (work.root / "art" / "train").symlink_to(asset("emoji", "art", "heldout" if setting.toy else "train"))
        with contextlib.redirect_stdout(None):
            adopt(work)
            pace = dataclasses.replace(STAGES["teacher"][1], steps=steps, batch_size=size, device=setting.device)
            train_teacher(work, pace)
        return work, time.monotonic() - began

    starting = run("few", few)[1]
    each = max(1e-4, (run("many", many)[1] - starting) / (many - few))
    steps = int(((setting.until - time.monotonic()) * 0.6 - starting) / each)
    if steps < many:
        raise Skip(f"there is time for {max(0, steps)} steps, which teach nothing")
    steps = min(steps, 5) if setting.toy else steps
    work, seconds = run("teacher", steps)
    assemble_model(work, setting.out / "teacher")
    return {"steps": steps, "images_per_second": size / each, "trained_seconds": seconds}


def trained(setting: Setting) -> Row:
    """What longer training brought, by pictures of held-out captions."""
    if not (setting.out / "teacher").exists():
        raise Skip("nothing was trained")
    models = f"before=emoji after={setting.out}/teacher --latency 0"
    scores = "retrieval_r1 --limit 8 --steps 2" if setting.toy else "retrieval_r1 frechet_distance --batch_size 64"
    return command(setting, words=f"evaluate {models} --scores {scores} --out {setting.work}/trained")


_DISTILL = "distill --teacher emoji --student {work}/student --data emoji/heldout --steps 3 --batch_size 8 " + _LEARN
_DRAW = 'generate emoji --prompt "red apple, flat style" --steps 5'
_LCM = "lcm --teacher emoji --student {work}/distilled/student --data emoji/heldout --steps 3 --batch_size 8 " + _LEARN
_FEW = "--scores retrieval_r1 --limit 16 --steps 5 --resamples 20 --latency 0"
_PERSONALIZE = 'personalize emoji --images {work}/pictures --prompt "a photo of sks" --class_images 4 --class_steps 5'
_COMMANDS = {
    "prune": "prune emoji --recipe small --out {work}/student",
    "distill": f"{_DISTILL} --out {{work}}/distilled",
    "generate": 'generate {work}/distilled/student --prompt "red apple, flat style" --steps 5 --out {work}/pictures',
    "evaluate": f"evaluate emoji {{work}}/distilled/student {_FEW} --out {{work}}/scores",
    "lcm": f"{_LCM} --out {{work}}/lcm",
    "distill, fp32": f"{_DISTILL} --precision fp32 --out {{work}}/fp32",
    "distill, fp32 by a teacher in bf16": f"{_DISTILL} --precision fp32 --teacher_precision bf16 --out {{work}}/mixed",
}
_MAKERS = {"student": "prune", "distilled": "distill", "pictures": "generate"}  # of folders that others read
_OTHER_COMMANDS = {
    "generate, fp16 and the small decoder": f"{_DRAW} --precision fp16 --decoder emoji --out {{work}}/half",
    "generate from a picture": f"{_DRAW} --image {{work}}/pictures/00000.png --strength 0.5 --out {{work}}/edited",
    "personalize": f"{_PERSONALIZE} --lora --steps 4 --log_every 1 --out {{work}}/lora",
    "decoder": "decoder --teacher emoji --data emoji/heldout --steps 4 --log_every 1 --out {work}/decoder",
    "benchmark": "benchmark emoji {work}/student --rounds 2 --steps 5 --out {work}/benchmark",
    "sensitivity": "sensitivity emoji --data emoji/heldout --scores output --pictures 8 --out {work}/worth",
}
_PREPARE = "prepare emoji/heldout --teacher emoji --text_embeddings --out {work}/latents"
_KINDS = {
    "SDXL": ("tiny_models", "build_xl_pipeline", "base"),
    "flux": ("tiny_flow", "build_flux_pipeline", "half"),
    "flux2": ("tiny_flow", "build_flux2_pipeline", "half"),
    "zimage": ("tiny_flow", "build_z_pipeline", "half"),
}
PARTS = {
    "verbs": Part(
        0.22,
        {name: partial(command, words=words) for name, words in _COMMANDS.items()}
        | {"distill, fp16": partial(command, words=f"{_DISTILL} --precision fp16 --out {{work}}/fp16", on_a_card=True)},
    ),
    "throughput": Part(
        0.4,
        {
            f"{recipe}, batch {size}": partial(throughput, recipe=recipe, batch_size=size)
            for recipe in RECIPES
            for size in (16, 64)
        },
    ),
    "latency": Part(0.12, {"teacher and students": latency}),
    "ways": Part(
        0.12,
        {
            "teacher in 8 bits": partial(learn, words="--teacher_precision fp8"),
            "LoRA": partial(learn, words="--lora_rank 4"),
            "LoRA beside 8 bits": partial(learn, words="--lora_rank 4 --student_precision fp8 --teacher_precision fp8"),
            "teacher in main memory": partial(learn, words="--offload_teacher", on_a_card=True),
            **{
                name: partial(learn_kind, module=module, builder=builder, recipe=recipe)
                for name, (module, builder, recipe) in _KINDS.items()
            },
        },
    ),
    "rest": Part(
        0.07,
        {name: partial(command, words=words) for name, words in _OTHER_COMMANDS.items()}
        | {
            "prepare": partial(command, words=_PREPARE, needs=("datasets", "pandas", "pyarrow")),
            "distill, compiled teacher": partial(learn, words="--compile_teacher", on_a_card=True),
        },
    ),
    "teacher": Part(0.07, {"trained longer": train_longer, "scored": trained}),
}
