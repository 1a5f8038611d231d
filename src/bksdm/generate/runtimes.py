"""Which runtime makes the pictures: torch, or on a CPU another to which the model is converted once.

A conversion takes a while, and its result is kept (in `~/.cache/bksdm`, or where BKSDM_CACHE says). `auto` takes a kept
one, and converts where that costs less time than it saves. How much faster a runtime is than torch was measured
(`benchmarks/results/cpu_speed_avx2.md`); how fast torch is here is measured by a matrix product when it matters.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image

from bksdm.common.devices import choose_precision
from bksdm.common.errors import InputError
from bksdm.common.progress import say
from bksdm.common.runs import cache_folder
from bksdm.export.formats import format_named
from bksdm.export.run import export, say_unchecked
from bksdm.generate.exported import export_facts, is_exported, open_exported, sample_exported
from bksdm.generate.sampling import sample, scheduler_named
from bksdm.models.adapters.lora import Lora, merge_lora
from bksdm.models.adapters.lora_files import check_made_for
from bksdm.models.configs import family_of_model, load_denoiser_config, load_scheduler_config
from bksdm.models.decoder import load_model
from bksdm.models.folders import check_folder, decoder_fingerprint, fingerprint, has_safety_checker
from bksdm.models.pipelines import check_drawing, cutting, image_size, pixels_of_a_token, say_hidden, scheduler_config
from bksdm.options.export import ExportFormat, ExportOptions
from bksdm.options.generate import Runtime
from bksdm.options.shared import Precision
from bksdm.pruning.cost import unet_cost
from bksdm.pruning.told import recipe_of
from bksdm.runtime.flow import why_no_flow
from bksdm.runtime.schedulers import why_unknown, with_scheduler
from bksdm.runtime.spared import NOTHING, Spared

CONVERTED = ("openvino", "onnx")
# Seconds of a full-size U-Net step in torch over those in the runtime, in float32 on two cores with AVX2
# (benchmarks/results/cpu_speed_avx2.md: tiny, each over diffusers' teacher within its rounds).
FASTER = {"openvino": 1.08, "onnx": 0.9}
_ARITHMETIC: dict[Precision, str] = {"auto": "f32", "fp32": "f32", "bf16": "bf16", "fp16": "f16"}  # as OpenVINO says it
# Seconds of a conversion and its comparison with torch: for any model, and for a million parameters of its U-Net.
_CONVERSION = {"openvino": (20.0, 0.2), "onnx": (60.0, 0.2)}
_NOT_LOCAL = "the model is on the hub, and only local ones are converted"
_NOT_INSTALLED = "no faster runtime is installed; pip install 'bksdm[openvino]' has one"
_NOT_MEASURED = "how fast other runtimes are with models of this kind was not measured"
_PRODUCT = 1024
_EDITION = 2  # of conversions: those before have no parts of U-Nets, which reuse computes


@dataclass(frozen=True)
class Drawer:
    """What makes pictures.

    Attributes:
        runtime: torch, openvino or onnx.
        precision: Of the weights, and of the arithmetic, where that is another than float32.
        height, width: Of its pictures in pixels, where none are asked for.
        scheduler: The options of its scheduler, with `_class_name`.
        cut_off: The end of a prompt that it does not see.
        multiple: Of which these are multiples.
        sample: Takes what `bksdm.generate.sampling.sample` takes after the pipeline.
    """

    runtime: str
    precision: str
    height: int
    width: int
    scheduler: Mapping[str, Any]
    cut_off: Callable[[str], str]
    sample: Callable[..., Iterator[list[Image.Image]]]
    multiple: int = 8


@dataclass(frozen=True)
class Choice:
    """A runtime, and why it is the one."""

    runtime: str
    reason: str


def open_drawer(
    model: str,
    runtime: Runtime,
    device: torch.device,
    precision: Precision,
    *,
    decoder: str | None = None,
    scheduler: str | None = None,
    lora: Lora | None = None,
    masked: bool = False,
    spared: Spared = NOTHING,
    unet_calls: int = 1,
) -> Drawer:
    """What makes the pictures of MODEL.

    Arguments:
        model: A MODEL, or a folder that `bksdm export` wrote.
        runtime: auto, or one by name; an exported folder has its own.
        device: For torch; others compute on the CPU.
        precision: Of the weights in torch; of the arithmetic in OpenVINO, where auto is fp32: a seed then gives one
            picture on every processor.
        decoder: A small decoder in the place of the model's own.
        scheduler: Name of a diffusers scheduler in the place of the model's own.
        lora: What is added to the weights.
        masked: Whether a part of a picture is painted anew.
        spared: What it will draw without, as `open_exported` takes it.
        unet_calls: How many pictures the U-Net will be called for in all: steps x pictures x 2 with guidance.

    Raises:
        InputError: Model and runtime do not go together; see the message.
    """
    by_torch = next((name for name, given in (("mask", masked), ("lora", lora)) if given), None)
    if by_torch and (is_exported(model) or runtime not in ("auto", "torch")):
        raise InputError(f"{by_torch} needs torch; leave out --runtime, and give the model rather than its export")
    if is_exported(model):
        return _exported(model, runtime, precision, decoder, scheduler, spared)
    if by_torch:
        runtime = "torch"
    choice = choose(model, device, precision, decoder, scheduler, unet_calls, spared) if runtime == "auto" else None
    chosen = runtime if choice is None else choice.runtime
    if chosen == "torch":
        return _torch(model, device, precision, decoder, scheduler, lora, masked)
    if device.type != "cpu":
        raise InputError(f"runtime {chosen} computes on the CPU; leave out --device, or give --runtime torch")
    alone = _torch_alone(model, scheduler)
    if alone:
        raise InputError(f"runtime {chosen} cannot draw {model}: {alone}; give --runtime torch")
    _check_arithmetic(chosen, precision)
    if choice is not None:
        say(f"{chosen}: {choice.reason}")
    folder = str(converted(model, chosen, decoder, spared.pool_keys))
    return _exported(folder, "auto", precision, None, scheduler, spared)


def choose(
    model: str,
    device: torch.device,
    precision: Precision,
    decoder: str | None,
    scheduler: str | None,
    unet_calls: int,
    spared: Spared = NOTHING,
) -> Choice:
    """The runtime that is done first, with its conversion, if it is still to be made."""
    if Path(model).is_dir():
        check_folder(Path(model))
    if device.type != "cpu":
        return Choice("torch", f"on {device.type}")
    if precision not in ("auto", "fp32"):
        return Choice("torch", "a precision is asked for")
    alone = "no other runtime has the model's safety checker" if has_safety_checker(model) else None
    alone = alone or (_NOT_MEASURED if family_of_model(model).by_flow else None)
    alone = alone or _torch_alone(model, scheduler)
    if alone:
        return Choice("torch", alone)
    best = next((name for name in CONVERTED if FASTER[name] > 1 and _installed(name)), None)
    content = fingerprint(model) if best else None  # reads all of the model
    if content is None or best is None:
        return Choice("torch", _NOT_LOCAL if best else _NOT_INSTALLED)
    if is_exported(_kept(content, best, decoder, spared.pool_keys)):
        return Choice(best, "the model is converted already")
    return _worth_it(model, best, unet_calls)


def _torch_alone(model: str, scheduler: str | None) -> str | None:
    """Why no other runtime draws with a model's scheduler, or with the one that is asked for; None where they do."""
    own = load_scheduler_config(model)
    if own is None:
        return None
    unknown = why_no_flow if family_of_model(model).by_flow else why_unknown
    asked = own if scheduler is None else with_scheduler(own, scheduler)
    return unknown(own) or unknown(asked)


def _worth_it(model: str, runtime: str, unet_calls: int) -> Choice:
    """Torch, where a conversion takes longer than what it saves."""
    config = load_denoiser_config(model)
    cost = unet_cost(config)
    spent = 2 * cost.gmacs_all * unet_calls / _gflops()
    saved = spent * (1 - 1 / FASTER[runtime])
    fixed, grows = _CONVERSION[runtime]
    conversion = fixed + grows * cost.params / 1e6
    if saved <= conversion:
        return Choice("torch", f"{runtime} would save about {saved:.0f} s and its conversion take {conversion:.0f} s")
    return Choice(runtime, f"saves about {saved:.0f} s, and its conversion takes about {conversion:.0f} s, once")


def converted(model: str, runtime: str, decoder: str | None = None, pool_keys: int | None = None) -> Path:
    """The folder of a model in the form of a runtime, in float32, made where it is not there yet.

    Raises:
        InputError: The model is not on this machine, or cannot be converted.
    """
    content = fingerprint(model)
    if content is None:
        raise InputError(f"model {model} is on the hub, and only local ones are converted; download it first")
    folder = _kept(content, runtime, decoder, pool_keys)
    if not is_exported(folder):
        alone = _torch_alone(model, None)
        if alone:
            raise InputError(f"{model} cannot be converted for {runtime}: {alone}; take torch, or export --scheduler")
        say(f"converting {model} for {runtime}, once, into {folder}")
        to = cast(ExportFormat, runtime)
        export(ExportOptions(model, to, str(folder), "fp32", decoder=decoder, pool_keys=pool_keys))
    elif has_safety_checker(model):  # of which the conversion spoke
        say_unchecked(model, runtime)
    return folder


def _kept(content: str, runtime: str, decoder: str | None, pool_keys: int | None) -> Path:
    small = f"-{decoder_fingerprint(decoder)}" if decoder else ""
    pooled = f"-keys{pool_keys}" if pool_keys else ""
    return cache_folder() / f"{content}{small}{pooled}-{runtime}-{_EDITION}"


def _torch(
    model: str,
    device: torch.device,
    precision: Precision,
    decoder: str | None,
    scheduler: str | None,
    lora: Lora | None,
    masked: bool,
) -> Drawer:
    dtype = choose_precision(precision, device, training=False)
    pipeline = load_model(model, torch.float32 if lora else dtype, decoder)
    check_drawing(pipeline, model, masked=masked)
    if lora:
        check_made_for(lora.source, recipe_of(model))
        merge_lora(pipeline, lora.source, lora.scale)
        if dtype != torch.float32:
            pipeline.to(dtype)
    pipeline.to(device)
    if scheduler:
        pipeline.scheduler = scheduler_named(scheduler, pipeline.scheduler)
    cut_off, used = cutting(pipeline), scheduler_config(pipeline.scheduler)
    return Drawer(
        "torch",
        str(dtype),
        *image_size(pipeline),
        used,
        cut_off,
        partial(sample, pipeline),
        pixels_of_a_token(pipeline),
    )


def _exported(
    model: str,
    runtime: Runtime,
    precision: Precision,
    decoder: str | None,
    scheduler: str | None,
    spared: Spared,
) -> Drawer:
    facts = export_facts(model)
    if runtime not in ("auto", facts.get("format")):
        raise InputError(f"{model} was exported to {facts.get('format')}, and runtime is {runtime}; leave it out")
    if decoder:
        raise InputError(f"{model} is exported with its decoder; leave out --decoder, or export it with another")
    arithmetic = _ARITHMETIC[precision]
    pipeline = open_exported(model, arithmetic, scheduler, spared)
    _check_arithmetic(str(facts["format"]), precision)
    weights = str(facts.get("precision"))
    for word in pipeline.tokenizer.hidden_words():
        say_hidden(word)
    return Drawer(
        str(facts["format"]),
        weights if arithmetic == "f32" else f"{weights}, computed in {precision}",
        pipeline.height,
        pipeline.width,
        pipeline.scheduler,
        pipeline.tokenizer.cut_off,
        partial(sample_exported, pipeline),
    )


def _check_arithmetic(runtime: str, precision: Precision) -> None:
    if runtime != "openvino" and _ARITHMETIC[precision] != "f32":
        raise InputError(f"precision is {precision}, and runtime {runtime} computes in fp32; leave out --precision")


def _installed(runtime: str) -> bool:
    return not format_named(runtime).missing_packages()


def _gflops() -> float:
    """What torch does here in a second in float32, by a matrix product."""
    factor = torch.ones(_PRODUCT, _PRODUCT)
    factor @ factor
    began = time.perf_counter()
    factor @ factor
    return 2 * _PRODUCT**3 / 1e9 / (time.perf_counter() - began)
