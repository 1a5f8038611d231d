"""`bksdm decoder`: from a teacher and pictures, or their latents, to a small decoder of its latents."""

import dataclasses
import json
import math
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny, StableDiffusionPipeline

from bksdm.data.stream import Samples, Stream
from bksdm.decoder import fresh_autoencoder
from bksdm.devices import VAE_LAYOUT, choose_device, choose_precision
from bksdm.distill.conditions import Conditions
from bksdm.distill.data import Latents, Pictures, open_data
from bksdm.distill.decoding import Coder, DecoderDistillation, Taught, taught_bytes
from bksdm.distill.loop import Schedule, train
from bksdm.distill.record import Record
from bksdm.distill.state import Checkpoints, Ema, TrainState, averaged
from bksdm.distill.training import check_steps
from bksdm.errors import InputError
from bksdm.models import check_resolution, fingerprint, load_pipeline
from bksdm.options import DecoderOptions
from bksdm.progress import bar
from bksdm.randomness import derived_seed
from bksdm.runs import check_free, open_run, replace_folder, write_text

STEPS_FILE = "training.json"
_MAY_CHANGE = ("batch_size", "device", "workers", "log_every", "checkpoint_every", "keep_checkpoints", "json")
_SHOWN = ("pixels", "edges", "latents")


def distill_decoder(options: DecoderOptions) -> Path:
    """Train a small decoder; the same options again go on where the run stopped.

    Returns:
        The folder of the decoder, `OUT/decoder`, an `AutoencoderTiny` of diffusers.

    Raises:
        InputError: An option, the model or the data are unfit; see the message.
        Interrupted: The run was asked to stop and can go on.
    """
    _check(options)
    run = Path(options.out)
    data = open_data(options.data, options.resolution, options.flip, options.cache_gb)
    settings = _settings(options, data)
    may_change = _MAY_CHANGE if options.cosine else (*_MAY_CHANGE, "steps")
    check_free(run, "decoder", settings, may_change)
    checkpoints = Checkpoints(run / "checkpoints", options.keep_checkpoints)
    check_steps(options, checkpoints)
    device = choose_device(options.device)
    precision = choose_precision(options.precision, device, training=True)
    teacher = load_pipeline(options.teacher, with_unet=isinstance(data, Pictures))  # its config has their size
    teacher.vae.to(device, memory_format=VAE_LAYOUT)
    teacher.text_encoder.to(device)
    data.check(teacher)
    open_run(run, "decoder", settings, may_change, {"device": str(device), "precision": str(precision)})

    state = _fresh_state(options, teacher, device, precision)
    checkpoints.restore(state)
    if state.step < options.steps:
        _train(options, teacher, state, checkpoints, data, device, precision)
    if _steps_of(run / "decoder") != state.step:
        _save(run / "decoder", state)
    return run / "decoder"


def newest_decoder(options: DecoderOptions) -> tuple[AutoencoderTiny, int]:
    """The averaged decoder in the newest checkpoint of a run, on the CPU, and after how many steps it was written.

    Raises:
        InputError: There is no checkpoint, or it is cut short.
    """
    teacher, device = load_pipeline(options.teacher, with_unet=False), torch.device("cpu")
    state = _fresh_state(options, teacher, device, torch.float32)
    if not Checkpoints(Path(options.out) / "checkpoints").restore(state):
        raise InputError(f"{options.out} has no checkpoint; train first")
    if state.ema:
        state.ema.copy_to(state.model)
    return _coder(state).small, state.step


def _settings(options: DecoderOptions, data: Pictures | Latents) -> dict[str, Any]:
    """What the run is known by: its options, and what is in the model and the data that they name."""
    content = {"teacher_content": fingerprint(options.teacher), "data_content": data.digest}
    return dataclasses.asdict(options) | content


def _fresh_state(
    options: DecoderOptions, teacher: StableDiffusionPipeline, device: torch.device, precision: torch.dtype
) -> TrainState:
    """The small network before its first step."""
    seed = derived_seed(options.seed, "decoder")
    small = fresh_autoencoder(teacher.vae.config, options.channels, options.blocks, seed)
    coder = Coder(small.to(device, memory_format=VAE_LAYOUT)).train()
    return TrainState(
        coder,
        torch.optim.AdamW(coder.parameters(), lr=options.lr, weight_decay=options.weight_decay, fused=True),
        ema=Ema(coder, options.ema_decay) if options.ema_decay else None,
        scaler=torch.amp.GradScaler(device.type, enabled=precision == torch.float16),
    )


def _train(
    options: DecoderOptions,
    teacher: StableDiffusionPipeline,
    state: TrainState,
    checkpoints: Checkpoints,
    data: Pictures | Latents,
    device: torch.device,
    precision: torch.dtype,
) -> None:
    """Bring `state` to the last step, with a bar and records."""
    run = Path(options.out)
    conditions = Conditions(teacher.vae, teacher.text_encoder)
    stream = Stream(_samples(options, teacher, conditions, data), options.batch_size, options.seed, options.workers)
    names = [field.name for field in dataclasses.fields(Schedule) if hasattr(options, field.name)]
    record = Record(run / "metrics.jsonl", run / "tensorboard", state.step)
    with bar(options.steps, "training", state.step) as progress, closing(record):

        def report(step: int, values: dict[str, float]) -> None:
            squared = values.pop("squared")
            values["psnr"] = -10 * math.log10(max(squared, 1e-10))
            record(step, values)
            shown = "  ".join(f"{name} {values[name]:.3g}" for name in _SHOWN)
            progress.reach(step, f"{shown}  {values['psnr']:.1f} dB")

        train(
            state,
            DecoderDistillation(state.model, conditions, options.edges_weight, options.latent_noise),
            stream,
            Schedule(**{name: getattr(options, name) for name in names}),
            checkpoints,
            seed=options.seed,
            device=device,
            precision=precision,
            report=report,
        )


def _samples(
    options: DecoderOptions, teacher: StableDiffusionPipeline, conditions: Conditions, data: Pictures | Latents
) -> Samples:
    """What a step is given: what the teacher has decoded already, where that can be and has room."""
    samples, device = data.samples(teacher), teacher.vae.device
    drawn = samples.sample(0, 0)
    if "latents_mean" not in drawn:  # too many to keep as latents, and the more so as pictures
        return samples
    latents = drawn["latents_mean"].numel()
    factor = 2 ** (len(teacher.vae.config.block_out_channels) - 1)
    pixels = latents * 3 * factor**2 // teacher.vae.config.latent_channels
    if options.latent_noise or taught_bytes(len(samples), options.flip, pixels, latents) > options.cache_gb * 2**30:
        return samples
    with bar(len(samples) * (2 if options.flip else 1), "decoding latents") as progress:
        return Taught(samples, conditions, options.flip, options.seed, device, progress.advance)


def _check(options: DecoderOptions) -> None:
    for name in ("steps", "channels", "batch_size", "log_every", "checkpoint_every", "keep_checkpoints"):
        if getattr(options, name) < 1:
            raise InputError(f"{name} is {getattr(options, name)}; give at least 1")
    least_zero = ("blocks", "edges_weight", "latent_noise", "lr", "warmup", "weight_decay", "max_grad_norm", "cache_gb")
    for name in (*least_zero, "workers"):
        if not getattr(options, name) >= 0:
            raise InputError(f"{name} is {getattr(options, name)}; give 0 or more")
    if not 0 <= options.ema_decay < 1:
        raise InputError(f"ema_decay is {options.ema_decay}; give a number from 0 to below 1")
    check_resolution(options.resolution)


def _save(folder: Path, state: TrainState) -> None:
    """The averaged weights in float32, whole or not at all."""
    try:
        with averaged(state), replace_folder(folder) as partial:
            _coder(state).small.save_pretrained(partial, safe_serialization=True)
            write_text(partial / STEPS_FILE, json.dumps({"steps": state.step}) + "\n")
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror or error}; choose another --out") from error


def _coder(state: TrainState) -> Coder:
    assert isinstance(state.model, Coder)
    return state.model


def _steps_of(folder: Path) -> int | None:
    """After how many steps the decoder in `folder` was written; None where there is none."""
    file = folder / STEPS_FILE
    return int(json.loads(file.read_text())["steps"]) if file.is_file() else None
