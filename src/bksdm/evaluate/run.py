"""`bksdm evaluate`: pictures of a model against real ones, in the domain of an encoder."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from bksdm.data.folder import captions_digest, data_folder, read_captions, read_prompts
from bksdm.data.pictures import Picture, open_picture
from bksdm.devices import choose_device
from bksdm.errors import InputError
from bksdm.evaluate.encoder import DualEncoder
from bksdm.evaluate.output_error import output_error
from bksdm.evaluate.scores import clip_score, frechet_distance, retrieval_r1
from bksdm.generate import check, generate
from bksdm.models import check_text_to_image, fingerprint, load_pipeline, load_unet_config
from bksdm.options import EvaluateOptions, GenerateOptions
from bksdm.processes import processes
from bksdm.runs import check_free, digest, open_run, write_text

RETRIEVAL_AMONG = 100
_MAY_CHANGE = ("json", "batch_size", "device")


@dataclass(frozen=True)
class Reference:
    """Features with shape (N, D) of N real pictures, and their captions."""

    features: Tensor
    captions: list[str]

    @classmethod
    def of(cls, encoder: DualEncoder, entries: Sequence[Picture]) -> "Reference":
        features = encoder.image_features([entry.open() for entry in entries])
        return cls(features, [entry.text for entry in entries])


def evaluate(options: EvaluateOptions) -> dict[str, Any]:
    """Generate, score, and write `scores.json`.

    Returns:
        `pictures`; `frechet_distance` (lower is better) to the reference's features; `clip_score`, the mean
        cosine of picture and caption; `retrieval_r1`, the share of pictures whose own caption fits best
        among `retrieval_among`; the last two of the reference's own pictures under `reference`; and
        `output_error` where a teacher is given.

    Raises:
        InputError: An option, the model or the data are unfit; see the message.
    """
    out = Path(options.out)
    entries = read_captions(data_folder(options.reference))
    if len(entries) < 2:
        raise InputError(f"reference {options.reference} has one picture; a distance between distributions needs more")
    prompts = read_prompts(options.prompts or options.reference)
    generation = _generation(options, prompts, out)
    check(generation)
    if len(prompts) * options.images_per_prompt < 2:
        raise InputError(f"prompts {options.prompts} ask for one picture; a distance between distributions needs more")
    distractors = read_prompts(options.distractors) if options.distractors else []
    encoder = DualEncoder.load(options.encoder)
    settings = dataclasses.asdict(options) | {
        "model_content": fingerprint(options.model),
        "teacher_content": fingerprint(options.teacher) if options.teacher else None,
        "prompts_content": digest(prompts),
        "reference_content": captions_digest(entries),
        "distractors_content": digest(distractors),
    }
    check_free(out, "evaluate", settings, _MAY_CHANGE)
    if options.teacher:
        _check_comparable(options.model, options.teacher)
    check_text_to_image(load_pipeline(options.model), options.model)
    reference = Reference.of(encoder, entries)

    group = processes()
    group.wait()  # until all have looked at the folder as it was
    if group.main:
        open_run(out, "evaluate", settings, _MAY_CHANGE)
    paths = generate(generation)
    captions = [prompt for prompt in prompts for _ in range(options.images_per_prompt)]
    scores = score(encoder, paths, captions, reference, distractors)
    if options.teacher:
        device = choose_device(options.device)
        student, teacher = load_pipeline(options.model).unet.to(device), load_pipeline(options.teacher).to(device)
        scores["output_error"] = output_error(student, teacher, entries)
    if group.main:
        write_text(out / "scores.json", json.dumps(scores, indent=2) + "\n")
    return scores


def _check_comparable(model: str, teacher: str) -> None:
    """Refuse a teacher whose inputs the model does not take."""
    ours, theirs = load_unet_config(model), load_unet_config(teacher)
    for key in ("in_channels", "out_channels", "cross_attention_dim"):
        if ours.get(key) != theirs.get(key):
            raise InputError(
                f"teacher {teacher} and model {model} do not take the same inputs "
                f"({key}: {theirs.get(key)} and {ours.get(key)}); give the teacher that the model was made from"
            )


def score(
    encoder: DualEncoder,
    pictures: Sequence[Path],
    captions: Sequence[str],
    reference: Reference,
    distractors: Sequence[str] = (),
) -> dict[str, Any]:
    """Scores of finished pictures; see `evaluate`.

    Arguments:
        encoder: Gives the features.
        pictures: N PNGs.
        captions: Their N captions.
        reference: Real pictures.
        distractors: Captions that join those of pictures and reference in the pool of the retrieval.
    """
    images = encoder.image_features([open_picture(path) for path in pictures])
    names = list(dict.fromkeys([*captions, *reference.captions, *distractors]))
    pool = dict(zip(names, encoder.text_features(names), strict=True))
    among = min(RETRIEVAL_AMONG, len(pool))
    texts = encoder.text_features(captions)
    return {
        "pictures": len(pictures),
        "frechet_distance": frechet_distance(images, reference.features),
        "clip_score": clip_score(images, texts),
        "retrieval_r1": retrieval_r1(images, captions, pool, among),
        "retrieval_among": among,
        "reference": {
            "pictures": len(reference.captions),
            "clip_score": clip_score(reference.features, encoder.text_features(reference.captions)),
            "retrieval_r1": retrieval_r1(reference.features, reference.captions, pool, among),
        },
    }


def _generation(options: EvaluateOptions, prompts: list[str], out: Path) -> GenerateOptions:
    shared = ("model", "images_per_prompt", "steps", "guidance", "seed", "batch_size", "precision", "device")
    return GenerateOptions(
        out=str(out / "pictures"), prompt=prompts, **{name: getattr(options, name) for name in shared}
    )
