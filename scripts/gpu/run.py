"""What there is to know of a GPU in one command and a few minutes, the most valuable first.

    python scripts/gpu/run.py fetch                      # with a network: the wheels that such a machine lacks, in .whl
    python scripts/gpu/run.py measure --out runs/gpu     # on the machine with the GPU, which needs no network

`measure` wants torch, transformers, accelerate, huggingface_hub and numpy with what they need, and takes all else from
.whl, for itself alone: what is installed stays as it is. Each result is a line of JSON on stdout as soon as it is
there, and goes into OUT/gpu.json and OUT/gpu.md, which are whole at any moment. What fails is a line, too, and ends
nothing. A part may use its share of the budget and what those before it left; what finds nothing left is skipped.

What is measured, in which order, is in `cases.py`. Here nothing but the standard library is imported before the wheels
are there; the cases run in a process of their own, which is replaced if it dies or takes too long.
"""

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("src", "benchmarks", "examples/emoji", "tests", "scripts/gpu")
# What the packages that are taken for granted do not bring; versions are those of constraints.txt. Without pyarrow and
# pandas, which are 64 MiB, all but prepared data and parquet tables works.
WHEELS = (
    "absl-py",
    "charset-normalizer",
    "contourpy",
    "cycler",
    "datasets",
    "diffusers",
    "dill",
    "docstring_parser",
    "fonttools",
    "importlib_metadata",
    "jsonargparse",
    "kiwisolver",
    "Markdown",
    "matplotlib",
    "multiprocess",
    "peft",
    "pillow",
    "protobuf",
    "pyparsing",
    "python-dateutil",
    "requests",
    "tensorboard",
    "urllib3",
    "Werkzeug",
    "xxhash",
    "zipp",
)
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014", "manylinux1")
LARGEST = 50 * 2**20  # bytes of all wheels
LEAST = 3.0  # seconds that are worth a start
STARTING = 120.0  # seconds at most until the cases are imported

Row = dict[str, Any]


def fetch(folder: Path, python: str) -> None:
    """Download the wheels for a Python on 64-bit x86 Linux."""
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    kinds = [word for platform in PLATFORMS for word in ("--platform", f"{platform}_x86_64")]
    only = ["--no-deps", "--only-binary=:all:", "--implementation", "cp", "--python-version", python, *kinds]
    wanted = [f"{name}=={pins[name]}" for name in WHEELS]
    subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", *only, "-d", folder, *wanted], check=True)
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{folder}: {len(list(folder.iterdir()))} wheels, {size / 2**20:.1f} MiB")
    if size > LARGEST:
        raise SystemExit(f"more than {LARGEST / 2**20:.0f} MiB; remove what is in {folder} and fetch again")


def install(wheels: list[Path], site: Path) -> None:
    """Unpack wheels into a folder that is in nobody's way."""
    offline = ["--no-index", "--no-deps", "--no-compile", "--no-cache-dir"]
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *offline, "--target", site, *wheels], check=True)


@dataclass(frozen=True)
class Setting:
    """Where the cases run.

    Attributes:
        device: cpu or cuda.
        toy: Sizes that a CPU can do, to rehearse all of it.
        work: A folder for what comes and goes.
        out: The folder of the results.
        until: When the case under way is cut off, on the clock of `time.monotonic`.
    """

    device: str
    toy: bool
    work: Path
    out: Path
    until: float = math.inf


@dataclass
class Worker:
    """A process that runs cases, one after the other, and another one when it is gone."""

    setting: Setting
    about: Row = field(default_factory=dict)
    parts: list[tuple[str, float, list[str]]] = field(default_factory=list)

    def __enter__(self) -> "Worker":
        if not self._start(STARTING):
            raise SystemExit("nothing can be measured; the reason stands above")
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.is_alive():
            os.killpg(self._process.pid or 0, signal.SIGKILL)
        self._process.join()

    def run(self, part: str, case: str, seconds: float) -> Row:
        """The result of a case, which may take so long."""
        until = time.monotonic() + seconds
        with contextlib.suppress(EOFError, OSError):
            if self._process.is_alive() or self._start(seconds):
                self._pipe.send((part, case, until))
                if self._pipe.poll(max(0.0, until - time.monotonic())):
                    found: Row = self._pipe.recv()
                    return found
        late = time.monotonic() >= until
        self.__exit__()
        return {"failed": f"cut off after {seconds:.0f} s" if late else f"ended with {self._process.exitcode}"}

    def _start(self, seconds: float) -> bool:
        """Whether a new process is ready in time."""
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, self.setting))
        self._process.start()
        theirs.close()
        with contextlib.suppress(EOFError):
            if self._pipe.poll(seconds):
                self.about, self.parts = self._pipe.recv()
                return True
        self.__exit__()
        return False


def serve(pipe: Connection, setting: Setting) -> None:
    """Tell what there is, then run cases as they are asked for until nobody asks."""
    os.setsid()  # so that what a case starts ends with it
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # stdout is for results
    from cases import PARTS, describe, result  # noqa: PLC0415 - imports what the wheels bring

    shown = [(name, part.share, list(part.cases)) for name, part in PARTS.items()]
    pipe.send((describe(setting), shown))
    while True:
        try:
            part, case, until = pipe.recv()
        except EOFError:
            return
        pipe.send(result(PARTS[part].cases[case], replace(setting, until=until)))


def results(worker: Worker, began: float, budget: float, chosen: Collection[str] = ()) -> Iterator[Row]:
    """A row a case, as they come, of the chosen parts or of all."""
    unknown = set(chosen) - {part for part, *_ in worker.parts}
    if unknown:
        raise SystemExit(f"there is no part {', '.join(unknown)}; give {', '.join(part for part, *_ in worker.parts)}")
    parts = [part for part in worker.parts if not chosen or part[0] in chosen]
    whole, until = sum(share for _, share, _ in parts), began
    for part, share, cases in parts:
        until += share / whole * budget
        for case in cases:
            start = time.monotonic()
            spent = until - start < LEAST
            found = {"skipped": "the budget is spent"} if spent else worker.run(part, case, until - start)
            yield {"part": part, "case": case, "seconds": round(time.monotonic() - start, 1), **found}


def measure(given: argparse.Namespace) -> int:
    began, wheels = time.monotonic(), sorted(given.wheels.glob("*.whl"))
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bksdm-")))
        if wheels:
            install(wheels, work / "site")
        paths = [*(str(ROOT / source) for source in SOURCES), str(work / "site")]
        sys.path[:0] = paths
        os.environ |= {"PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]), "HF_HUB_OFFLINE": "1"}
        given.out.mkdir(parents=True, exist_ok=True)
        worker = stack.enter_context(Worker(Setting(given.device, given.toy, work, given.out.resolve())))
        about = worker.about | {"budget": given.budget, "parts": given.parts, "toy": given.toy, "wheels": len(wheels)}
        print(json.dumps(about), flush=True)
        rows: list[Row] = []
        for row in results(worker, began, given.budget, given.parts):
            print(json.dumps(row), flush=True)
            rows.append(row)
            write(given.out, about | {"seconds": round(time.monotonic() - began, 1)}, rows)
    return int(any("failed" in row for row in rows))


def write(out: Path, about: Row, rows: list[Row]) -> None:
    from bksdm.common.runs import write_text  # noqa: PLC0415 - its place is known by now

    write_text(out / "gpu.json", json.dumps({**about, "results": rows}, indent=2) + "\n")
    write_text(out / "gpu.md", table(about, rows))


def table(about: Row, rows: list[Row]) -> str:
    """The results for people."""
    words = ["measure", "--device", about["device"], *(["--toy"] if about["toy"] else [])]
    words += ["--budget", f"{about['budget']:g}", *(["--parts", *about["parts"]] if about["parts"] else [])]
    lines = [f"`python scripts/gpu/run.py {' '.join(words)}`", "", "| part | case | s | result |"]
    lines += ["|---|---|---|---|"]
    for row in rows:
        values = [f"{name}: {_short(row[name])}" for name in row if name not in ("part", "case", "seconds")]
        lines.append(f"| {row['part']} | {row['case']} | {row['seconds']} | {', '.join(values).replace('|', '/')} |")
    versions = ", ".join(f"{package} {version}" for package, version in about["versions"].items())
    machine = f"{about['card']}; {about['processors']} cores of {about['processor']}; Python {about['python']}"
    took = f"{about['seconds']} s in all, {about['wheels']} packages taken along"
    return "\n".join([*lines, "", f"{took}. {machine}; {about['started'][:10]}; {versions}.", ""])


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    fetching, measuring = verbs.add_parser("fetch"), verbs.add_parser("measure")
    for verb in (fetching, measuring):
        verb.add_argument("--wheels", type=Path, default=ROOT / ".whl")
    fetching.add_argument("--python", default="3.12", help="version on the machine with the GPU")
    measuring.add_argument("--out", type=Path, required=True)
    measuring.add_argument("--budget", type=float, default=480, help="seconds in all")
    measuring.add_argument("--parts", nargs="+", default=[], help="these alone; all by default")
    measuring.add_argument("--device", default="cuda")
    measuring.add_argument("--toy", action="store_true", help="small sizes, to rehearse on a CPU")
    given = parser.parse_args()
    if given.verb == "fetch":
        fetch(given.wheels, given.python)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    return measure(given)


if __name__ == "__main__":
    sys.exit(main())
