"""What the error that a retrained student has left consists of: by noise level, by stage and by caption.

    python benchmarks/remaining_error.py --pruned PRUNED --out benchmarks/results/remaining_error.md NAME=STUDENT ...

Students of the embedded teacher that keep its stages (base, small) answer its held-out pictures at ten noise levels. A
row of a stage says what share of the squared error is left where the output of that stage is the teacher's and all else
the student's own, skip connections within the stage included. `left` is the mean over levels of the share of the
just-pruned student's error.
"""

import argparse
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bksdm.common.runs import provenance, write_text
from bksdm.data.folder import data_folder, read_captions
from bksdm.evaluate.output_error import LEVELS, Answered, answered, errors
from bksdm.models.pipelines import denoiser, load_denoiser, load_pipeline, quiet_libraries
from bksdm.quickstart.run import HELD_OUT

TEACHER = "emoji"
FOR_STAGES = 24  # pictures; what they share does not change much from one to another


def stages(unet: Any) -> dict[str, nn.Module]:
    """Down, in the middle and up, by name."""
    down = {f"down_blocks.{number}": block for number, block in enumerate(unet.down_blocks)}
    middle = {} if unet.mid_block is None else {"mid_block": unet.mid_block}
    return down | middle | {f"up_blocks.{number}": block for number, block in enumerate(unet.up_blocks)}


@contextmanager
def hooked(module: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def taught(answer: Answered, teacher: Any) -> dict[str, Any]:
    """What the stages of the teacher give."""
    kept: dict[str, Any] = {}
    with ExitStack() as hooks:
        for name, stage in stages(teacher).items():
            hooks.enter_context(hooked(stage, lambda _module, _given, made, name=name: kept.update({name: made})))
        answer.probe.output(teacher)
    return kept


def with_output(answer: Answered, student: Any, stage: str, given: Any) -> Tensor:
    """Errors of the student where a stage gives what it is told to, with shape (B,)."""

    def instead(_module: nn.Module, _given: Any, made: Any) -> Any:
        if isinstance(made, tuple):  # hidden states, and those for skip connections, of which the last are the same
            return given[0], (*made[1][:-1], given[0])
        return given

    with hooked(stages(student)[stage], instead):
        return answer.errors(student)


def by_stage(student: Any, asked: list[tuple[Answered, dict[str, Any]]]) -> dict[str, list[float]]:
    """The share of the squared error that is left at the least noisy level, over all and at the noisiest.

    `asked` has an answer of the teacher and what its stages gave for every level, the least noisy first.
    """
    whole = torch.stack([answer.errors(student).mean() for answer, _ in asked])
    found = {}
    for stage in stages(student):
        own = torch.stack([with_output(answer, student, stage, given[stage]).mean() for answer, given in asked])
        found[stage] = [float(own[0] / whole[0]), float(own.sum() / whole.sum()), float(own[-1] / whole[-1])]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("students", nargs="+", metavar="NAME=STUDENT")
    parser.add_argument("--pruned", required=True)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    quiet_libraries()
    entries = read_captions(data_folder(HELD_OUT))
    pipeline = load_pipeline(TEACHER)
    batches = list(answered(pipeline, entries, levels=LEVELS))
    few = list(answered(pipeline, entries[:: -(-len(entries) // FOR_STAGES)], levels=LEVELS))
    students = {
        name: load_denoiser(Path(folder), torch.float32)
        for name, folder in (s.split("=", 1) for s in arguments.students)
    }
    before = errors(load_denoiser(Path(arguments.pruned), torch.float32), batches).mean(dim=0)
    lines = ["| level, least noisy first | just pruned | " + " | ".join(f"{name} | left" for name in students) + " |"]
    lines += ["|" + "---|" * (2 + 2 * len(students))]
    found = {name: errors(student, batches) for name, student in students.items()}
    for level in range(LEVELS):
        cells = [f"{one[:, level].mean():.4f} | {one[:, level].mean() / before[level]:.1%}" for one in found.values()]
        lines.append(f"| {level + 1} | {before[level]:.4f} | " + " | ".join(cells) + " |")
    left = {name: (one / before).mean(dim=1) for name, one in found.items()}
    lines.append(
        "| all alike | | "
        + " | ".join(f"{one.mean():.4f} | {left[name].mean():.1%}" for name, one in found.items())
        + " |"
    )

    lines += [
        "",
        "| with the teacher's output of | "
        + " | ".join(f"{name}: level 1 | all | level {LEVELS}" for name in students)
        + " |",
    ]
    lines += ["|" + "---|" * (1 + 3 * len(students))]
    asked = [(answer, taught(answer, denoiser(pipeline))) for batch in few for answer in batch]
    shares = {name: by_stage(student, asked) for name, student in students.items()}
    for stage in dict.fromkeys(stage for one in shares.values() for stage in one):
        cells = [
            " | ".join(f"{share:.0%}" for share in one[stage]) if stage in one else "removed | | "
            for one in shares.values()
        ]
        lines.append(f"| {stage} | " + " | ".join(cells) + " |")

    styles: dict[str, list[int]] = defaultdict(list)
    for number, entry in enumerate(entries):
        styles[re.sub(".*, ", "", entry.text)].append(number)
    lines += ["", "| captions | pictures | " + " | ".join(f"{name}, left" for name in students) + " |"]
    lines += ["|" + "---|" * (2 + len(students))]
    for style, numbers in sorted(styles.items()):
        lines.append(
            f"| {style} | {len(numbers)} | " + " | ".join(f"{one[numbers].mean():.1%}" for one in left.values()) + " |"
        )
    for share, name in ((0.1, "the easiest tenth below"), (0.5, "half below"), (0.9, "the hardest tenth above")):
        lines.append(f"| {name} | | " + " | ".join(f"{one.quantile(share):.1%}" for one in left.values()) + " |")
    worst = next(iter(left.values())).argsort(descending=True)
    for word, few_of in (("hardest", worst[:3]), ("easiest", worst.flip(0)[:3])):
        lines += ["", f"The {word}: " + "; ".join(f'"{entries[int(number)].text}"' for number in few_of) + "."]
    made = provenance()
    lines += ["", f"{made['processors']} cores of {made['processor']}, {made['started'][:10]}."]
    print("\n".join(lines))
    if arguments.out:
        write_text(arguments.out, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
