"""Run folders: `config.yaml`, `provenance.json`, `metrics.jsonl` and the artefact beside them.

Whatever is written here is written whole or not at all.
"""

import contextlib
import hashlib
import json
import os
import platform
import shutil
import stat
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from bksdm.common.errors import InputError

_SHOWN = 80
_RUNS, _OTHERS = 0o111, 0o077  # a script stays one
_PACKAGES = ("bksdm", "torch", "diffusers", "transformers", "safetensors", "numpy")


def write_text(path: Path, text: str) -> None:
    """Write `text` so that a reader sees the old file or the new one, never a half."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """The same for bytes."""
    with replace_file(path) as partial:
        partial.write_bytes(content)


@contextlib.contextmanager
def replace_file(target: Path, suffix: str = "") -> Iterator[Path]:
    """A file to write that takes the name `target` when the block ends without an error, and else goes.

    Arguments:
        target: The file.
        suffix: What the name ends in meanwhile, for writers that go by it.
    """
    partial = target.with_name(f".{target.name}.partial{suffix}")
    try:
        yield partial
        if not stat.S_IMODE(partial.stat().st_mode) & _OTHERS:
            partial.chmod(_usual_mode(partial.parent))
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSON-lines file, if there is one; a last line that was cut off by a kill is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


@contextlib.contextmanager
def replace_folder(target: Path) -> Iterator[Path]:
    """A folder to write into that takes the name `target` when the block ends without an error, and else goes."""
    target = target.resolve()  # a link stays a link, to a folder that is replaced
    target.parent.mkdir(parents=True, exist_ok=True)
    partial, earlier = (target.with_name(f".{target.name}.{kind}") for kind in ("partial", "earlier"))
    if earlier.exists() and not target.exists():  # a kill came between the two renames below
        earlier.replace(target)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        mode = _usual_mode(partial)
        for file in partial.rglob("*"):
            if file.is_file():
                file.chmod(mode | stat.S_IMODE(file.stat().st_mode) & _RUNS)
                _reach_the_disk(file)  # before the name: a loss of power keeps the order
        shutil.rmtree(earlier, ignore_errors=True)
        if target.exists():
            target.replace(earlier)
        partial.replace(target)
    finally:
        if earlier.exists() and not target.exists():
            earlier.replace(target)
        for left in (partial, earlier):
            shutil.rmtree(left, ignore_errors=True)


def _usual_mode(folder: Path) -> int:
    """The mode that a new file in `folder` gets; safetensors writes files that only their owner can read."""
    probe = folder / f".mode-{os.getpid()}"
    with probe.open("w") as opened:
        mode = stat.S_IMODE(os.fstat(opened.fileno()).st_mode)
    probe.unlink(missing_ok=True)
    return mode


def _reach_the_disk(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())


def cache_folder() -> Path:
    """Where what took a while is kept for the next time: converted models, and packages of others."""
    return Path(os.environ.get("BKSDM_CACHE") or Path.home() / ".cache" / "bksdm")


def run_files(verb: str, options: Mapping[str, Any], chosen: Mapping[str, Any] | None = None) -> dict[str, str]:
    """`config.yaml` and `provenance.json` of a run of `verb`, as texts.

    Arguments:
        verb: The verb.
        options: Its options, and digests of what they name.
        chosen: What was chosen where an option says auto, such as device and precision.
    """
    return {
        "config.yaml": yaml.safe_dump(_resolved(verb, options), sort_keys=False),
        "provenance.json": json.dumps({**provenance(), **_plain(chosen or {})}, indent=2) + "\n",
    }


def check_free(folder: Path, verb: str, options: Mapping[str, Any], may_change: tuple[str, ...] = ()) -> None:
    """Refuse a folder that holds anything but a run of `verb` with the same options.

    Arguments:
        folder: Where the run is to write; it need not exist.
        verb: The verb.
        options: Its resolved options.
        may_change: Options that may differ from those of the run that is there.

    Raises:
        InputError: The folder holds something else.
    """
    try:
        _check_free(folder, verb, options, may_change)
    except OSError as error:
        raise InputError(f"cannot read {folder}: {error.strerror}; choose another --out") from error


def _check_free(folder: Path, verb: str, options: Mapping[str, Any], may_change: tuple[str, ...]) -> None:
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; choose another --out")
    config = folder / "config.yaml"
    if not config.exists():
        if folder.exists() and any(folder.iterdir()):
            raise InputError(f"{folder} is not empty and holds no run of bksdm; choose another --out")
        return
    try:
        earlier = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        earlier = None
    if not isinstance(earlier, dict):
        raise InputError(f"{config} is not the config of a run; choose another --out")
    for key, value in _resolved(verb, options).items():
        if key not in may_change and earlier.get(key) != value:
            raise InputError(
                f"{folder} holds another run ({_difference(key, earlier.get(key), value)}); "
                f"choose another --out or remove that folder"
            )


def _difference(key: str, there: Any, now: Any) -> str:
    """In words; digests say nothing to a reader, and what they are of does."""
    named = key.removesuffix("_content")
    if named != key:
        return f"the content of {named} {'was not noted' if there is None else 'has changed since'}"
    return f"{key}: {_short(there)} there, {_short(now)} now"


def open_run(
    folder: Path,
    verb: str,
    options: Mapping[str, Any],
    may_change: tuple[str, ...] = (),
    chosen: Mapping[str, Any] | None = None,
) -> Path:
    """Make the folder of a run, or take the one that the same options made before, to go on in it.

    Arguments are those of `check_free` and `run_files`.

    Raises:
        InputError: The folder holds something else, or cannot be written.
    """
    try:
        check_free(folder, verb, options, may_change)
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in run_files(verb, options, chosen).items():
            if name != "provenance.json" or not (folder / name).exists():  # a resumed run keeps its first
                write_text(folder / name, text)
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}; choose another --out") from error
    return folder


def digest(value: Any) -> str:
    """A short name for plain values, the same for the same values."""
    return hashlib.sha256(json.dumps(_plain(value)).encode()).hexdigest()[:16]


def files_digest(files: Sequence[Path]) -> str:
    """A short name for what files hold, in their order; several are read at once."""
    whole = hashlib.sha256()
    with ThreadPoolExecutor() as threads:
        for found in threads.map(_file_digest, files):
            whole.update(found)
    return whole.hexdigest()[:16]


def _file_digest(file: Path) -> bytes:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").digest()


def provenance() -> dict[str, Any]:
    """What made a run: versions, machine, command and time."""
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "command": sys.argv,
        "versions": versions,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "processors": os.cpu_count(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _processor() -> str:
    """The model of the CPU, as far as the system tells."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def _resolved(verb: str, options: Mapping[str, Any]) -> dict[str, Any]:
    return {"verb": verb, **{key: _plain(value) for key, value in options.items()}}


def _short(value: Any) -> str:
    text = "not given" if value is None else repr(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return value
