"""`bksdm export`: a whole pipeline in the form of another runtime, compared with torch before it is called done.

What is written appears under its name when it is whole and near enough to torch; until then it has another name, and
goes away when something fails.
"""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from bksdm.common.errors import InputError
from bksdm.common.progress import say
from bksdm.common.runs import check_free, digest, files_digest, replace_file, replace_folder, run_files, write_text
from bksdm.data.prompts import read_prompts
from bksdm.export.components import components, multiple
from bksdm.export.formats import Format, Needs, Source, format_named
from bksdm.export.parity import Parity, check_parity
from bksdm.export.unpickle import pickled, unpickle
from bksdm.families import family_of_pipeline
from bksdm.generate.exported import EXPORT_FILE, export_facts, is_exported
from bksdm.generate.sampling import scheduler_named
from bksdm.models.configs import check_ready, family_of_model
from bksdm.models.decoder import load_model, with_own_decoder
from bksdm.models.drawing import drawing_defaults
from bksdm.models.folders import decoder_fingerprint, fingerprint
from bksdm.models.pipelines import captions, check_text_to_image, denoiser, image_size, safety_checker
from bksdm.options.export import ExportOptions
from bksdm.pruning.told import recipe_of
from bksdm.runtime.defaults import Defaults, as_files
from bksdm.runtime.spared import Spared

_MOST_DIFFERENT = 2  # of 255, in float32
_SPARE = 1.05


@dataclass(frozen=True)
class Exported:
    """What was made.

    Attributes:
        out: The folder or file.
        bytes: On the disk.
        parity: With torch; None where the format cannot run here, or that was done before.
        found: Whether an earlier run made it.
    """

    out: Path
    bytes: int
    parity: Parity | None
    found: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The object that `bksdm export --json` prints."""
        return {"out": str(self.out), "bytes": self.bytes, "parity": self.parity.to_dict() if self.parity else None}

    def text(self) -> str:
        compared = "made by an earlier run" if self.found else "not run here, so not compared with torch"
        parity = f"against torch: {self.parity.text()}" if self.parity else compared
        return f"{self.bytes / 2**20:.1f} MiB in {self.out}; {parity}"


def export(options: ExportOptions) -> Exported:
    """Write a model as `options` ask for.

    A folder that the same options made is left as it is.

    Raises:
        InputError: An option, the model, the memory or the disk is unfit; see the message.
        RuntimeError: The export does not compute what the model does.
    """
    kind = format_named(options.to)
    options = dataclasses.replace(options, pool_keys=Spared.asked(pool_keys=options.pool_keys).pool_keys)
    if not options.unpickle:
        _check_family(options, kind)
    _check(options, kind)
    if options.unpickle:
        return _unpickled(options, kind)
    out, own = Path(options.out), drawing_defaults(options.model)
    settings = dataclasses.asdict(options) | {
        "model_content": fingerprint(options.model),
        "decoder_content": decoder_fingerprint(options.decoder),
        "calibration_content": digest(read_prompts(options.calibration, "calibration"))
        if options.calibration
        else None,
        "sampling": as_files(own),
    }
    earlier = _earlier(out, kind, settings)
    if earlier:
        return earlier
    if kind.stream:
        with _appears(out, kind) as partial:
            kind.stream(options.model, options.precision or kind.precisions[0], partial)
        return Exported(out, _size(out), None)
    source = _source(options, kind, own)
    _check_source(source, kind, out)
    if safety_checker(source.pipeline) is not None and not (kind.is_model or kind.needs_decoder):
        say_unchecked(options.model, kind.name)
    with _appears(out, kind) as partial, _spared(source):
        kind.write(source, partial)
        parity = _parity(source, kind, partial)
        if not kind.suffix:
            if not kind.is_model:
                _describe(source, kind, parity, partial)
            _write_texts(run_files("export", settings) | as_files(own), partial)
    return Exported(out, _size(out), parity)


def say_unchecked(model: str, to: str) -> None:
    """A line where what is made of MODEL has no safety checker, and MODEL has one."""
    say(f"{to} holds no safety checker: that of {model} stays behind, and pictures are drawn unchecked")


def _unpickled(options: ExportOptions, kind: Format) -> Exported:
    """The model with safetensors in the place of pickles; its tensors are the same, so nothing is compared."""
    source, out = pickled(options.model), Path(options.out)
    if kind.name != ("ldm" if source.is_file() else "diffusers"):
        raise InputError(f"to is {kind.name}; --unpickle makes a folder --to diffusers, and of a .ckpt a file --to ldm")
    if options.precision not in (None, "keep"):
        raise InputError(f"precision is {options.precision}, and --unpickle changes none; export once more for that")
    content = files_digest([source] if source.is_file() else sorted(source.rglob("*.bin")))
    settings = dataclasses.asdict(options) | {"model_content": content}
    earlier = _earlier(out, kind, settings)
    if earlier:
        return earlier
    with _appears(out, kind) as partial:
        unpickle(source, partial)
        if not kind.suffix:
            _write_texts(run_files("export", settings), partial)
    return Exported(out, _size(out), None)


def _check(options: ExportOptions, kind: Format) -> None:
    precision = options.precision or kind.precisions[0]
    if precision not in kind.precisions:
        raise InputError(
            f"precision is {precision}, and {kind.name} has {', '.join(kind.precisions)}; give one of them"
        )
    for name in ("height", "width"):
        value = getattr(options, name)
        if value is not None and (value < 8 or value % 8):
            raise InputError(f"{name} is {value}; give a multiple of 8")
    if options.batch_size < 1:
        raise InputError(f"batch_size is {options.batch_size}; give at least 1")
    if is_exported(options.model):
        raise InputError(f"model {options.model} is an export already; give the model that it was made from")
    if kind.needs_decoder and not options.decoder:
        raise InputError(f"{kind.name} holds a small decoder alone; give it by --decoder")
    if options.decoder and (kind.suffix or kind.is_model) and not kind.needs_decoder:
        raise InputError(f"decoder is {options.decoder}, and {kind.name} has a whole VAE; leave --decoder out")
    if options.scheduler and not kind.has_scheduler:
        raise InputError(f"scheduler is {options.scheduler}, and {kind.name} holds none; leave --scheduler out")
    if options.pool_keys is not None and not kind.pools_keys:
        raise InputError(f"pool_keys is {options.pool_keys}, and {kind.name} has no pooled keys; leave --pool_keys out")
    kind.check_packages()


def _check_family(options: ExportOptions, kind: Format) -> None:
    """Refuse a model of a family that a format cannot hold as it is asked for, before its weights are read."""
    try:
        family = family_of_model(options.model)
    except InputError:  # which is said where it is loaded
        return
    reason = kind.why_not_family(family, options.precision)
    if reason:
        raise InputError(f"model {options.model} cannot be exported to {kind.name}: {reason}")
    check_ready("export", options.model, options={"decoder": options.decoder, "pool_keys": options.pool_keys})


def _earlier(out: Path, kind: Format, settings: Mapping[str, Any]) -> Exported | None:
    """The folder that an earlier run with the same settings made, if there is one; anything else there is refused."""
    if kind.suffix:
        if out.suffix != kind.suffix:
            raise InputError(f"out is {out}, and {kind.name} is one file; give a name that ends in {kind.suffix}")
        if out.exists():
            raise InputError(f"{out} exists already; remove it or choose another --out")
        return None
    check_free(out, "export", settings, may_change=("json",))
    return _found(out) if (out / "config.yaml").exists() else None  # folders appear whole


def _write_texts(texts: Mapping[str, str], folder: Path) -> None:
    for name, text in texts.items():
        write_text(folder / name, text)


def _source(options: ExportOptions, kind: Format, own: Defaults | None) -> Source:
    pipeline = load_model(options.model, decoder=options.decoder)
    if kind.prefers_small_decoder and options.decoder is None:
        pipeline = with_own_decoder(pipeline)
    if not kind.is_model:
        check_text_to_image(pipeline, options.model)
    if options.scheduler:
        pipeline.scheduler = scheduler_named(options.scheduler, pipeline.scheduler)
    height, width = image_size(pipeline)
    return Source(
        model=options.model,
        pipeline=pipeline,
        recipe=recipe_of(options.model),
        precision=options.precision or kind.precisions[0],
        height=options.height or height,
        width=options.width or width,
        batch_size=options.batch_size,
        attention=options.attention,
        calibration=tuple(read_prompts(options.calibration, "calibration")) if options.calibration else (),
        sampling=own,
        other_scheduler=options.scheduler is not None,
        pool_keys=options.pool_keys,
        npm=options.npm,
    )


def _check_source(source: Source, kind: Format, out: Path) -> None:
    """Refuse what cannot be held, and what would fill the memory or the disk."""
    reason = kind.why_not_family(family_of_pipeline(source.pipeline)) or kind.why_not(source)
    if reason:
        raise InputError(f"model {source.model} cannot be exported to {kind.name}: {reason}")
    step, family = multiple(source.pipeline), family_of_pipeline(source.pipeline)
    for name, value in (("height", source.height), ("width", source.width)):
        if value % step:
            raise InputError(f"{name} is {value}, and this model's {family.noun} takes multiples of {step}; give one")
    check_room(kind.needs(source), out)


def check_room(needs: Needs, out: Path) -> None:
    """Refuse what takes more memory or disk than is free.

    Raises:
        InputError: With what is needed and what there is.
    """
    free = psutil.virtual_memory().available
    if needs.memory > free:
        raise InputError(
            f"the conversion takes about {needs.memory / 2**30:.1f} GiB of memory, and {free / 2**30:.1f} GiB are free"
            f"; close other programs or use a larger machine"
        )
    there = next(parent for parent in out.resolve().parents if parent.exists())
    room = shutil.disk_usage(there).free
    if needs.disk * _SPARE > room:
        raise InputError(
            f"the export takes about {needs.disk / 2**30:.1f} GiB on the disk, and {there} has {room / 2**30:.1f} GiB; "
            f"make room or choose another --out"
        )


@contextlib.contextmanager
def _appears(out: Path, kind: Format) -> Iterator[Path]:
    """Where to write; it takes the name `out` when the block ends without an error."""
    try:
        if not kind.suffix:
            with replace_folder(out) as partial:
                yield partial
            return
        out.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(out, kind.suffix) as partial:
            yield partial
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror or error}; choose another --out") from error


def _parity(source: Source, kind: Format, written: Path) -> Parity | None:
    """Compare what was written with torch.

    Raises:
        RuntimeError: They differ by more than the format's precision explains.
    """
    if kind.check is not None:
        say("comparing the export with torch")
        parity = kind.check(written, source)
    elif kind.networks is not None:
        say("comparing the export with torch")
        parity = check_parity(source.pipeline, kind.networks(written, source), source.height, source.width)
    else:
        return None
    least = kind.least_psnr.get(source.precision, 0.0)
    if (source.precision in ("fp32", "keep") and parity.largest > _MOST_DIFFERENT) or parity.psnr < least:
        raise RuntimeError(f"the export differs from torch ({parity.text()}); nothing was written")
    return parity


def _spared(source: Source) -> contextlib.AbstractContextManager[object]:
    """The pipeline computes as what is exported of it."""
    pipeline = source.pipeline
    family = family_of_pipeline(pipeline)
    return family.sparing(denoiser(pipeline), pipeline.scheduler, Spared(pool_keys=source.pool_keys))


def _describe(source: Source, kind: Format, parity: Parity | None, folder: Path) -> None:
    """Write `export.json`, by which runners know the folder."""
    fixed = kind.fixed_size
    values = {
        "format": kind.name,
        "precision": source.precision,
        "model": source.model,
        "recipe": source.recipe.name if source.recipe else None,
        "height": source.height if fixed else None,
        "width": source.width if fixed else None,
        "batch_size": source.batch_size if fixed else None,
        "pool_keys": source.pool_keys,
        "parameters": {
            name: component.parameters
            for name, component in components(source.pipeline, source.height, source.width).items()
        },
        "parity": parity.to_dict() if parity else None,
        "captions": captions(source.pipeline),
    }
    write_text(folder / EXPORT_FILE, json.dumps(values, indent=2) + "\n")


def _found(folder: Path) -> Exported:
    """What an earlier run made."""
    kept = export_facts(folder).get("parity") if is_exported(folder) else None
    return Exported(folder, _size(folder), Parity.from_dict(kept) if isinstance(kept, dict) else None, found=True)


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
