"""Helpers of the tests of the verbs."""

import contextlib
import io
import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from diffusers import DiffusionPipeline
from PIL import Image

from bksdm.cli import main
from bksdm.families.recipe import load_recipe
from bksdm.models.card import model_card
from bksdm.models.pipelines import denoiser, save_pipeline
from bksdm.pruning.describe import describe_config
from bksdm.pruning.inherit import prune_unet, save_student, with_denoiser

BAR = re.compile(r"━|─|\d+/\d+ \d:\d\d:\d\d")


@dataclass(frozen=True)
class Outcome:
    """What a command left: its exit code and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def said(self) -> list[str]:
        """Lines on stderr without progress bars, rules and blank lines."""
        return [line for line in self.err.splitlines() if line.strip() and not BAR.search(line)]

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Outcome]


def saved(pipeline: DiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a pipeline, in a new one that tests share."""
    folder = tmp_path_factory.mktemp("model") / "teacher"
    save_pipeline(pipeline, folder)
    return folder


def make_student(teacher: DiffusionPipeline, folder: Path, recipe: str = "small") -> Path:
    """What `bksdm prune` leaves, but for config.yaml and provenance.json."""
    made, pruning = prune_unet(denoiser(teacher), load_recipe(recipe))
    card = model_card(describe_config(dict(denoiser(teacher).config), pruning.recipe), "teacher")
    save_student(with_denoiser(teacher, made), pruning.recipe, card, folder)
    return folder


def copy_pictures(source: Path, folder: Path, count: int) -> Path:
    """The first few captioned pictures of a folder."""
    folder.mkdir(parents=True)
    lines = (source / "metadata.jsonl").read_text().splitlines()[:count]
    for line in lines:
        name = json.loads(line)["file_name"]
        shutil.copy(source / name, folder / name)
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def captioned(folder: Path, pictures: Sequence[Image.Image] = (), metadata: str | None = None) -> Path:
    """A folder of pictures with the caption red, or with a metadata file of this content."""
    folder.mkdir(parents=True)
    for number, picture in enumerate(pictures):
        picture.save(folder / f"{number}.png")
    lines = [json.dumps({"file_name": f"{number}.png", "text": "red"}) + "\n" for number in range(len(pictures))]
    (folder / "metadata.jsonl").write_text("".join(lines) if metadata is None else metadata)
    return folder


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def told(picture: Path) -> dict[str, Any]:
    """What a PNG that we wrote says of its making."""
    with Image.open(picture) as opened:
        return json.loads(opened.text["bksdm"])


def mtimes(paths: Sequence[Path]) -> list[int]:
    return [path.stat().st_mtime_ns for path in paths]


def done_here(*words: object) -> None:
    """Run a command line that must succeed, where there is no fixture for it; what it says is lost."""
    with contextlib.redirect_stdout(io.StringIO()), pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    assert not stop.value.code
