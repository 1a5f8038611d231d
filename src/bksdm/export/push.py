"""`bksdm push`: a model to the Hugging Face Hub, by way of a folder in which everything can be looked at first.

The folder holds the pipeline, its recipe and a card. Records of the making that name paths and commands of a machine
stay behind; the card says what matters of them.
"""

import dataclasses
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi, ModelCard, hf_hub_download

from bksdm.common.assets import EMBEDDED, asset
from bksdm.common.errors import InputError, one_line
from bksdm.common.hub import hub_errors
from bksdm.common.runs import replace_folder, write_text
from bksdm.evaluate.scores import KINDS
from bksdm.evaluate.table import cell
from bksdm.models.adapters.kinds import LORA_FILE
from bksdm.models.folders import check_folder
from bksdm.models.parts import PAPERS
from bksdm.options.export import PushOptions

_CARD = "README.md"
_STAY = ("config.yaml", "provenance.json", "training.json", "retraining.json")
_TEXTS = (".json", ".txt", ".md", ".yaml", ".jinja")
_KINDS = (*_TEXTS, ".safetensors", ".png", ".model")
_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_PATHS = re.compile(r"(?<![\w/.:-])(/(?:home|root|Users|tmp|mnt|work|data)/[^\s`\"')]*|[A-Z]:\\[^\s`\"')]*)")


@dataclass(frozen=True)
class Pushed:
    """What was written, and where it went.

    Attributes:
        repo: Name on the Hub.
        folder: What is, or would be, uploaded.
        files: Its files with their sizes in bytes.
        license: As the card has it.
        url: Of the commit; None for a dry run.
    """

    repo: str
    folder: Path
    files: dict[str, int]
    license: str
    url: str | None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"folder": str(self.folder)}

    def text(self) -> str:
        lines = [f"{size / 2**20:9.2f} MiB  {name}" for name, size in self.files.items()]
        end = f"uploaded: {self.url}" if self.url else f"nothing uploaded; look at {self.folder}/{_CARD}"
        return "\n".join([*lines, f"licence {self.license}", end])


def push(options: PushOptions) -> Pushed:
    """Write what is to be uploaded, check it, and upload it.

    Raises:
        InputError: The model is no whole pipeline, its licence is not known, a file names paths of this machine, or the
            Hub refuses or cannot be reached; the folder stays.
    """
    if not _NAME.fullmatch(options.repo):
        raise InputError(f"repo {options.repo!r} is no name on the Hub, such as you/small-sd")
    source, out = Path(options.model), Path(options.out)
    is_lora = (source / LORA_FILE).is_file()
    if not is_lora:
        if not source.is_dir():
            raise InputError(f"model {options.model} is not a folder; give one that bksdm wrote")
        check_folder(source)
    if not (source / _CARD).is_file():
        raise InputError(f"{source} has no {_CARD}; give a folder that bksdm prune, distill, lcm or personalize wrote")
    _check_free(out, source)
    card, license_name = _card(options, source)
    try:
        with replace_folder(out) as partial:
            shutil.copytree(source, partial, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*_STAY, ".*"))
            write_text(partial / _CARD, card)
            for config in (*partial.glob("*.json"), *partial.glob("*/*config.json")):
                _forget_origin(config)
            _check(partial)
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror or error}; choose another --out") from error
    files = {str(path.relative_to(out)): path.stat().st_size for path in sorted(out.rglob("*")) if path.is_file()}
    url = None if options.dry_run else _upload(options, out)
    return Pushed(options.repo, out, files, license_name, url)


def _check_free(out: Path, source: Path) -> None:
    if out.resolve() == source.resolve() or source.resolve() in out.resolve().parents:
        raise InputError(f"out is {out}, in the model's own folder; name another")
    ours = (
        out.is_dir() and (out / _CARD).is_file() and (out / "model_index.json").is_file() | (out / LORA_FILE).is_file()
    )
    if out.exists() and not ours and (out.is_file() or any(out.iterdir())):
        raise InputError(f"{out} is not empty and holds nothing that bksdm push wrote; choose another --out")


def _card(options: PushOptions, source: Path) -> tuple[str, str]:
    """The model's own card with what others need to know of it, and the licence."""
    card = ModelCard.load(source / _CARD, ignore_metadata_errors=True)
    config = _run_config(source)
    teacher = options.teacher or config.get("teacher") or config.get("model")
    own = getattr(card.data, "license", None)
    chosen = options.license or own or (_license_of(str(teacher)) if teacher else None)
    if chosen is None:
        raise InputError(
            f"the licence of {teacher or options.model} is not known, and holds for this model too; give --license, "
            f"such as creativeml-openrail-m for Stable Diffusion 1.x"
        )
    card.data.license = chosen
    if teacher and "/" in str(teacher) and not Path(str(teacher)).exists():
        card.data.base_model = str(teacher)
    data = options.data or config.get("data") or config.get("images")
    sections = []
    if data:
        sections.append(f"## Training data\n\n{_shown(str(data))}")
    if options.scores:
        sections.append(f"## Scores\n\n{_scores(Path(options.scores), source)}")
    body = card.text.rstrip()
    for name in (teacher, config.get("student"), config.get("data")):
        if name and Path(str(name)).is_absolute():
            body = body.replace(str(name), Path(str(name)).name)
    card.text = "\n\n".join([body, *sections]) + "\n"
    return str(card), str(chosen)


def _run_config(source: Path) -> dict[str, Any]:
    """The options of the run that made the model, of its own folder or of the one around it."""
    for folder in (source, source.parent):
        file = folder / "config.yaml"
        if file.is_file():
            try:
                values = yaml.safe_load(file.read_text(encoding="utf-8"))
            except (yaml.YAMLError, UnicodeDecodeError):
                continue
            if isinstance(values, dict):
                return values
    return {}


def _license_of(teacher: str) -> str | None:
    """What the teacher's card names."""
    if teacher in EMBEDDED:
        file = asset(teacher, "model", _CARD)
    elif Path(teacher).is_dir():
        file = Path(teacher) / _CARD
    else:
        try:
            file = Path(hf_hub_download(teacher, _CARD))
        except hub_errors(OSError):
            return None
    if not file.is_file():
        return None
    found = getattr(ModelCard.load(file, ignore_metadata_errors=True).data, "license", None)
    return None if found is None else str(found)


def _scores(file: Path, source: Path) -> str:
    """The line of the model in a `scores.json`, with half of each 95 % interval."""
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
        models: Mapping[str, Any] = result["models"]
        protocol = result["protocol"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"scores {file} is no scores.json of bksdm evaluate") from error
    rows, told = [], {}
    for name, model in models.items():
        if Path(str(model.get("model"))).resolve() == source.resolve() or name == source.name:
            told = {**protocol, **model}
            rows += [f"| {KINDS[score].title} | {cell(values)} |" for score, values in model["scores"].items()]
    if not rows:
        raise InputError(f"scores {file} has none of {source}; it has {', '.join(models)}")
    how = ", ".join(f"{key} {_shown(str(told.get(key)))}" for key in ("reference", "steps", "guidance", "features"))
    return "\n".join([f"Half a 95 % interval after each; {how}.", "", "| score | |", "|---|---|", *rows])


def _shown(name: str) -> str:
    """A name without where on this machine it lies."""
    return Path(name).name if Path(name).is_absolute() else name


def _forget_origin(config: Path) -> None:
    """diffusers and transformers write into a config from which folder it was loaded."""
    values = json.loads(config.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        return
    own = [name for name in ("_name_or_path", "name_or_path") if name[0] == "_" or _PATHS.search(str(values.get(name)))]
    if any(name in values for name in own):
        write_text(config, json.dumps({name: values[name] for name in values if name not in own}, indent=2) + "\n")


def _check(folder: Path) -> None:
    """Refuse files that have no place on the Hub, or that tell of this machine."""
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        name = path.relative_to(folder)
        if path.suffix not in _KINDS and not any(path.match(pattern) for pattern in PAPERS):
            raise InputError(f"{name} is no file of a model ({', '.join(_KINDS)}); take it out of the folder")
        if path.suffix in _TEXTS and (found := _PATHS.search(path.read_text(encoding="utf-8"))):
            raise InputError(
                f"{name} names a path of this machine, {found.group()}; take it out, or give --teacher by name"
            )
    if not (folder / LORA_FILE).is_file():
        check_folder(folder)


def _upload(options: PushOptions, folder: Path) -> str:
    api = HfApi()
    try:
        api.create_repo(options.repo, private=options.private, exist_ok=True)
        return str(api.upload_folder(repo_id=options.repo, folder_path=folder, commit_message="bksdm push"))
    except hub_errors(OSError) as error:
        reason = one_line(error)
        raise InputError(
            f"the Hub did not take {options.repo} ({reason}); what would go there is whole in {folder}: sign in with "
            f"hf auth login, or try again"
        ) from error
