"""Does an evaluation of 30,000 pictures survive kills, to the last digit, and in how much memory and time?

    python benchmarks/protocol_30k.py --runs runs/protocol-30k

Evaluates the embedded model on 30,000 prompts once without a break and, at the same time, once killed twice by
SIGKILL at random moments and resumed by the same command, compares the scores, and writes time and peak
memory with machine and date. The pictures take few denoising steps: how good they are does not matter here.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bksdm.common.runs import provenance, write_text
from bksdm.data.prompts import read_prompts

SCORES = ("frechet_distance", "kernel_distance", "precision", "recall", "clip_score", "retrieval_r1")


def evaluation(prompts: Path, out: Path, steps: int) -> list[str]:
    words = ["evaluate", "emoji", "--prompts", prompts, "--reference", "emoji", "--out", out, "--steps", steps]
    words += ["--guidance", 1, "--batch_size", 64, "--keep_pictures", "false", "--latency", 0, "--resamples", 50]
    return [sys.executable, "-m", "bksdm", *map(str, words), "--scores", *SCORES, "--json"]


def run(command: list[str], kill_after: float | None = None) -> tuple[float, int, bool]:
    """Seconds, peak memory in bytes, and whether it came to its end."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    timer = threading.Timer(kill_after, process.send_signal, [signal.SIGKILL]) if kill_after else None
    if timer:
        timer.start()
    _, status, usage = os.wait4(process.pid, 0)
    if timer:
        timer.cancel()
    return time.perf_counter() - began, usage.ru_maxrss * 1024, os.waitstatus_to_exitcode(status) == 0


def scores(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "scores.json").read_text())["models"]["emoji"]["scores"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/protocol-30k"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "protocol_30k.md")
    parser.add_argument("--prompts", type=int, default=30_000)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--kill_after", type=float, nargs=2, default=(60.0, 300.0), help="seconds, from and to")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    known = read_prompts("emoji/train")
    arguments.runs.mkdir(parents=True, exist_ok=True)
    prompts = arguments.runs / "prompts.txt"
    write_text(prompts, "".join(f"{known[number % len(known)]}\n" for number in range(arguments.prompts)))

    whole, broken = arguments.runs / "whole", arguments.runs / "killed"
    with ThreadPoolExecutor() as both:
        unbroken = both.submit(run, evaluation(prompts, whole, arguments.steps))
        draw, kills = random.Random(arguments.seed), []
        for _ in range(2):
            spent, _, ended = run(evaluation(prompts, broken, arguments.steps), draw.uniform(*arguments.kill_after))
            assert not ended, "the evaluation was at its end before it was killed"
            blocks = len(list((broken / "models").rglob("*.safetensors")))
            kills.append(f"killed after {spent:.0f} s, {blocks} blocks whole")
        resumed, again, ended = run(evaluation(prompts, broken, arguments.steps))
        seconds, peak, ended_whole = unbroken.result()
    assert ended, "the resumed evaluation failed"
    assert ended_whole, "the evaluation without a break failed"
    same = scores(whole) == scores(broken)
    made_by = provenance()
    lines = [
        f"{arguments.prompts} pictures of the embedded model (64 px, {arguments.steps} denoising steps): "
        f"{seconds / 60:.1f} min, peak memory {peak / 2**20:.0f} MiB without a break, the other evaluation beside it.",
        f"{'; '.join(kills)}; then to the end in {resumed / 60:.1f} min, peak memory {again / 2**20:.0f} MiB.",
        f"Scores are {'the same to the last digit' if same else 'DIFFERENT'}:",
        "",
        *(
            f"- {name}: {item['value']!r} (± {item['high'] - item['value']:.2g})"
            for name, item in scores(broken).items()
        ),
        "",
        f"{made_by['processors']} cores of {made_by['processor']}, {made_by['started'][:10]}.",
    ]
    write_text(arguments.out, "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
