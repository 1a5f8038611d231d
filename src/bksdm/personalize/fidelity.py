"""`bksdm fidelity`: how well personalised models draw their subject, and what a prompt asks of it.

The measures of DreamBooth (arXiv 2208.12242, section 4.2): the mean cosine similarity of a picture's features with
those of the real pictures of the subject (CLIP-I, and DINO), and with those of the prompt in which the subject's kind
stands in its place (CLIP-T). Every model draws the same prompts from the same seeds.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from PIL import Image, ImageOps
from torch import Tensor

from bksdm.common.devices import choose_device
from bksdm.common.errors import InputError
from bksdm.common.runs import check_free, digest, files_digest, open_run, provenance, write_text
from bksdm.common.tables import aligned
from bksdm.data.names import list_pictures
from bksdm.data.pictures import Captioned
from bksdm.data.prompts import read_prompts
from bksdm.evaluate.dino import Dino
from bksdm.evaluate.encoder import DualEncoder, cosine
from bksdm.evaluate.scores import Resampling, differences, mean_of
from bksdm.evaluate.sources import check_not_flagged, named
from bksdm.evaluate.table import cell
from bksdm.generate.run import generate
from bksdm.generate.sampling import side_by_side
from bksdm.models.drawing import drawings, say_unlike
from bksdm.options.generate import GenerateOptions
from bksdm.options.personalize import FidelityOptions
from bksdm.personalize.subject import read_subject

TITLES = {"dino": "subject, DINO", "clip_i": "subject, CLIP-I", "clip_t": "prompt, CLIP-T"}
_PLACE = "{subject}"
_MAY_CHANGE = ("models", "batch_size", "device", "resamples", "json")
_GRID = 8  # prompts


@dataclass(frozen=True)
class Subject:
    """What is drawn, and in which words.

    Attributes:
        words: For the subject, the identifier among them.
        kind: For its kind.
        images: Folder of its pictures.
    """

    words: str
    kind: str
    images: str


@dataclass(frozen=True)
class Drawn:
    """A model, and the LoRA on it."""

    model: str
    lora: str | None


def fidelity(options: FidelityOptions) -> dict[str, Any]:
    """Draw, compare, and write `fidelity.json` and `grid.png`.

    Returns:
        What `fidelity.json` holds: under `models` each one's `scores`, name -> `value`, `deviation`, `low` and `high`;
        under `differences`, for every two models and every score, whether they differ by more than chance (`real`).

    Raises:
        InputError: An option, a model, or a file is unfit; see the message.
    """
    _check(options)
    models = {name: _drawn(model) for name, model in named(options.models).items()}
    ways = drawings({name: drawn.model for name, drawn in models.items()}, options.steps, options.guidance)
    say_unlike(ways)
    subject = _subject(options)
    real = list(read_subject(subject.images).values())
    prompts = _prompts(options)
    out, device = Path(options.out), choose_device(options.device)
    settings = dataclasses.asdict(options) | {
        "subject_words": subject.words,
        "images_content": files_digest(list_pictures(Path(subject.images))),
        "prompts_content": digest(prompts),
    }
    check_free(out, "fidelity", settings, _MAY_CHANGE)
    encoder = DualEncoder.load(options.encoder).to(device)
    dino = Dino.load(options.dino, device) if options.dino else None
    open_run(out, "fidelity", settings, _MAY_CHANGE, {"device": str(device)})

    own = [prompt.replace(_PLACE, subject.words) for prompt in prompts]
    plain = encoder.text_features([prompt.replace(_PLACE, subject.kind) for prompt in prompts])
    units = [number for number in range(len(prompts)) for _ in range(options.images_per_prompt)]
    resampling = Resampling.of(units, options.resamples, 0, options.images_per_prompt)
    estimates, first = {}, []
    for name, drawn in models.items():
        pictures = _draw(options, name, drawn, own)
        features = encoder.image_features(pictures)
        values: dict[str, Tensor] = {}
        if dino:
            values["dino"] = cosine(dino.image_features(pictures), dino.image_features(real)).mean(dim=1)
        values["clip_i"] = cosine(features, encoder.image_features(real)).mean(dim=1)
        values["clip_t"] = cosine(features, plain)[range(len(units)), units]
        estimates[name] = {key: resampling.estimate(mean_of(value.double().cpu())) for key, value in values.items()}
        first.append(pictures[:: options.images_per_prompt][:_GRID])
    _write_grid(real, first, out / "grid.png")
    result = {
        "models": {
            name: {
                **dataclasses.asdict(drawn),
                **dataclasses.asdict(ways[name]),
                "scores": {key: e.to_dict() for key, e in estimates[name].items()},
            }
            for name, drawn in models.items()
        },
        "differences": [difference.to_dict() for difference in differences(estimates, list(TITLES))],
        "subject": dataclasses.asdict(subject),
        "prompts": prompts,
        "encoder": options.encoder,
        "dino": options.dino,
        "made_by": provenance(),
    }
    write_text(out / "fidelity.json", json.dumps(result, indent=2) + "\n")
    return result


def text_table(result: Mapping[str, Any]) -> str:
    """One line a model, each score with half its 95 % interval."""
    scores = [key for key in TITLES if any(key in model["scores"] for model in result["models"].values())]
    rows = [["model", *(TITLES[key] for key in scores)]]
    rows += [[name, *(cell(model["scores"][key]) for key in scores)] for name, model in result["models"].items()]
    return aligned(rows)


def _check(options: FidelityOptions) -> None:
    if not options.models:
        raise InputError("no model is given; give one or several")
    for name in ("images_per_prompt", "steps", "batch_size"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}; give at least 1")
    if options.resamples < 0:
        raise InputError(f"resamples is {options.resamples}; give 0 or more")


def _prompts(options: FidelityOptions) -> list[str]:
    prompts = read_prompts(options.prompts)
    for prompt in prompts:
        if _PLACE not in prompt:
            raise InputError(f"prompts {options.prompts} has {prompt!r} without {_PLACE}, which stands for the subject")
    return prompts


def _drawn(model: str) -> Drawn:
    """What draws: of a run, what it learnt."""
    run = _run(model)
    if run is None:
        return Drawn(model, None)
    made = Path(model) / ("lora" if run["lora"] else "model")
    if not made.is_dir():
        raise InputError(f"run {model} is not finished; run its command again first")
    return Drawn(run["model"], str(made)) if run["lora"] else Drawn(str(made), None)


def _run(folder: str) -> dict[str, Any] | None:
    """The options of a run of `bksdm personalize`; None for anything else."""
    config = Path(folder) / "config.yaml"
    if not config.is_file():
        return None
    try:
        values = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        return None
    return values if isinstance(values, dict) and values.get("verb") == "personalize" else None


def _subject(options: FidelityOptions) -> Subject:
    runs = [run for model in named(options.models).values() if (run := _run(model))]
    first = runs[0] if runs else {}
    for name, given in (("images", options.images), ("subject", options.subject)):
        if not (given or runs):
            raise InputError(f"none of the models is a run of bksdm personalize; give --{name}")
    words = options.subject or _from_identifier(first["prompt"], first["identifier"])
    identifier = first.get("identifier")
    kind = options.kind or " ".join(word for word in words.split() if word != identifier)
    return Subject(words, kind, options.images or first["images"])


def _from_identifier(prompt: str, identifier: str) -> str:
    words = prompt.split()
    return " ".join(words[words.index(identifier) :]).partition(",")[0]


def _draw(options: FidelityOptions, name: str, drawn: Drawn, prompts: list[str]) -> list[Image.Image]:
    paths = generate(
        GenerateOptions(
            drawn.model,
            str(Path(options.out) / "pictures" / name),
            prompt=prompts,
            images_per_prompt=options.images_per_prompt,
            steps=options.steps,
            guidance=options.guidance,
            seed=options.seed,
            batch_size=options.batch_size,
            lora=drawn.lora,
            runtime="torch",
            device=options.device,
        )
    )
    pictures = [Captioned(path, "") for path in paths]
    check_not_flagged(pictures, f"model {drawn.model}")
    return [picture.open() for picture in pictures]


def _write_grid(real: list[Image.Image], rows: list[list[Image.Image]], file: Path) -> None:
    """The real pictures, and below them a row a model, a column a prompt."""
    size = rows[0][0].size
    side_by_side([[ImageOps.fit(picture, size) for picture in real[: len(rows[0])]], *rows]).save(file)
