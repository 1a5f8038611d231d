"""`bksdm sensitivity`: every unit of the teacher's U-Net is left out once, and a recipe follows from what that loses.

Nothing is retrained and no weight changes. What is scored is a line in `scores.jsonl`, so the same command goes on.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from diffusers import DiffusionPipeline

from bksdm.common.devices import choose_device, choose_precision
from bksdm.common.errors import InputError
from bksdm.common.progress import bar, say
from bksdm.common.prompts import cut_line
from bksdm.common.runs import check_free, open_run, write_text
from bksdm.data.source import Source, read_source, spread
from bksdm.evaluate.encoder import DualEncoder
from bksdm.families import bypassed, units
from bksdm.families.recipe import Config
from bksdm.families.units import Unit
from bksdm.generate.requests import check
from bksdm.generate.sampling import scheduler_named
from bksdm.models.configs import check_ready, context_tokens, load_denoiser_config
from bksdm.models.drawing import drawing
from bksdm.models.folders import fingerprint
from bksdm.models.pipelines import check_text_to_image, cutting, denoiser, load_pipeline
from bksdm.options.generate import GenerateOptions
from bksdm.options.pruning import SensitivityOptions
from bksdm.pruning.budget import Budget, What, check_share
from bksdm.pruning.cost import parts_cost
from bksdm.pruning.describe import describe_config
from bksdm.pruning.sensitivity.compare import PICTURED, Comparison, Inputs
from bksdm.pruning.sensitivity.ledger import Ledger
from bksdm.pruning.sensitivity.measures import Score
from bksdm.pruning.sensitivity.outcome import TITLES, Sensitivity
from bksdm.pruning.sensitivity.report import write_chart, write_sensitivity_report
from bksdm.runtime.defaults import Defaults

# A score depends on none of these, so that another budget, or more scores, go on from what is there.
_MAY_CHANGE = ("json", "out", "batch_size", "device", "scores", "params", "gmacs", "budget_score")
_REFERENCE = 1000  # real pictures at most; more cost time and change little
_WHOLE = "whole"


def sensitivity(options: SensitivityOptions) -> Sensitivity:
    """Score the units, choose a recipe where there is a budget, and write all of it.

    Returns:
        What the units are worth, and the recipe.

    Raises:
        InputError: An option, the teacher or the data are unfit; see the message.
    """
    check_ready("sensitivity", options.teacher)
    how = drawing(options.teacher, options.steps, options.guidance)
    options = dataclasses.replace(options, steps=how.steps, guidance=how.guidance)
    scores = _check(options)
    config, tokens = load_denoiser_config(options.teacher), context_tokens(options.teacher)
    found = units(config)
    budget = _budget(options, config, tokens)
    source = read_source(options.data)
    settings = dataclasses.asdict(options) | {
        "teacher_content": fingerprint(options.teacher),
        "data_content": source.digest,
    }
    out = Path(options.out)
    check_free(out, "sensitivity", settings, _MAY_CHANGE)
    encoder = DualEncoder.load(options.encoder)
    device = choose_device(options.device)
    precision = choose_precision(options.precision, device, training=False)
    ledger = Ledger(out / "scores.jsonl")
    asked = {_WHOLE: [name for name in scores if name in PICTURED], **{unit.name: scores for unit in found}}
    missing = ledger.missing(asked)
    if missing:
        pipeline = load_pipeline(options.teacher, precision).to(device)
        check_text_to_image(pipeline, options.teacher)
        if options.scheduler:
            pipeline.scheduler = scheduler_named(options.scheduler, pipeline.scheduler)
    open_run(out, "sensitivity", settings, _MAY_CHANGE, {"device": str(device), "precision": str(precision)})
    if missing:
        inputs = _inputs(options, how, source)
        if line := cut_line([entry.text for entry in inputs.entries], cutting(pipeline), "captions"):
            say(line)
        _measure(pipeline, encoder, inputs, found, missing, ledger)
    outcome = Sensitivity(
        units=found,
        costs=parts_cost(config, {unit.name: unit.paths for unit in found}, tokens=tokens),
        scores={name: {unit.name: ledger[unit.name, name] for unit in found} for name in scores},
        whole={name: ledger[_WHOLE, name].value for name in asked[_WHOLE]},
    )
    if budget:
        outcome = _with_recipe(outcome, budget, options, tokens)
    _write(outcome, out, options)
    return outcome


def _measure(
    pipeline: DiffusionPipeline,
    encoder: DualEncoder,
    inputs: Inputs,
    found: Sequence[Unit],
    missing: Mapping[str, Sequence[str]],
    ledger: Ledger,
) -> None:
    """Score what is missing, unit by unit."""
    needed = {score for scores in missing.values() for score in scores}
    left = [unit for unit in found if unit.name in missing]
    with bar(len(found), "units", len(found) - len(left)) as progress:
        compare = Comparison(pipeline, encoder, inputs, needed)
        ledger.add(_WHOLE, {score: Score(compare.whole(score), 0.0) for score in missing.get(_WHOLE, ())})
        for unit in left:
            with bypassed(denoiser(pipeline), [unit]):
                ledger.add(unit.name, compare(missing[unit.name]))
            progress.advance()


def _check(options: SensitivityOptions) -> list[str]:
    """Refuse options that no teacher could serve; give the names of the scores.

    Raises:
        InputError: Naming the option and its value.
    """
    shared = ("steps", "guidance", "seed", "batch_size", "precision", "device")
    check(GenerateOptions(options.teacher, "", ["any"], **{name: getattr(options, name) for name in shared}))
    if options.pictures < 2:
        raise InputError(f"pictures is {options.pictures}; a standard error needs at least 2")
    if options.params is not None and options.gmacs is not None:
        raise InputError(f"params is {options.params} and gmacs {options.gmacs}; give one budget")
    scores = [name for name in TITLES if name in (options.scores or TITLES)]
    wanted = _share(options)
    if wanted:
        check_share(*wanted)
        if options.budget_score not in scores:
            raise InputError(
                f"budget_score is {options.budget_score}, and scores are {', '.join(scores)}; add it there"
            )
    return scores


def _share(options: SensitivityOptions) -> tuple[What, float] | None:
    if options.params is not None:
        return "params", options.params
    return None if options.gmacs is None else ("gmacs", options.gmacs)


def _budget(options: SensitivityOptions, config: Config, tokens: int) -> Budget | None:
    """What recipes can save, where the options set a budget; one that none can keep to is refused."""
    wanted = _share(options)
    if wanted is None:
        return None
    what, share = wanted
    budget = Budget.of(config, what, tokens)
    budget.check(share)
    return budget


def _inputs(options: SensitivityOptions, how: Defaults, source: Source) -> Inputs:
    return Inputs(
        entries=spread(source.pictures, options.pictures),
        real=spread(source.pictures, min(_REFERENCE, len(source.pictures))),
        seed=options.seed,
        how=how,
        batch_size=options.batch_size,
    )


def _with_recipe(outcome: Sensitivity, budget: Budget, options: SensitivityOptions, tokens: int) -> Sensitivity:
    what, share = _share(options) or ("params", 1.0)
    importance = {name: score.value for name, score in outcome.scores[options.budget_score].items()}
    summary = f"At most {share:.1%} of the {budget.words}, by {TITLES[options.budget_score]} (bksdm sensitivity)."
    choice = budget.choose(share, importance, f"{what}-{share:g}", summary)
    description = describe_config(dict(budget.config), choice.recipe, tokens)
    return dataclasses.replace(outcome, choice=choice, description=description)


def _write(outcome: Sensitivity, out: Path, options: SensitivityOptions) -> None:
    if outcome.choice:
        write_text(out / "recipe.yaml", yaml.safe_dump(outcome.choice.recipe.to_dict(), sort_keys=False))
    write_text(out / "sensitivity.json", json.dumps(outcome.to_dict(), indent=2) + "\n")
    write_text(out / "sensitivity.csv", outcome.csv())
    write_chart(outcome, out / "sensitivity.png")
    write_sensitivity_report(outcome, out, teacher=options.teacher, data=options.data, pictures=options.pictures)
