"""How soon do verbs answer that compute nothing, and what do they hold meanwhile: now, and at earlier commits?

    python benchmarks/doors.py --before f5f04d2 9f3880b
    python benchmarks/doors.py --working --before f5f04d2     # verbs that do compute, on the embedded model

Every command runs in a process of its own, from the sources of each commit in turn, so that all meet what else the
machine does. Of several rounds the least CPU time counts (of user and system together), and the largest resident set.
Before that, all is compiled that Python keeps compiled, as an installed package has it. Beside them: Python alone, and
jsonargparse with one option, which no verb can go below. A dash is what an earlier commit refuses.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bksdm.common.runs import provenance, write_text

HERE = Path(__file__).parents[1]
ONE_OPTION = """
from dataclasses import dataclass
from jsonargparse import ArgumentParser

@dataclass(frozen=True)
class Options:
    name: str = ""

parser = ArgumentParser()
parser.add_class_arguments(Options, as_group=False)
parser.parse_args(["--help"])
"""


@dataclass(frozen=True)
class Spent:
    """CPU seconds of a process and its children, and its largest resident set in MiB."""

    seconds: float
    mebibytes: float

    def __str__(self) -> str:
        return f"{self.seconds:.2f} s, {self.mebibytes:.0f} MiB"


def spent(words: Sequence[str], source: Path, compiled: Path) -> Spent | None:
    """What a process of Python with these words takes; None where it fails."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    environment |= {"PYTHONPATH": str(source / "src"), "PYTHONPYCACHEPREFIX": str(compiled), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as out:
        words = [f"{out}/run" if word == "OUT" else word for word in words]
        process = subprocess.Popen(
            [sys.executable, *words], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        return None
    return Spent(used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)


def commands(work: Path) -> dict[str, list[str]]:
    """Words behind Python by what people write."""
    whole, places = ["-m", "bksdm"], {}
    for name in ("sd_v1.4", "sdxl_base_1.0"):
        places[name] = work / name
        places[name].mkdir()
        config = (HERE / "tests" / "data" / f"unet_{name}.json").read_text(encoding="utf-8")
        (places[name] / "config.json").write_text(config, encoding="utf-8")
    flux = {"_class_name": "FluxTransformer2DModel", "guidance_embeds": True}
    places["flux"] = work / "flux"
    places["flux"].mkdir()
    (places["flux"] / "config.json").write_text(json.dumps(flux), encoding="utf-8")
    return {
        "describe SD 1.4's config --recipe base": [*whole, "describe", str(places["sd_v1.4"]), "--recipe", "base"],
        "describe SDXL's config --recipe vega": [*whole, "describe", str(places["sdxl_base_1.0"]), "--recipe", "vega"],
        "describe Flux.1's config --recipe half": [*whole, "describe", str(places["flux"]), "--recipe", "half"],
        "describe emoji, a folder with weights": [*whole, "describe", "emoji"],
        "--help": [*whole, "--help"],
        "--version": [*whole, "--version"],
        "prune --help": [*whole, "prune", "--help"],
        "distill --help": [*whole, "distill", "--help"],
        "import of bksdm.models.pipelines": ["-c", "import bksdm.models.pipelines"],
        "import of bksdm.distill.run": ["-c", "import bksdm.distill.run"],
        "import of bksdm.evaluate.run": ["-c", "import bksdm.evaluate.run"],
        "of these, torch and the classes of SD in diffusers and transformers": [
            "-c",
            "import torch; from diffusers import StableDiffusionPipeline, UNet2DConditionModel; "
            "from transformers import CLIPTextModel",
        ],
        "Python alone": ["-c", "pass"],
        "jsonargparse with one option": ["-c", ONE_OPTION],
    }


def working(work: Path) -> dict[str, list[str]]:
    """The same of verbs that compute; each writes to a folder of its own, `OUT`."""
    student = work / "student"
    subprocess.run(
        [sys.executable, "-m", "bksdm", "prune", "emoji", "--recipe", "small", "--out", str(student)],
        env=os.environ | {"PYTHONPATH": str(HERE / "src")},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    quick = "--scheduler DPMSolverMultistepScheduler --steps 10 --batch_size 8"
    asked = {
        "prune": "prune emoji --recipe small",
        "prepare, 75 pictures": "prepare emoji/heldout --teacher emoji",
        "generate, 8 pictures of 10 steps": f"generate emoji --prompts PROMPTS {quick}",
        "distill, 10 steps of 16": f"distill --teacher emoji --student {student} --data emoji/heldout --steps 10 "
        "--batch_size 16 --accumulation 1 --sample_every 0",
        "evaluate, 25 pictures of 10 steps": "evaluate emoji --reference emoji/heldout --limit 25 --latency 0 "
        f"--scores clip_score retrieval_r1 {quick}",
        "export --to openvino": f"export {student} --to openvino",
    }
    prompts = work / "prompts.txt"
    prompts.write_text("red apple, noto style\n" * 8, encoding="utf-8")
    words = {name: line.replace("PROMPTS", str(prompts)).split() for name, line in asked.items()}
    return {name: ["-m", "bksdm", *each, "--out", "OUT"] for name, each in words.items()}


def main() -> None:
    """Write `doors.md`, or `working.md`, with a line for every command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", nargs="*", default=["9f3880b"], help="earlier commits")
    parser.add_argument("--working", action="store_true", help="verbs that compute")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=HERE / "benchmarks" / "results")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        sources = {commit: work / commit for commit in arguments.before}
        try:
            for commit, place in sources.items():
                subprocess.run(["git", "-C", HERE, "worktree", "add", "--quiet", "--detach", place, commit], check=True)
            sources["now"] = HERE
            asked = working(work) if arguments.working else commands(work)
            rows = measured(asked, sources, work / "compiled", arguments.rounds)
        finally:
            for commit in arguments.before:
                subprocess.run(["git", "-C", HERE, "worktree", "remove", "--force", work / commit], check=False)
    about = provenance()
    machine = f"{about['processors']} cores of {about['processor']}, other work beside it, {about['started'][:10]}"
    note = f"{machine}; the least CPU time and the largest resident set of {arguments.rounds} rounds."
    table = ["| command | " + " | ".join(sources) + " |", "|---" * (1 + len(sources)) + "|", *rows]
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = "working.md" if arguments.working else "doors.md"
    write_text(arguments.out / file, "\n".join(table) + f"\n\n{note}\n")
    print("\n".join(table))


def measured(asked: dict[str, list[str]], sources: dict[str, Path], compiled: Path, rounds: int) -> list[str]:
    """A line of the table for every command."""
    for source in sources.values():
        spent(["-c", "import bksdm.distill.run, bksdm.evaluate.run, bksdm.pruning.describe"], source, compiled)
        spent(["-m", "bksdm", "prune", "--help"], source, compiled)
    rows = []
    for name, words in asked.items():
        turns = [[spent(words, source, compiled) for source in sources.values()] for _ in range(rounds)]
        rows.append(f"| {name} | " + " | ".join(map(least, zip(*turns, strict=True))) + " |")
        print(rows[-1], file=sys.stderr)
    return rows


def least(turns: Sequence[Spent | None]) -> str:
    """A cell of the table."""
    done = [one for one in turns if one]
    if not done:
        return "-"
    return str(Spent(min(one.seconds for one in done), max(one.mebibytes for one in done)))


if __name__ == "__main__":
    main()
