"""Which blocks of a text-to-image flow transformer should stay: a regular pattern, or those with the highest scores?

    python benchmarks/block_choice.py runs/choice --out benchmarks/results/block_choice.md

Half of the blocks stay by the regular pattern, by the loss in output without a block, by the rise of the Frechet
distance without it (both as `bksdm sensitivity` measures them), and by how similar what comes out of a block is to what
went in (ShortGPT's block influence, arXiv 2403.03853, over the picture's tokens). All are retrained alike, as the
quickstart does but without empty captions, with three seeds, and scored on the held-out prompts. Each part is skipped
where it is done already.
"""

import argparse
import dataclasses
import json
import statistics
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from bksdm.common.runs import provenance, write_text
from bksdm.data.folder import data_folder, read_captions
from bksdm.distill.run import distill
from bksdm.evaluate.output_error import probes
from bksdm.evaluate.run import evaluate
from bksdm.families import derive, family_of
from bksdm.families.recipe import load_recipe
from bksdm.models.adapters.block_controlnet import inherited
from bksdm.models.configs import load_denoiser_config
from bksdm.models.pipelines import denoiser, load_pipeline, quiet_libraries
from bksdm.options.evaluate import EvaluateOptions
from bksdm.options.pruning import PruneOptions, SensitivityOptions
from bksdm.options.quickstart import QuickstartOptions
from bksdm.pruning.run import prune
from bksdm.pruning.sensitivity.run import sensitivity
from bksdm.quickstart.run import HELD_OUT, TRAIN, distillation

STACK = "layers"
SEEDS = (0, 1, 2)
_T = 4.303  # of Student's distribution with two degrees of freedom, for 95 %
_SCORES = {"output_error": ("output error", ".4f"), "frechet_distance": ("Frechet distance", ".1f")}


def similarities(teacher: str) -> dict[int, float]:
    """Mean cosine of what goes into a block and what comes out, by its number, over noisy pictures of the art."""
    pipeline = load_pipeline(teacher)
    network, family = denoiser(pipeline), family_of(load_denoiser_config(teacher))
    given: dict[int, list[Tensor]] = {}

    def compare(number: int, latents: Tensor) -> None:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            before, after = (family.feature(module, tokens, latents) for tokens in (args[0], output))
            given.setdefault(number, []).append(F.cosine_similarity(before, after, dim=-1).mean())

        blocks = getattr(network, STACK)
        handles.append(blocks[number].register_forward_hook(hook))

    handles: list[torch.utils.hooks.RemovableHandle] = []
    for probe in probes(pipeline, read_captions(data_folder(HELD_OUT)), 0, 25):
        for number in range(len(getattr(network, STACK))):
            compare(number, probe.latents)
        with torch.no_grad():
            probe.output(network)
        for handle in handles:
            handle.remove()
        handles.clear()
    return {number: float(torch.stack(found).mean()) for number, found in given.items()}


def choices(teacher: str, out: Path) -> dict[str, list[int]]:
    """The blocks that stay by each choice, of which there are half as many as the teacher has."""
    file = out / "choices.json"
    if file.is_file():
        kept: dict[str, list[int]] = json.loads(file.read_text())
        return kept
    config = load_denoiser_config(teacher)
    depth, pruning = family_of(config).depths(config)[STACK], derive(load_recipe("half"), config)
    pattern = list(inherited(pruning, family_of(config).depths(pruning.student_config))[STACK])
    options = SensitivityOptions(teacher, HELD_OUT, str(out / "sensitivity"), scores=["output", "frechet"], pictures=75)
    found = sensitivity(options)
    worth: dict[str, Mapping[int, float]] = {
        name: {int(unit.rpartition(" ")[2]): score.value for unit, score in found.scores[name].items()}
        for name in ("output", "frechet")
    }
    worth["similarity"] = {number: -value for number, value in similarities(teacher).items()}
    made = {"regular": pattern}
    for name, scores in worth.items():
        best = sorted(range(1, depth), key=lambda number: -scores[number])[: len(pattern) - 1]  # the first block stays
        made[name] = sorted([0, *best])
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "worth.json", json.dumps(worth, indent=2) + "\n")
    write_text(file, json.dumps(made, indent=2) + "\n")
    return made


def interval(values: list[float], form: str) -> str:
    """Mean and 95 % interval over the seeds."""
    half = _T * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):{form}} ± {half:{form}}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--teacher", default="emoji-flow")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    quiet_libraries()
    teacher, runs = arguments.teacher, arguments.runs
    chosen = choices(teacher, runs)
    models = [f"teacher={teacher}"]
    for name, kept in chosen.items():
        recipe = runs / f"{name}.yaml"
        write_text(recipe, yaml.safe_dump({"name": name, "summary": f"Half, by {name}.", "blocks": {STACK: kept}}))
        for seed in SEEDS:
            options = QuickstartOptions(str(runs / f"{name}-{seed}"), str(recipe), arguments.steps, seed, teacher)
            pruned = str(runs / f"{name}-{seed}" / "pruned")
            prune(PruneOptions(teacher, str(recipe), pruned))
            usual = distillation(options, Path(options.out))
            paced = dataclasses.replace(usual, student=pruned, caption_dropout=0.0)
            models.append(f"{name}-{seed}={distill(paced)}")
        models.append(f"{name}-pruned={runs / f'{name}-0' / 'pruned'}")
    found = evaluate(
        EvaluateOptions(
            models,
            str(runs / "evaluate"),
            HELD_OUT,
            encoder="emoji",
            distractors=TRAIN,
            scores=[*_SCORES, "clip_score", "retrieval_r1"],
            teacher=teacher,
            batch_size=25,
        )
    )["models"]
    lines = ["| blocks | which stay |" + "".join(f" {title}: pruned | retrained |" for title, _ in _SCORES.values())]
    lines += ["|---" * (2 + 2 * len(_SCORES)) + "|"]
    for name, kept in chosen.items():
        cells = [name, ", ".join(map(str, kept))]
        for score, (_, form) in _SCORES.items():
            cells.append(f"{found[f'{name}-pruned']['scores'][score]['value']:{form}}")
            cells.append(interval([found[f"{name}-{seed}"]["scores"][score]["value"] for seed in SEEDS], form))
        lines.append("| " + " | ".join(cells) + " |")
    made = provenance()
    distance = found["teacher"]["scores"]["frechet_distance"]["value"]
    text = "\n".join(
        [
            f"`python benchmarks/block_choice.py`: {32 * arguments.steps:,} pictures as the quickstart takes them,",
            f"seeds {', '.join(map(str, SEEDS))}, 75 held-out prompts. The teacher has a Frechet distance of",
            f"{distance:.1f}; intervals: 95 % over seeds.",
            "",
            *lines,
            "",
            f"{made['processors']} cores of {made['processor']}, {made['started'][:10]}.",
            "",
        ]
    )
    print(text)
    if arguments.out:
        write_text(arguments.out, text)


if __name__ == "__main__":
    main()
