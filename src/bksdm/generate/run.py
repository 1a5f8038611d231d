"""`bksdm generate`: prompts become PNGs, each with its own seed and with its parameters inside.

What is there already is not made again, so the same command finishes what was interrupted.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, PngImagePlugin

from bksdm.common.devices import choose_device
from bksdm.common.errors import InputError
from bksdm.common.processes import processes
from bksdm.common.progress import Bar, bar, say
from bksdm.common.prompts import say_cut
from bksdm.common.runs import check_free, digest, files_digest, open_run, replace_file, write_text
from bksdm.common.tables import listed
from bksdm.data.pictures import open_picture, was_flagged
from bksdm.data.prompts import read_prompts
from bksdm.generate.requests import Request, check, numbered
from bksdm.generate.runtimes import Drawer, open_drawer
from bksdm.generate.sampling import is_flagged, side_by_side
from bksdm.models.adapters.lora import Lora
from bksdm.models.adapters.lora_files import lora_fingerprint
from bksdm.models.configs import check_ready, family_of_model, load_denoiser_config
from bksdm.models.drawing import FAST_SCHEDULER, FAST_STEPS, drawing
from bksdm.models.folders import decoder_fingerprint, fingerprint
from bksdm.models.pipelines import check_multiple
from bksdm.options.generate import GenerateOptions
from bksdm.runtime.defaults import Defaults
from bksdm.runtime.parameters import texts

_MAY_CHANGE = ("json", "batch_size", "device", "fast")  # what fast stands for is there too
_FAST_REUSE = 3


def generate(options: GenerateOptions) -> list[Path]:
    """Make the pictures that `options` ask for.

    Returns:
        The PNGs, in the order of the prompts.

    Raises:
        InputError: An option, the model or a file is unfit; see the message.
    """
    check_ready("generate", options.model, options=dataclasses.asdict(options))
    own = drawing(options.model)
    options = _fast(options, own) if options.fast else options
    how = own.chosen(options.steps, options.guidance, options.spared())
    options = dataclasses.replace(
        options, steps=how.steps, guidance=how.guidance, reuse=how.spared.reuse, pool_keys=how.spared.pool_keys
    )
    check(options)
    asked = _asked(options)
    image, mask = _image_and_mask(options)
    content = {
        "model_content": fingerprint(options.model),
        "decoder_content": decoder_fingerprint(options.decoder),
        "lora_content": lora_fingerprint(options.lora),
        "prompts_content": digest([one.request.prompt for one in asked]),
        "image_content": files_digest([Path(options.image)]) if options.image else None,
        "mask_content": files_digest([Path(options.mask)]) if options.mask else None,
        **({} if how.sigmas is None else {"sigmas": list(how.sigmas)}),
    }
    out, settings = Path(options.out), dataclasses.asdict(options) | content
    check_free(out, "generate", settings, _MAY_CHANGE)
    paths = [out / f"{number:05d}.png" for number in range(len(asked))]
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
            lora=Lora(options.lora, options.lora_scale) if options.lora else None,
            masked=mask is not None,
            spared=how.spared,
            # Of the whole U-Net; what reuse spares, a conversion cannot save.
            unet_calls=len(missing) * -(-how.steps // (how.spared.reuse or 1)) * (2 if how.guidance > 1 else 1),
        )
        check_multiple(drawer.multiple, height=options.height, width=options.width)
        say_cut([options.negative_prompt, *(asked[number].request.prompt for number in missing)], drawer.cut_off)
        if options.guidance_interval and not family_of_model(options.model).guides(
            {}, load_denoiser_config(options.model)
        ):
            say("guidance_interval changes nothing: the model is told of guidance, in one call")
        elif options.guidance_interval and how.guidance <= 1:
            say(f"guidance_interval changes nothing at guidance {how.guidance:g}; give --guidance of more than 1")
        if options.negative_prompt and how.guidance <= (least := family_of_model(options.model).unguided):
            mend = f"give --guidance of more than {least:g}"
            say(f"the negative prompt changes nothing at guidance {how.guidance:g}; {mend}")
        chosen = {"device": options.device, "runtime": drawer.runtime, "precision": drawer.precision}
        if group.main:
            open_run(out, "generate", settings, _MAY_CHANGE, chosen)
        group.wait()
        with bar(len(asked), "pictures", len(asked) - len(missing)) as progress:
            _draw(options, how, drawer, asked, paths, group.share(missing), image, mask, progress, group.count)
        group.wait()
    if group.main:
        flagged = {path for path in paths if was_flagged(path)}
        lines = [_entry(path, one, path in flagged) for path, one in zip(paths, asked, strict=True)]
        write_text(out / "metadata.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        if options.strengths:
            _write_grid(paths, len(options.strengths), out / "grid.png")
        if flagged:
            names = listed([path.name for path in paths if path in flagged])
            say(f"the model's safety checker has made {len(flagged)} of {len(paths)} pictures black: {names}")
    return paths


def _fast(options: GenerateOptions, own: Defaults) -> GenerateOptions:
    """With what benchmarks/results/quality_speed.md recommends where nothing else is asked for."""
    if own.steps <= FAST_STEPS:
        raise InputError(f"fast is for models of many steps, and {options.model} draws in {own.steps}; leave it out")
    return dataclasses.replace(
        options,
        steps=FAST_STEPS if options.steps is None else options.steps,
        scheduler=options.scheduler or FAST_SCHEDULER,
        reuse=_FAST_REUSE if options.reuse is None else options.reuse,
    )


@dataclass(frozen=True)
class _Asked:
    """A picture, and the strength that it is made with where there are several."""

    request: Request
    strength: float | None


def _asked(options: GenerateOptions) -> list[_Asked]:
    """The pictures of each request follow each other, one a strength."""
    strengths: Sequence[float | None] = options.strengths or [None]
    return [_Asked(request, strength) for request in _requests(options) for strength in strengths]


def _draw(
    options: GenerateOptions,
    how: Defaults,
    drawer: Drawer,
    asked: Sequence[_Asked],
    paths: Sequence[Path],
    numbers: Sequence[int],
    image: Image.Image | None,
    mask: Image.Image | None,
    progress: Bar,
    together: int,
) -> None:
    """Make the pictures with these numbers, those of one strength together."""
    height, width = options.height or drawer.height, options.width or drawer.width
    begin: dict[str, Any] = {"image": None}
    about = _shared(options, how)
    if image:
        begin = {"image": ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)}
    if mask:
        begin |= {"mask": ImageOps.fit(mask, (width, height), Image.Resampling.NEAREST)}
    for strength in dict.fromkeys(asked[number].strength for number in numbers):
        own = [number for number in numbers if asked[number].strength == strength]
        pending = iter(own)
        for pictures in drawer.sample(
            [asked[number].request for number in own],
            **vars(how),
            batch_size=options.batch_size,
            negative_prompt=options.negative_prompt,
            height=height,
            width=width,
            strength=options.strength if strength is None else strength,
            **begin,
        ):
            for picture in pictures:
                number = next(pending)
                save_picture(picture, paths[number], about | _own(asked[number]), drawer.scheduler)
            progress.advance(together * len(pictures))


def _write_grid(paths: Sequence[Path], columns: int, file: Path) -> None:
    """A row for every `columns` of the pictures."""
    rows = [[open_picture(path) for path in paths[start : start + columns]] for start in range(0, len(paths), columns)]
    write_png(side_by_side(rows), file, {})


def _image_and_mask(options: GenerateOptions) -> tuple[Image.Image | None, Image.Image | None]:
    image = open_picture(Path(options.image)) if options.image else None
    if options.mask is None:
        return image, None
    mask = open_picture(Path(options.mask)).convert("L")
    if image is None:
        raise InputError(f"mask is {options.mask}, and there is no picture under it; give --image too")
    if mask.size != image.size:
        sizes = [f"{width}x{height}" for width, height in (mask.size, image.size)]
        raise InputError(
            f"mask {options.mask} is {sizes[0]} and image {options.image} is {sizes[1]}; give them one size"
        )
    if not any(mask.histogram()[128:]):
        raise InputError(
            f"mask {options.mask} is black, so that nothing would change; make white what is to be painted"
        )
    return image, mask


def _requests(options: GenerateOptions) -> list[Request]:
    if bool(options.prompt) == bool(options.prompts):
        raise InputError("give either --prompt or --prompts")
    prompts = options.prompt or read_prompts(options.prompts or "")
    return numbered(prompts, options.images_per_prompt, options.seed)


def save_picture(picture: Image.Image, path: Path, about: Mapping[str, Any], scheduler: Mapping[str, Any]) -> None:
    """Write a PNG, whole or not at all, with how it was made as texts; see `bksdm.runtime.parameters.texts`."""
    flagged = {"flagged": True} if is_flagged(picture) else {}
    write_png(picture, path, texts({**about, **flagged}, scheduler, picture.size))


def write_png(picture: Image.Image, path: Path, about: Mapping[str, str]) -> None:
    """Write a PNG, whole or not at all, with texts by their keywords."""
    chunks = PngImagePlugin.PngInfo()
    for keyword, text in about.items():
        chunks.add_text(keyword, text)
    with replace_file(path) as partial:
        picture.save(partial, format="PNG", pnginfo=chunks)


def _shared(options: GenerateOptions, how: Defaults) -> dict[str, Any]:
    """What all pictures say of themselves; a negative prompt, where there is guidance."""
    shown = ["model", "steps", "guidance", "decoder", "precision", "lora"]
    shown += ["negative_prompt"] if how.guidance > family_of_model(options.model).unguided else []
    shown += [name for name in ("guidance_interval", "reuse", "pool_keys") if getattr(options, name) is not None]
    shown += ["image", "strength", "mask"] if options.image else []
    return {name: getattr(options, name) for name in shown}


def _own(one: _Asked) -> dict[str, Any]:
    """And what each does."""
    own = {"prompt": one.request.prompt, "seed": one.request.seed}
    return own if one.strength is None else own | {"strength": one.strength}


def _entry(path: Path, one: _Asked, flagged: bool) -> dict[str, Any]:
    entry: dict[str, Any] = {"file_name": path.name, "text": one.request.prompt, "seed": one.request.seed}
    entry |= {} if one.strength is None else {"strength": one.strength}
    return entry | {"flagged": True} if flagged else entry
