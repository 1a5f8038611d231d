"""`python -m bksdm.runtime FOLDER --prompt TEXT --out FILE.png`: one picture from an exported folder."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bksdm.common.errors import InputError
from bksdm.runtime.folder import open_folder
from bksdm.runtime.parameters import texts
from bksdm.runtime.pipeline import Pipeline, Pixels
from bksdm.runtime.png import encode
from bksdm.runtime.spared import Spared

_USAGE = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the picture that the command line asks for; the exit status is 2 where it cannot be made."""
    options = _parser().parse_args(arguments)
    try:
        _make(options)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return _USAGE
    return 0


def _make(options: argparse.Namespace) -> None:
    out = Path(options.out)
    if out.suffix.lower() != ".png":
        raise InputError(f"out is {out}; give a name that ends in .png")
    pipeline = open_folder(
        options.folder,
        threads=options.threads,
        low_memory=options.low_memory,
        precision=options.precision,
        cache=options.cache,
        scheduler=options.scheduler,
    )
    image = _read(Path(options.image), options, pipeline) if options.image else None
    for prompt in (options.prompt, options.negative_prompt):
        if lost := pipeline.tokenizer.cut_off(prompt):
            print(f"the model reads no more than the beginning of the prompt; cut off: {lost!r}", file=sys.stderr)
    spared = Spared.asked(options.guidance_interval, options.reuse)
    how = pipeline.defaults.chosen(options.steps, options.guidance, spared)
    if options.negative_prompt and pipeline.guidance(how.guidance) is None:
        print(f"the negative prompt changes nothing at guidance {how.guidance:g}", file=sys.stderr)
    (pictures,) = pipeline.sample(
        [options.prompt],
        [options.seed],
        steps=options.steps,
        guidance=options.guidance,
        interval=options.guidance_interval,
        reuse=options.reuse,
        negative_prompt=options.negative_prompt,
        height=options.height,
        width=options.width,
        image=image,
        strength=options.strength,
        on_step=_show if sys.stderr.isatty() else None,
    )
    names = ["prompt", "seed", "negative_prompt", *(["image", "strength"] if options.image else [])]
    about = {name: getattr(options, name) for name in names} | how.to_dict() | {"model": options.folder}
    about |= {} if pipeline.guidance(how.guidance) is not None else {"negative_prompt": None}
    about["guidance_interval"] = about.pop("interval", None)
    height, width, _ = pictures[0].shape
    _write(out, encode(pictures[0], texts(about, pipeline.scheduler, (width, height))))
    print(out)


def _read(file: Path, options: argparse.Namespace, pipeline: Pipeline) -> Pixels:
    """A picture file, cut and resized to the size that is asked for."""
    try:
        from PIL import Image, ImageOps  # noqa: PLC0415

        from bksdm.runtime.rgb import as_rgb  # noqa: PLC0415
    except ImportError as error:
        raise InputError("--image needs Pillow; pip install pillow") from error
    size = options.width or pipeline.width, options.height or pipeline.height
    try:
        with Image.open(file) as opened:
            picture = as_rgb(ImageOps.exif_transpose(opened))
    except (OSError, InputError) as error:
        raise InputError(f"image {file} cannot be read ({error}); give a picture file") from error
    if min(size) < 1:
        raise InputError(f"the size is {size[0]}x{size[1]}; give multiples of {pipeline.multiple}")
    return np.array(ImageOps.fit(picture, size, Image.Resampling.BICUBIC))


def _write(out: Path, content: bytes) -> None:
    partial = out.with_name(f".{out.name}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        partial.replace(out)
    except OSError as error:
        raise InputError(f"cannot write {out} ({error.strerror}); choose another --out") from error
    finally:
        partial.unlink(missing_ok=True)


def _show(done: int, steps: int) -> None:
    print(f"\rstep {done} of {steps}", end="\n" if done == steps else "", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bksdm.runtime", description="One picture from an exported folder.")
    add = parser.add_argument
    add("folder", help="what bksdm export wrote, for ONNX or OpenVINO")
    add("--prompt", required=True, help="what it shows")
    add("--out", default="picture.png", help="the PNG to write (default: %(default)s)")
    add("--seed", type=int, default=0, help="of its random numbers (default: %(default)s)")
    add("--steps", type=int, help="denoising steps (default: the model's own)")
    add("--guidance", type=float, help="guidance scale, 1 or less for none (default: the model's own)")
    add("--guidance_interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="noise levels with guidance")
    add("--reuse", type=int, help="every how many steps the inside of the U-Net is computed (default: every one)")
    add("--scheduler", help="such as DDIMScheduler (default: the model's own)")
    add("--negative_prompt", default="", help="what to keep away from")
    add("--height", type=int, help="in pixels (default: the model's own)")
    add("--width", type=int, help="in pixels (default: the model's own)")
    add("--image", help="a picture to start from")
    add("--strength", type=float, default=0.8, help="share done anew with --image (default: %(default)s)")
    add("--threads", type=int, help="of the CPU (default: all)")
    add("--low_memory", action="store_true", help="hold one network at a time")
    add("--precision", default="f32", help="of OpenVINO's arithmetic: f32, f16 or bf16 (default: %(default)s)")
    add("--cache", help="a folder where OpenVINO keeps what it compiled")
    return parser


if __name__ == "__main__":
    sys.exit(main())
