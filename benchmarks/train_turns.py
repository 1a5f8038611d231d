"""How fast does retraining learn on one core: the published loop, ours at an earlier commit, and ours now?

    taskset -c 1 python benchmarks/train_turns.py --before 4cbf806
    ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 taskset -c 1 python \
benchmarks/train_turns.py --before 4cbf806

Each loop has a process of its own, with the sources of its commit and one thread; the models, pictures, order and
random numbers of all are those of `train_throughput.py`. They take turns, some steps each, and seconds are those of the
processor: waiting is no part of them, though what neighbours do to its caches is. Times are medians of the turns'
ratios. Beside them: a step's convolutions and matrix products (attention left out) over the float32 matrix products of
1,024 that the same processes computed between their turns, which no loop of this arithmetic can go below.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bksdm.common.runs import provenance, write_text

HERE = Path(__file__).parents[1]
BATCH_SIZE = 32
_PRODUCT = 1024
_PICTURES = 64  # encoded before the first step; what a step takes does not depend on them
_MARK = "answer "  # begins the lines that are for this script


@dataclass(frozen=True)
class Loop:
    """A loop by what it is called, the commit whose sources it runs (None for these), and its variant's name."""

    name: str
    commit: str | None
    variant: str


def loops(before: str, compiled_before: bool) -> list[Loop]:
    usual, compiled = "+ attention and memory layout of the device", "+ compiled teacher"
    return [
        Loop("published loop", None, "published loop"),
        Loop(f"ours at {before}", before, usual),
        *([Loop(f"ours at {before}, --compile_teacher", before, compiled)] if compiled_before else []),
        Loop("ours now, --compile_teacher", None, compiled),
    ]


class Worker:
    """The process of a loop."""

    def __init__(self, loop: Loop, size: str, tree: Path) -> None:
        environment = os.environ | {"PYTHONPATH": f"{tree / 'src'}:{tree / 'benchmarks'}", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__, "--work", size, loop.variant],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.operations = self._answer()

    def turn(self, steps: int) -> Any:
        """Seconds a step, losses of the steps, and operations a second of a matrix product."""
        assert self._process.stdin
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        return self._answer()

    def end(self) -> None:
        self._process.communicate()

    def _answer(self) -> Any:
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith(_MARK):
                return json.loads(line.removeprefix(_MARK))
        raise RuntimeError("a loop has ended before its time; its words are above")


def work(size_name: str, variant_name: str) -> None:
    """Train for as many steps as each line of the input says, and answer what that took."""
    import torch  # noqa: PLC0415
    import train_throughput  # noqa: PLC0415 - of the commit that is measured
    from torch.utils.flop_counter import FlopCounterMode  # noqa: PLC0415

    bench: Any = train_throughput
    torch.set_num_threads(1)
    bench.quiet_libraries()
    read, bench.read_captions = bench.read_captions, lambda folder: read(folder)[:_PICTURES]
    size = bench.SIZES[size_name]
    made = bench.Bench.of(size, "small", BATCH_SIZE, torch.device("cpu"))
    (variant,) = (variant for variant in bench.VARIANTS if variant.name == variant_name)
    steps = bench.prepare(made, size, variant, Path("runs/throughput"))
    with FlopCounterMode(display=False) as counted:
        steps(1)
    steps(1)
    print(_MARK + json.dumps(counted.get_total_flops()), flush=True)
    factors = torch.randn(2, _PRODUCT, _PRODUCT)
    for line in sys.stdin:
        began = time.process_time()
        losses = steps(int(line))
        ended = time.process_time()
        for _ in range(5):
            factors[0] @ factors[1]
        product = (time.process_time() - ended) / 5
        seconds = (ended - began) / int(line)
        answer = {"seconds": seconds, "losses": losses, "operations": 2 * _PRODUCT**3 / product}
        print(_MARK + json.dumps(answer), flush=True)


def measured(size: str, all_loops: list[Loop], tree: Path, turns: int, steps: int) -> dict[str, Any]:
    """What all loops take at a size; `tree` has the sources of the earlier commit."""
    workers = [Worker(loop, size, tree if loop.commit else HERE) for loop in all_loops]
    seen: list[list[Any]] = [[] for _ in workers]
    for turn in range(turns):
        for loop, worker, found in zip(all_loops, workers, seen, strict=True):
            found.append(worker.turn(steps))
            print(f"  turn {turn}: {loop.name}: {found[-1]['seconds']:.3f} s a step", flush=True)
    for worker in workers:
        worker.end()
    peak = statistics.median(answer["operations"] for found in seen for answer in found)
    return {
        "size": size,
        "peak": peak,
        "operations": workers[1].operations,
        "rows": [_row(loop, found, seen[0]) for loop, found in zip(all_loops, seen, strict=True)],
    }


def _row(loop: Loop, found: list[Any], published: list[Any]) -> dict[str, Any]:
    pairs = [(one["seconds"], other["seconds"]) for one, other in zip(published, found, strict=True)]
    seconds = [own for _, own in pairs]
    steps = [
        (own["loss"], theirs["loss"])
        for one, other in zip(published, found, strict=True)
        for theirs, own in zip(one["losses"], other["losses"], strict=True)
    ]
    return {
        "loop": loop.name,
        "seconds": statistics.median(seconds),
        "fastest": min(seconds),
        "slowest": max(seconds),
        "times": statistics.median(theirs / own for theirs, own in pairs),
        "loss_difference": max(abs(own - theirs) / theirs for own, theirs in steps),
    }


def table(found: dict[str, Any], about: str) -> str:
    lines = [
        f"{about}; recipe small, batch {BATCH_SIZE}",
        "",
        "| | CPU s a step, median (fastest to slowest) | times | loss difference |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {row['loop']} | {row['seconds']:.3f} ({row['fastest']:.3f} to {row['slowest']:.3f}) | {row['times']:.2f} "
        f"| {row['loss_difference']:.1e} |"
        for row in found["rows"]
    ]
    least = found["operations"] / found["peak"]
    return "\n".join(
        [
            *lines,
            "",
            f"Convolutions and matrix products of a step of ours: {found['operations'] / 1e9:.1f} GFLOP; at the "
            f"{found['peak'] / 1e9:.0f} GFLOP/s of a matrix product {least:.3f} s.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", default="4cbf806", help="commit")
    parser.add_argument("--compiled-before", action="store_true", help="also with its teacher compiled: takes minutes")
    parser.add_argument("--sizes", nargs="+", default=["small", "small-f4"])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="steps a turn")
    parser.add_argument("--out", type=Path, help="file for the tables")
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(*arguments.work)
        return
    from train_throughput import SIZES  # noqa: PLC0415 - imports torch, which a worker takes of its own commit

    tables = []
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(
            ["git", "archive", arguments.before, "src", "benchmarks"], cwd=HERE, capture_output=True, check=True
        )
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        for size in arguments.sizes:
            wanted = loops(arguments.before, arguments.compiled_before)
            found = measured(size, wanted, Path(folder), arguments.turns, arguments.steps)
            tables.append(table(found, SIZES[size].about))
            print(tables[-1], flush=True)
            if arguments.out:
                write_text(arguments.out, "\n\n".join([*tables, _machine()]) + "\n")


def _machine() -> str:
    made, told = provenance(), os.environ.get("ONEDNN_MAX_CPU_ISA")
    kinds = {line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")}
    flags = Path("/proc/cpuinfo").read_text().split()
    has = [flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile") if flag in flags]
    versions = ", ".join(f"{package} {version}" for package, version in made["versions"].items())
    kind = ", ".join(line.partition(": ")[2] for line in kinds)
    limit = f", held to {told}" if told else ""
    return f"One core of {kind} ({', '.join(has)}{limit}); {made['started'][:10]}; {versions}."


if __name__ == "__main__":
    main()
