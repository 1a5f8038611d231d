"""`bksdm decoder`: from a teacher and pictures, or their latents, to a small decoder of its latents."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny, DiffusionPipeline

from bksdm.common.devices import VAE_LAYOUT, choose_device, choose_precision
from bksdm.common.errors import InputError
from bksdm.common.progress import bar
from bksdm.common.randomness import derived_seed
from bksdm.common.runs import check_free, open_run, replace_folder, write_text
from bksdm.data.stream import Samples
from bksdm.distill.conditions import Conditions
from bksdm.distill.data import Latents, Pictures, open_data
from bksdm.distill.decoding import Coder, DecoderDistillation, Taught, taught_bytes
from bksdm.distill.follow import check_not_negative, check_steps, check_training, end_of, ended, follow, losses_of
from bksdm.distill.state import Checkpoints, Ema, TrainState, averaged
from bksdm.models.configs import check_ready
from bksdm.models.decoder import fresh_autoencoder
from bksdm.models.folders import fingerprint
from bksdm.models.pipelines import load_pipeline
from bksdm.options.distill import DecoderOptions

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
    check_ready("decoder", options.teacher)
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
    teacher = load_pipeline(options.teacher, with_denoiser=isinstance(data, Pictures))  # its config has their size
    teacher.vae.to(device, memory_format=VAE_LAYOUT)
    teacher.text_encoder.to(device)
    data.check(teacher)
    open_run(run, "decoder", settings, may_change, {"device": str(device), "precision": str(precision)})

    state = _fresh_state(options, teacher, device, precision)
    checkpoints.restore(state)
    if state.step < options.steps:
        _train(options, teacher, state, checkpoints, data, device, precision)
    if end_of(run / "decoder" / STEPS_FILE) != state.step:
        _save(run / "decoder", state)
    return run / "decoder"


def newest_decoder(options: DecoderOptions) -> tuple[AutoencoderTiny, int]:
    """The averaged decoder in the newest checkpoint of a run, on the CPU, and after how many steps it was written.

    Raises:
        InputError: There is no checkpoint, or it is cut short.
    """
    teacher, device = load_pipeline(options.teacher, with_denoiser=False), torch.device("cpu")
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
    options: DecoderOptions, teacher: DiffusionPipeline, device: torch.device, precision: torch.dtype
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
    teacher: DiffusionPipeline,
    state: TrainState,
    checkpoints: Checkpoints,
    data: Pictures | Latents,
    device: torch.device,
    precision: torch.dtype,
) -> None:
    """Bring `state` to the last step, with a bar and records."""
    conditions = Conditions.of(teacher)
    follow(
        options,
        state,
        DecoderDistillation(state.model, conditions, options.edges_weight, options.latent_noise),
        _samples(options, teacher, conditions, data),
        checkpoints,
        title="training",
        told=_told,
        device=device,
        precision=precision,
        workers=options.workers,
    )


def _told(values: dict[str, float]) -> str:
    values["psnr"] = -10 * math.log10(max(values.pop("squared"), 1e-10))
    return f"{losses_of(values, _SHOWN)}  {values['psnr']:.1f} dB"


def _samples(
    options: DecoderOptions, teacher: DiffusionPipeline, conditions: Conditions, data: Pictures | Latents
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
    check_training(options)
    if options.channels < 1:
        raise InputError(f"channels is {options.channels}; give at least 1")
    for name in ("blocks", "edges_weight", "latent_noise"):
        check_not_negative(options, name)


def _save(folder: Path, state: TrainState) -> None:
    """The averaged weights in float32, whole or not at all."""
    try:
        with averaged(state), replace_folder(folder) as partial:
            _coder(state).small.save_pretrained(partial, safe_serialization=True)
            write_text(partial / STEPS_FILE, ended(state.step))
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror or error}; choose another --out") from error


def _coder(state: TrainState) -> Coder:
    assert isinstance(state.model, Coder)
    return state.model
