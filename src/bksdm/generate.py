"""`bksdm generate`: prompts become PNGs, each with its own seed and with its parameters inside.

What is there already is not made again, so the same command finishes what was interrupted.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageOps, PngImagePlugin

from bksdm.data.folder import read_prompts
from bksdm.data.pictures import open_picture
from bksdm.decoder import decoder_fingerprint
from bksdm.devices import choose_device
from bksdm.errors import InputError
from bksdm.models import fingerprint
from bksdm.options import GenerateOptions
from bksdm.processes import processes
from bksdm.progress import bar
from bksdm.runs import check_free, digest, files_digest, open_run, write_text
from bksdm.runtimes import open_drawer
from bksdm.sampling import Request

_MAY_CHANGE = ("json", "batch_size", "device")
_SEEDS = 2**63 - 2**32


def generate(options: GenerateOptions) -> list[Path]:
    """Make the pictures that `options` ask for.

    Returns:
        The PNGs, in the order of the prompts.

    Raises:
        InputError: An option, the model or a file is unfit; see the message.
    """
    check(options)
    requests = _requests(options)
    image = open_picture(Path(options.image)) if options.image else None
    content = {
        "model_content": fingerprint(options.model),
        "decoder_content": decoder_fingerprint(options.decoder),
        "prompts_content": digest([request.prompt for request in requests]),
        "image_content": files_digest([Path(options.image)]) if options.image else None,
    }
    out, settings = Path(options.out), dataclasses.asdict(options) | content
    check_free(out, "generate", settings, _MAY_CHANGE)
    paths = [out / f"{number:05d}.png" for number in range(len(requests))]
    missing = [number for number, path in enumerate(paths) if not path.exists()]
    group = processes()
    group.wait()  # until all have looked at the folder as it was
    if missing:
        drawer = open_drawer(
            options.model,
            options.runtime if group.count == 1 or options.runtime != "auto" else "torch",
            choose_device(options.device),
            options.precision,
            decoder=options.decoder,
            scheduler=options.scheduler,
            unet_calls=len(missing) * options.steps * (2 if options.guidance > 1 else 1),
        )
        chosen = {"device": options.device, "runtime": drawer.runtime, "precision": drawer.precision}
        if group.main:
            open_run(out, "generate", settings, _MAY_CHANGE, chosen)
        group.wait()
        own = group.share(missing)
        height, width = options.height or drawer.height, options.width or drawer.width
        batches = drawer.sample(
            [requests[number] for number in own],
            steps=options.steps,
            guidance=options.guidance,
            batch_size=options.batch_size,
            negative_prompt=options.negative_prompt,
            height=height,
            width=width,
            image=ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC) if image else None,
            strength=options.strength,
        )
        with bar(len(requests), "pictures", len(requests) - len(missing)) as progress:
            pending = iter(own)
            for pictures in batches:
                for picture in pictures:
                    number = next(pending)
                    save_picture(picture, paths[number], _about(requests[number], options))
                progress.advance(group.count * len(pictures))
        group.wait()
    if group.main:
        lines = [_entry(path, request) for path, request in zip(paths, requests, strict=True)]
        write_text(out / "metadata.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return paths


def check(options: GenerateOptions) -> None:
    """Refuse options that no model could serve.

    Raises:
        InputError: Naming the option and its value.
    """
    for name in ("steps", "batch_size", "images_per_prompt"):
        if getattr(options, name) < 1:
            raise InputError(f"{name} is {getattr(options, name)}; give at least 1")
    if not 0 <= options.seed < _SEEDS:
        raise InputError(f"seed is {options.seed}; give 0 or more, and less than 2^63")
    if not 0 < options.strength <= 1:
        raise InputError(f"strength is {options.strength}; give more than 0 and at most 1")
    if options.image and options.steps * options.strength < 1:
        raise InputError(
            f"strength {options.strength} of {options.steps} steps leaves no step to do; give more of either"
        )
    for name in ("height", "width"):
        value = getattr(options, name)
        if value is not None and (value < 8 or value % 8):
            raise InputError(f"{name} is {value}; give a multiple of 8")
    choose_device(options.device)


def _requests(options: GenerateOptions) -> list[Request]:
    if bool(options.prompt) == bool(options.prompts):
        raise InputError("give either --prompt or --prompts")
    prompts = options.prompt or read_prompts(options.prompts or "")
    return numbered(prompts, options.images_per_prompt, options.seed)


def numbered(prompts: Sequence[str], images_per_prompt: int, seed: int) -> list[Request]:
    """Requests in the order of the prompts; number n has seed + n."""
    repeated = [prompt for prompt in prompts for _ in range(images_per_prompt)]
    return [Request(prompt, seed + number) for number, prompt in enumerate(repeated)]


def save_picture(picture: Image.Image, path: Path, about: Mapping[str, object]) -> None:
    """Write a PNG, whole or not at all, with its parameters as text chunks; those that are None are left out."""
    chunks = PngImagePlugin.PngInfo()
    for name, value in about.items():
        if value is not None:
            chunks.add_itxt(name, str(value))
    partial = path.with_suffix(".partial")
    picture.save(partial, format="PNG", pnginfo=chunks)
    partial.replace(path)


def _about(request: Request, options: GenerateOptions) -> dict[str, object]:
    shown = ["model", "steps", "guidance", "scheduler", "negative_prompt", "decoder", "precision"]
    shown += ["image", "strength"] if options.image else []
    return {"prompt": request.prompt, "seed": request.seed, **{name: getattr(options, name) for name in shown}}


def _entry(path: Path, request: Request) -> dict[str, str | int]:
    return {"file_name": path.name, "text": request.prompt, "seed": request.seed}
