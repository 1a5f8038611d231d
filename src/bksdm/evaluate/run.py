"""`bksdm evaluate`: pictures of one or several models against real ones, with uncertainty.

Every model draws the same prompts from the same seeds. Features of its pictures go to the disk in blocks,
and the scores are made from them, so that the same command goes on after a kill and ends with the same digits.
Finished pictures are scored without diffusers and transformers, which take seconds to import.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bksdm.common.assets import ART
from bksdm.common.devices import choose_device
from bksdm.common.errors import InputError
from bksdm.common.page import shown
from bksdm.common.processes import processes
from bksdm.common.progress import say
from bksdm.common.prompts import cut_line
from bksdm.common.runs import check_free, digest, open_run, provenance, write_text
from bksdm.common.tables import listed
from bksdm.data.folder import read_captions
from bksdm.data.prompts import read_prompts
from bksdm.data.source import Source
from bksdm.evaluate.blocks import Blocks, open_together
from bksdm.evaluate.networks import PLAIN, Networks
from bksdm.evaluate.protocol import OF_OUTPUTS, Protocol, check_counts
from bksdm.evaluate.reference import RealFeatures, Statistics, open_reference
from bksdm.evaluate.report import Row, write_evaluation
from bksdm.evaluate.scores import LEFT, LEFT_UNSEEN, OUTPUT_ERROR, ErrorLeft, Weighted, differences
from bksdm.evaluate.scoring import Scoring
from bksdm.evaluate.sources import Drawn, Finished, Sampling, are_pictures, named
from bksdm.families import family_of
from bksdm.generate.requests import check, numbered
from bksdm.models.configs import check_ready, load_denoiser_config
from bksdm.models.drawing import drawing, drawings, say_unlike
from bksdm.models.folders import decoder_fingerprint, fingerprint
from bksdm.options.evaluate import EvaluateOptions
from bksdm.options.generate import GenerateOptions

if TYPE_CHECKING:
    from bksdm.evaluate.from_teacher import FromTeacher

_MAY_CHANGE = ("models", "scores", "batch_size", "device", "resamples", "intervals", "latency", "json", "unseen")
_SAID = (
    "reference",
    "prompts",
    "limit",
    "images_per_prompt",
    "scheduler",
    "decoder",
    "seed",
    "precision",
    "resamples",
    "intervals",
)


def evaluate(options: EvaluateOptions) -> dict[str, Any]:
    """Draw, look, score, and write `scores.json`, `scores.csv`, `quality.png` and `report.html`.

    Returns:
        What `scores.json` holds. Under `models`, for every model by its short name: how many `pictures`, which of
        them are `of_one_colour`, with how many `steps` and what `guidance` it drew, what it costs, and `scores`,
        name -> `value`, standard error `deviation`, 95 % interval `low` to `high`, the values by `seeds`, and what the
        standard error is `by`, bootstrap or influence. Under `reference` the scores of the real pictures themselves.
        Under `differences`, for every two models and every score, whether they differ by more than chance (`real`).

    Raises:
        InputError: An option, a model or the data are unfit; see the message.
    """
    _check(options)
    protocol = Protocol.of(options)
    out, device = Path(options.out), choose_device(options.device)
    reference = open_reference(options.reference)
    prompts, distractors = _prompts(options, reference), _distractors(options)
    captions = read_prompts(options.unseen, "unseen") if options.unseen else []
    sources, unseen = _sources(options, prompts), _unseen(options, captions) if captions else None
    check_ready(
        "evaluate",
        *(source.model for source in sources.values() if isinstance(source, Drawn)),
        options=dataclasses.asdict(options),
    )
    _check_comparable(sources, options.teacher)
    teacher_content = fingerprint(options.teacher) if options.teacher else None
    against = _from_teacher(options, protocol, sources, teacher_content)
    settings = dataclasses.asdict(options) | {
        "decoder_content": decoder_fingerprint(options.decoder),
        "teacher_content": teacher_content,
        "prompts_content": digest(prompts),
        "reference_content": reference.digest,
        "distractors_content": digest(distractors),
    }
    check_free(out, "evaluate", settings, _MAY_CHANGE)
    if unseen:
        check_free(unseen.folder.parent, *_drawing_unseen(unseen))
    networks = _networks(protocol, device)
    protocol = _fitting(protocol, networks, sources, reference)

    group = processes()
    group.wait()  # until all have looked at the folder as it was
    if group.main:
        open_run(out, "evaluate", settings, _MAY_CHANGE, {"device": str(device)})
    group.wait()
    real = _real(protocol, networks, reference, out)
    seen = {name: _look(name, source, protocol, networks, out) for name, source in sources.items()}
    outputs = _outputs(against, reference, unseen)
    if group.main:
        texts = (prompts, distractors, captions)
        scoring = Scoring(protocol.scores, networks, real, *texts, options.resamples, options.intervals)
        _write(options, protocol, scoring, sources, seen, reference, outputs)
    group.wait()
    return dict(json.loads((out / "scores.json").read_text(encoding="utf-8")))


def _check(options: EvaluateOptions) -> None:
    if not options.models:
        raise InputError("no model is given; give one or several")
    for name in ("resamples", "latency"):
        if getattr(options, name) < 0:
            raise InputError(f"{name} is {getattr(options, name)}; give 0 or more")
    if options.limit is not None and options.limit < 1:
        raise InputError(f"limit is {options.limit}; give at least 1")
    shared = ("images_per_prompt", "steps", "guidance", "seed", "batch_size", "device")
    check(GenerateOptions(options.models[0], options.out, **{name: getattr(options, name) for name in shared}))


def _prompts(options: EvaluateOptions, reference: Statistics | Finished) -> list[str]:
    if options.prompts:
        prompts = read_prompts(options.prompts)
    elif isinstance(reference, Finished) and reference.captions:
        prompts = reference.captions
    elif all(are_pictures(model) for model in named(options.models).values()):
        prompts = []
    else:
        raise InputError(f"reference {options.reference} has no captions to draw; give --prompts")
    return list(prompts[: options.limit])


def _distractors(options: EvaluateOptions) -> list[str]:
    own = options.reference.partition("/")[0]
    given = options.distractors or (f"{own}/train" if own == ART else None)
    return read_prompts(given, "distractors") if given else []


def _sources(options: EvaluateOptions, prompts: list[str]) -> dict[str, Drawn | Finished]:
    sampling = _sampling(options)
    sources: dict[str, Drawn | Finished] = {}
    models = named(options.models)
    drawn = {name: model for name, model in models.items() if not are_pictures(model)}
    ways = drawings(drawn, options.steps, options.guidance, options.spared())
    for name, model in models.items():
        if name not in ways:
            given = prompts if options.prompts else None
            sources[name] = Finished.of(model, given, real=False)
            continue
        requests = numbered(prompts, options.images_per_prompt, options.seed)
        kept = range(len(requests)) if options.keep_pictures else shown(len(requests))
        sources[name] = Drawn(model, requests, ways[name], sampling, _folder(options, name) / "pictures", set(kept))
    return sources


def _sampling(options: EvaluateOptions) -> Sampling:
    how = ("scheduler", "batch_size", "precision", "device", "decoder")
    return Sampling(**{name: getattr(options, name) for name in how})


def _folder(options: EvaluateOptions, name: str) -> Path:
    return Path(options.out) / "models" / name


def _check_comparable(sources: Mapping[str, Drawn | Finished], teacher: str | None) -> None:
    """Refuse a teacher whose inputs a model does not take."""
    for model in [source.model for source in sources.values() if isinstance(source, Drawn) and teacher]:
        ours, theirs = load_denoiser_config(model), load_denoiser_config(str(teacher))
        for key in family_of(ours).inputs:
            if ours.get(key) != theirs.get(key):
                raise InputError(
                    f"teacher {teacher} and model {model} do not take the same inputs "
                    f"({key}: {theirs.get(key)} and {ours.get(key)}); give the teacher that the model was made from"
                )


def _networks(protocol: Protocol, device: torch.device) -> Networks:
    """The networks of the protocol; of several processes the main one goes first, and may have to download them."""
    group = processes()
    if not group.main:
        group.wait()
    networks = protocol.networks(device)
    if group.main:
        group.wait()
    return networks


def _fitting(
    protocol: Protocol,
    networks: Networks,
    sources: Mapping[str, Drawn | Finished],
    reference: Statistics | Finished,
) -> Protocol:
    """The protocol, as far as this reference allows; what does not fit together is refused before anything starts."""
    counts = [(f"model {name}", len(source)) for name, source in sources.items()]
    if isinstance(reference, Statistics):
        protocol = protocol.of_statistics(str(reference.path))
        reference.check(networks.size)
    else:
        counts.insert(0, ("the reference", len(reference)))
        if networks.inception and protocol.preparation == "none":
            reference.check_one_size()
    for what, count in counts:
        if count < 2:
            raise InputError(f"{what} has {count} picture; scores of a set need two or more")
    if "frechet_distance" in protocol.scores and not protocol.asked:
        check_counts(counts, networks.size)
    lines = [source.check() for source in sources.values() if isinstance(source, Drawn)]
    if networks.encoder:
        from bksdm.models.pipelines import cutting

        captions = [caption for source in sources.values() for caption in source.captions or []]
        lines.append(cut_line(captions, cutting(networks.encoder.tokenizer), "captions that are compared"))
    say_unlike({name: source.how for name, source in sources.items() if isinstance(source, Drawn)})
    for line in filter(None, dict.fromkeys(lines)):
        say(line)
    return protocol


def _real(protocol: Protocol, networks: Networks, reference: Statistics | Finished, out: Path) -> RealFeatures:
    if isinstance(reference, Statistics):
        return RealFeatures(gaussian=reference.gaussian)
    compares = "frechet_distance" in protocol.scores
    real = RealFeatures.of(reference, networks, protocol.preparation, out / "reference", gaussian=compares)
    if real.gaussian and processes().main:
        real.gaussian.save(out / "reference" / "statistics.npz")
    return real


def _look(name: str, source: Drawn | Finished, protocol: Protocol, networks: Networks, out: Path) -> Blocks:
    """Draw and look at what is missing of a model's pictures."""
    folder = out / "models" / name
    settings = {"model_content": source.digest, "networks": networks.digest, "preparation": protocol.preparation}
    open_together(folder, "evaluate a model", settings | _way(source))

    def look(numbers: range) -> Mapping[str, Tensor]:
        pictures = source.pictures(numbers, protocol.preparation)
        captions = source.captions
        return networks.look(pictures, captions and captions[numbers.start : numbers.stop])

    blocks = Blocks(folder / "features", len(source))
    blocks.fill(look, f"pictures of {name}")
    if isinstance(source, Drawn):
        source.release()
        if processes().main:
            source.list_kept()
    return blocks


def _write(
    options: EvaluateOptions,
    protocol: Protocol,
    scoring: Scoring,
    sources: Mapping[str, Drawn | Finished],
    seen: Mapping[str, Blocks],
    reference: Statistics | Finished,
    outputs: Mapping[str, Mapping[str, Weighted]],
) -> None:
    out = Path(options.out)
    estimates = {}
    for name, source in sources.items():
        repeats = options.images_per_prompt if isinstance(source, Drawn) else 1
        if gaussian := scoring.statistics(seen[name]):
            gaussian.save(_folder(options, name) / "statistics.npz")
        estimates[name] = scoring.of_pictures(name, source, seen[name], gaussian, repeats, outputs.get(name))
    lacking = [name for name in protocol.scores if all(name not in found for found in estimates.values())]
    if lacking:
        others = ", or no model was pruned from the teacher" if OF_OUTPUTS.keys() & lacking else ""
        say(f"without {', '.join(lacking)}: the pictures have no captions, or the reference has no pictures{others}")
    worths = _worths(options, {name: source for name, source in sources.items() if isinstance(source, Drawn)})
    plain = {name: _plain(name, source, seen[name]) for name, source in sources.items()}
    result = {
        "models": {
            name: {
                "model": model,
                "pictures": len(sources[name]),
                "of_one_colour": plain[name],
                **_way(sources[name]),
                "scores": {score: estimate.to_dict() for score, estimate in estimates[name].items()},
                "by_noise": _by_noise(outputs.get(name, {})),
                **worths.get(name, {}),
            }
            for name, model in named(options.models).items()
        },
        "reference": {
            "pictures": len(reference) if isinstance(reference, Finished) else None,
            "scores": {score: estimate.to_dict() for score, estimate in scoring.of_reference().items()},
        },
        "differences": [item.to_dict() for item in differences(estimates)],
        "protocol": protocol.to_dict() | _drawing(options) | {"retrieval_among": scoring.among},
        "safety_checker": False,
        "made_by": provenance(),
    }
    write_text(out / "scores.json", json.dumps(result, indent=2) + "\n")
    write_evaluation(out, result, _rows(sources, reference))


def _way(source: Drawn | Finished) -> dict[str, Any]:
    """The steps and guidance of a model that draws."""
    return source.how.to_dict() if isinstance(source, Drawn) else {}


def _by_noise(outputs: Mapping[str, Weighted]) -> dict[str, list[dict[str, Any]]]:
    """What is left of the error of pruning at every noise level, by score."""
    return {score: left.to_rows() for score, left in outputs.items() if isinstance(left, ErrorLeft)}


def _plain(name: str, source: Drawn | Finished, seen: Blocks) -> list[str]:
    """The pictures of one colour, of which scores tell nothing; they are named."""
    rows = seen.rows(PLAIN)
    found = [source.name(int(number)) for number in rows[0:].nonzero()] if rows else []
    if found:
        say(f"{len(found)} of {len(source)} pictures of {name} are of one colour, such as black: {listed(found)}")
    return found


def _worths(options: EvaluateOptions, drawn: Mapping[str, Drawn]) -> dict[str, dict[str, Any]]:
    """What the models cost; times stay those of an earlier call, if it timed all of these side by side."""
    if not drawn:
        return {}
    from bksdm.evaluate.worth import worth

    seconds = _seconds(options, drawn)
    known = seconds.keys() == drawn.keys()
    found = worth(
        {name: source.model for name, source in drawn.items()},
        {name: source.how for name, source in drawn.items()},
        rounds=0 if known else options.latency,
        precision=options.precision,
        device=options.device,
        decoder=options.decoder,
    )
    return {name: {**values, **(seconds[name] if known else {})} for name, values in found.items()}


def _seconds(options: EvaluateOptions, drawn: Mapping[str, Drawn]) -> dict[str, dict[str, float]]:
    """Seconds a picture as an earlier call measured them, by the name of the model."""
    file, key = Path(options.out) / "scores.json", "seconds_per_picture"
    if not (options.latency and file.is_file()):
        return {}
    models = json.loads(file.read_text(encoding="utf-8"))["models"]
    return {name: {key: models[name][key]} for name in drawn if key in models.get(name, {})}


def _drawing(options: EvaluateOptions) -> dict[str, Any]:
    return {name: getattr(options, name) for name in _SAID}


def _from_teacher(
    options: EvaluateOptions, protocol: Protocol, sources: Mapping[str, Drawn | Finished], content: str | None
) -> FromTeacher | None:
    """What the models' outputs are held against, if anything; `content` is the teacher's fingerprint."""
    students = {name: source for name, source in sources.items() if isinstance(source, Drawn)}
    if not (students and OF_OUTPUTS.keys() & protocol.scores):
        return None
    from bksdm.evaluate.from_teacher import FromTeacher

    device, teacher = choose_device(options.device), str(options.teacher)
    return FromTeacher.of(teacher, content, students, protocol.scores, device, asked=protocol.asked)


def _unseen(options: EvaluateOptions, captions: Sequence[str]) -> Drawn:
    """What the teacher draws of captions that have no pictures."""
    teacher = str(options.teacher)
    how = drawing(teacher, options.steps, options.guidance, options.spared())
    requests, folder = numbered(captions, 1, options.seed), Path(options.out) / "unseen" / "pictures"
    return Drawn(teacher, requests, how, _sampling(options), folder, range(len(requests)))


def _drawing_unseen(source: Drawn) -> tuple[str, dict[str, Any]]:
    """What the folder of these pictures is a run of, and its settings."""
    return "draw unseen captions", {"unseen_content": source.digest}


def _drawn_unseen(source: Drawn) -> Source:
    """These pictures, all of which are kept; drawn once, by one of several processes."""
    group = processes()
    if group.main:
        open_run(source.folder.parent, *_drawing_unseen(source))
        if not all(source.path(number).is_file() for number in range(len(source))):
            source.pictures(range(len(source)), "none")
            source.release()
        source.list_kept()
    group.wait()
    return Source(read_captions(source.folder), source.digest)


def _outputs(
    against: FromTeacher | None, reference: Statistics | Finished, unseen: Drawn | None
) -> dict[str, dict[str, Weighted]]:
    """Scores of how far every model's outputs are from the teacher's."""
    if against is None:
        return {}
    pictures = {LEFT_UNSEEN: _drawn_unseen(unseen)} if unseen else {}
    if isinstance(reference, Finished) and reference.captions:
        held_out = Source(reference.entries, reference.digest)
        pictures |= {OUTPUT_ERROR: held_out, LEFT: held_out}
    return against.outputs(pictures)


def _rows(sources: Mapping[str, Drawn | Finished], reference: Statistics | Finished) -> list[Row]:
    """Some prompts, with the real picture where it is the prompt's own, and every model's picture."""
    drawn = [source for source in sources.values() if isinstance(source, Drawn)]
    if not drawn:
        return []
    captions = drawn[0].captions
    own = isinstance(reference, Finished) and reference.captions == captions
    rows: list[Row] = []
    for number in shown(len(captions)):
        real = reference.entries[number].open() if own and isinstance(reference, Finished) else None
        rows.append((captions[number], real, [source.path(number) for source in drawn]))
    return rows
