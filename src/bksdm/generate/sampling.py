"""Pictures from a pipeline: every picture has a seed of its own, so the batch size does not matter.

The denoising loop is diffusers' own.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any
from weakref import WeakSet

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, LCMScheduler, SchedulerMixin
from PIL import Image
from torch import Tensor, nn

from bksdm.common.errors import InputError
from bksdm.common.progress import say
from bksdm.families import family_of_pipeline
from bksdm.families.family import Told
from bksdm.generate.requests import Request
from bksdm.models.pipelines import caption_length, denoiser, image_size, safety_checker, scheduler_config
from bksdm.runtime.schedulers import with_scheduler
from bksdm.runtime.spared import NOTHING, Spared

_FLAGGED = "flagged"
_UNCHECKED = {"requires_safety_checker": False}  # pictures are checked here
_OVERFLOWING: WeakSet[nn.Module] = WeakSet()  # VAEs of which it has been said


@dataclass(frozen=True)
class Embedded:
    """What prompts give, known before, so that no text encoder is asked.

    Attributes:
        told: Of N prompts, by name.
        without: What guidance tells where there is no prompt, with N = 1.
    """

    told: Told
    without: Told


def sample(
    pipeline: DiffusionPipeline,
    requests: Sequence[Request],
    *,
    steps: int = 25,
    guidance: float = 7.5,
    batch_size: int = 4,
    negative_prompt: str | None = None,
    height: int | None = None,
    width: int | None = None,
    image: Image.Image | None = None,
    strength: float = 0.8,
    mask: Image.Image | None = None,
    sigmas: Sequence[float] | None = None,
    spared: Spared = NOTHING,
    embedded: Embedded | None = None,
    stepped: Callable[[], None] | None = None,
) -> Iterator[list[Image.Image]]:
    """Yield the pictures of `requests`, a batch at a time, in order.

    What a VAE's half precision overflows in is decoded again in float32. A picture that the pipeline's safety checker
    has made black has `flagged` in its `info`.

    Arguments:
        pipeline: On its device, its networks in eval mode.
        requests: Prompts and seeds.
        steps: Denoising steps.
        guidance: Classifier-free guidance scale; 1 or less for none.
        batch_size: Pictures at a time.
        negative_prompt: What to keep away from; none, or an empty one, leaves to the model what guidance tells it then.
        height: In pixels; the model's own by default.
        width: In pixels; the model's own by default.
        image: Start from this picture (SDEdit, arXiv 2108.01073) instead of from noise.
        strength: Share of the denoising that is done anew with `image`, in (0, 1].
        mask: Of the size of `image`: where it is white, the picture is painted anew, and elsewhere it stays to the
            last bit. By U-Nets that take mask and picture beside the latents, and by any other, whose latents outside
            are put back after every step.
        sigmas: Of flow matching: the noise level that each of the steps begins at, before the scheduler shifts it.
        spared: What is not computed; see `Family.sparing`.
        embedded: What the prompts give, if it is known.
        stepped: Called after every denoising step of a batch.

    Raises:
        InputError: A network gives numbers that are not finite, and what would help is said.
    """
    run = _pipeline(pipeline, image, mask)
    run.set_progress_bar_config(disable=True)
    family = family_of_pipeline(pipeline)
    if family.second_call(pipeline.config, denoiser(pipeline).config, guidance) == 1:
        spared = replace(spared, interval=None)
    own_height, own_width = image_size(pipeline)  # which pipelines take for a square's side where they are not told
    for asked in _batches(pipeline, requests, steps, guidance, batch_size, negative_prompt, sigmas, embedded):
        count, arguments = len(asked["generator"]), dict(asked)
        if image:
            arguments |= {"image": [image] * count, "strength": strength}
        if mask:
            arguments |= {"mask_image": [mask] * count}
        if image is None or mask:
            arguments |= {"height": height or own_height, "width": width or own_width}
        if stepped:
            arguments |= {"callback_on_step_end": _calling(stepped)}
        size = (height or own_height, width or own_width) if image is None or mask else (image.height, image.width)
        with family.sparing(denoiser(pipeline), pipeline.scheduler, spared):
            latents = run(**arguments, output_type="latent").images
        pixels, flags = _checked(pipeline, _decoded(pipeline, latents, size))
        pictures = _pictures(pipeline, pixels)
        if image and mask:
            pictures = [_only_inside(picture, image, mask) for picture in pictures]
        for picture, flagged in zip(pictures, flags, strict=True):
            picture.info |= {_FLAGGED: True} if flagged else {}
        yield pictures


def is_flagged(picture: Image.Image) -> bool:
    """Whether the safety checker has made a picture black."""
    return bool(picture.info.get(_FLAGGED))


def _pipeline(pipeline: DiffusionPipeline, image: Image.Image | None, mask: Image.Image | None) -> Any:
    """The pipeline of diffusers that starts from what is given, with the same parts."""
    if image is None:
        return pipeline
    family = family_of_pipeline(pipeline)
    kind = family.under_mask if mask else family.from_image
    made = family.assembled(pipeline.components | {family.denoiser: None}, {**pipeline.config, **_UNCHECKED}, kind)
    # Not above, where its sample_size is taken for a number, which it need not be.
    setattr(made, family.denoiser, denoiser(pipeline))
    return made


def _calling(stepped: Callable[[], None]) -> Callable[..., dict[str, Any]]:
    """A callback in the form of diffusers, which changes nothing."""

    def callback(pipeline: object, step: int, timestep: object, given: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG001
        stepped()
        return given

    return callback


def _only_inside(picture: Image.Image, image: Image.Image, mask: Image.Image) -> Image.Image:
    """What was painted where the mask is white, and the picture itself elsewhere: the VAE would change it."""
    return Image.composite(picture, image.convert("RGB"), mask.convert("L").point(lambda value: 255 * (value >= 128)))


def sample_latents(
    pipeline: DiffusionPipeline,
    requests: Sequence[Request],
    *,
    steps: int = 25,
    guidance: float = 7.5,
    batch_size: int = 4,
    sigmas: Sequence[float] | None = None,
) -> Iterator[Tensor]:
    """Yield the final latents with shape (B, C, h, w) of `requests`, of which `decode` makes what `sample` gives."""
    pipeline.set_progress_bar_config(disable=True)
    height, width = image_size(pipeline)
    for arguments in _batches(pipeline, requests, steps, guidance, batch_size, sigmas=sigmas):
        yield pipeline(**arguments, height=height, width=width, output_type="latent").images


def decode(pipeline: DiffusionPipeline, latents: Tensor) -> list[Image.Image]:
    """The pictures of final latents with shape (B, C, h, w), past the safety checker.

    Raises:
        InputError: As `sample` does.
    """
    return _pictures(pipeline, _decoded(pipeline, latents, image_size(pipeline)))


@torch.no_grad()
def _decoded(pipeline: DiffusionPipeline, latents: Tensor, size: tuple[int, int]) -> Tensor:
    """Pixels with shape (B, 3, H, W), about -1 to 1, of final latents as the pipeline gives them."""
    vae, family = pipeline.vae, family_of_pipeline(pipeline)
    if not latents.isfinite().all():
        half = denoiser(pipeline).dtype == torch.float16
        mend = "give --precision bf16 or fp32" if half else "its weights are damaged, or its training has diverged"
        raise InputError(
            f"the {family.noun} gives numbers that are not finite in {_named(denoiser(pipeline).dtype)}; {mend}"
        )
    scaled = family.for_vae(vae, latents.to(vae.dtype), size)
    if vae.dtype == torch.float16 and vae.config.force_upcast and family.upcasts_vae:
        return _decoded_in_float32(vae, scaled)
    pixels: Tensor = vae.decode(scaled, return_dict=False)[0]
    lost = ~pixels.isfinite().flatten(1).all(dim=1)
    if lost.any():
        again = _decoded_in_float32(vae, scaled[lost])
        if not again.isfinite().all():
            raise InputError("the VAE gives numbers that are not finite in float32; its weights are damaged")
        if vae not in _OVERFLOWING:
            _OVERFLOWING.add(vae)
            say(f"the VAE overflows in {_named(pixels.dtype)}: such pictures are decoded again in float32")
        pixels[lost] = again.to(pixels.dtype)
    return pixels


def _decoded_in_float32(vae: AutoencoderKL, scaled: Tensor) -> Tensor:
    dtype = vae.dtype
    try:
        with torch.autocast(scaled.device.type, enabled=False):
            pixels: Tensor = vae.float().decode(scaled.float(), return_dict=False)[0]
            return pixels
    finally:
        vae.to(dtype)  # the same weights to the last bit


def _checked(pipeline: DiffusionPipeline, pixels: Tensor) -> tuple[Tensor, list[bool]]:
    """Pixels of which those that the safety checker flags are black, and which these are."""
    checker = safety_checker(pipeline)
    if checker is None:
        return pixels, [False] * len(pixels)
    checked, flags = pipeline.run_safety_checker(pixels, pixels.device, checker.dtype)
    black = torch.tensor(flags, device=pixels.device)[:, None, None, None]
    return checked.masked_fill(black, -1), flags


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _pictures(pipeline: DiffusionPipeline, pixels: Tensor) -> list[Image.Image]:
    pictures: list[Image.Image] = pipeline.image_processor.postprocess(pixels, output_type="pil")
    return pictures


def _batches(
    pipeline: DiffusionPipeline,
    requests: Sequence[Request],
    steps: int,
    guidance: float,
    batch_size: int,
    negative_prompt: str | None = None,
    sigmas: Sequence[float] | None = None,
    embedded: Embedded | None = None,
) -> Iterator[dict[str, Any]]:
    """Arguments of the pipeline, a batch at a time."""
    family = family_of_pipeline(pipeline)
    levels = {} if sigmas is None else {"sigmas": list(sigmas)}
    reading = {} if embedded else family.reading(caption_length(pipeline))
    for start in range(0, len(requests), batch_size):
        batch = requests[start : start + batch_size]
        # An empty one is as good as none, which some pipelines tell otherwise.
        negative = [negative_prompt] * len(batch) if negative_prompt else None
        prompts: dict[str, Any] = {"prompt": [request.prompt for request in batch], **reading}
        if embedded:
            prompts = family.prompt({name: rows[start : start + batch_size] for name, rows in embedded.told.items()})
            if family.second_call(pipeline.config, denoiser(pipeline).config, guidance) != 1:
                without = {name: row.expand(len(batch), *row.shape[1:]) for name, row in embedded.without.items()}
                prompts |= family.prompt(without, negative=True)
        yield {
            **prompts,
            "generator": [torch.Generator().manual_seed(request.seed) for request in batch],
            "num_inference_steps": steps,
            **levels,
            **family.call(guidance, negative),
        }


def scheduler_named(name: str, current: SchedulerMixin) -> SchedulerMixin:
    """A diffusers scheduler by its class name, with the noise schedule of `current`.

    Raises:
        InputError: diffusers has no such scheduler that goes with this model.
    """
    by_betas = [LCMScheduler] if "beta_schedule" in current.config else []
    usable = {kind.__name__: kind for kind in [*current.compatibles, *by_betas]}
    if current.config.get("rescale_betas_zero_snr"):
        usable = {
            kind: usable[kind] for kind in usable if "rescale_betas_zero_snr" in signature(usable[kind]).parameters
        }
    if name not in usable:
        raise InputError(f"unknown scheduler {name!r}; give one of {', '.join(sorted(usable))}")
    try:
        return usable[name].from_config(with_scheduler(scheduler_config(current), name))
    except ImportError as error:
        raise InputError(
            f"scheduler {name} needs a library that is not installed: {' '.join(str(error).split())}"
        ) from error


def side_by_side(rows: Sequence[Sequence[Image.Image]], gap: int = 2) -> Image.Image:
    """One picture out of rows of pictures of one size."""
    width, height = rows[0][0].size
    columns = max(len(row) for row in rows)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, len(rows) * (height + gap) - gap), "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            sheet.paste(picture, (x * (width + gap), y * (height + gap)))
    return sheet
