"""Which blocks of a teacher survive: data, and what follows from it.

A recipe names the layers that stay in the stages of a U-Net. Together with a teacher's config it
determines everything else (`Pruning`): the student's config, where each student weight comes from,
which features are matched in retraining, and what was removed.

Source: BK-SDM, arXiv 2305.15798, section 3.1.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from bksdm.assets import asset
from bksdm.errors import InputError
from bksdm.options import Taps

Config = Mapping[str, Any]
Layers = tuple[tuple[int, ...], ...] | tuple[int, ...] | Literal["all"]


@dataclass(frozen=True)
class Recipe:
    """Which blocks stay.

    A layer is a ResNet block with the attention that follows it. Layers are counted from 0 in the
    order in which the data passes them; -1 is a stage's last.

    Attributes:
        name: What the student is called.
        summary: One sentence for people.
        down: Layers that stay in a down stage: "all", the same for every stage, or one tuple a stage,
            outermost first.
        up: Layers that stay in an up stage; likewise, outermost stage first.
        mid: Whether the middle block stays.
        drop_innermost: How many of the innermost stages go, down and up.
    """

    name: str
    down: Layers = "all"
    up: Layers = "all"
    mid: bool = True
    drop_innermost: int = 0
    summary: str = field(default="", compare=False)

    def down_layers(self, stage: int, available: int) -> tuple[int, ...]:
        """Layers that stay in a down stage of `available` layers, as the recipe writes them."""
        return _of_stage(self.down, stage, available)

    def up_layers(self, stage: int, available: int) -> tuple[int, ...]:
        """Layers that stay in the up stage of that width, as the recipe writes them."""
        return _of_stage(self.up, stage, available)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as in a YAML file."""
        return {
            "name": self.name,
            "summary": self.summary,
            "down": _lists(self.down),
            "up": _lists(self.up),
            "mid": self.mid,
            "drop_innermost": self.drop_innermost,
        }

    @classmethod
    def from_dict(cls, values: object, source: str) -> "Recipe":
        """A recipe from plain values; `source` is named in errors.

        Raises:
            InputError: A key is unknown or missing, or a value has the wrong type.
        """
        if not isinstance(values, dict):
            raise InputError(f"recipe {source} is not a mapping; write lines such as 'down: [0]'")
        known = {item.name for item in fields(cls)}
        unknown = sorted(str(key) for key in values if key not in known)
        if unknown:
            raise InputError(
                f"recipe {source} has the unknown key {unknown[0]!r}; known are {', '.join(sorted(known))}"
            )
        checked = {key: _check(key, value, source) for key, value in values.items()}
        if "name" not in checked:
            raise InputError(f"recipe {source} has no name; add a line 'name: ...'")
        return cls(**checked)


@dataclass(frozen=True)
class Tap:
    """Two modules, by dotted path, whose outputs are matched in retraining."""

    teacher: str
    student: str


@dataclass(frozen=True)
class Stage:
    """One stage of the U-Net for people: which of the teacher's layers stay.

    Attributes:
        name: Path in the teacher, such as "down_blocks.0".
        channels: Width.
        layers: For every layer of the teacher, what it consists of ("RA" or "R") and whether it stays.
    """

    name: str
    channels: int
    layers: tuple[tuple[str, bool], ...]


@dataclass(frozen=True)
class Pruning:
    """What follows from a recipe and a teacher.

    Attributes:
        recipe: The recipe.
        student_config: Config of the student's U-Net.
        key_map: Path prefix in the student -> path prefix in the teacher, for every kept layer and sampler;
            what is not named here has the same path in both.
        taps: Pairs of modules to match, as published: the outputs of the stages.
        removed: Paths of the teacher's modules that go.
        down: Down stages, outermost first.
        up: Up stages, outermost first.
        mid: The middle block as a stage, or None where the teacher has none.
        attention_taps: Pairs of self-attentions, of all layers that stay.
    """

    recipe: Recipe
    student_config: dict[str, Any]
    key_map: dict[str, str]
    taps: tuple[Tap, ...]
    removed: tuple[str, ...]
    down: tuple[Stage, ...]
    up: tuple[Stage, ...]
    mid: Stage | None
    attention_taps: tuple[Tap, ...] = ()

    def chosen_taps(self, taps: Taps) -> tuple[Tap, ...]:
        """The pairs of modules that an option names.

        Raises:
            InputError: It names self-attentions, and none stays.
        """
        if taps == "stages":
            return self.taps
        if not self.attention_taps:
            raise InputError(f"taps is {taps}, and recipe {self.recipe.name!r} leaves no self-attention; give stages")
        return self.attention_taps if taps == "self_attention" else self.taps + self.attention_taps

    def teacher_key(self, student_key: str) -> str:
        """Name of the teacher's parameter that a student's parameter is inherited from."""
        for prefix in _prefixes(student_key):
            if prefix in self.key_map:
                return self.key_map[prefix] + student_key[len(prefix) :]
        return student_key

    def student_key(self, teacher_key: str) -> str | None:
        """Name of the student's parameter, or module, that a teacher's becomes; None where it goes."""
        moved = {there: here for here, there in self.key_map.items()}
        for prefix in _prefixes(teacher_key):
            if prefix in self.removed:
                return None
            if prefix in moved:
                return moved[prefix] + teacher_key[len(prefix) :]
        return teacher_key


def published_recipes() -> list[str]:
    """Names of the recipes that ship with the package."""
    return sorted(file.stem for file in asset("recipes").glob("*.yaml"))


def load_recipe(name: str | Path) -> Recipe:
    """A recipe by its name (`base`, `small`, `tiny`) or from a YAML file.

    Raises:
        InputError: There is no such recipe, or the file is not one.
    """
    path = asset("recipes", f"{name}.yaml") if str(name) in published_recipes() else Path(name)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"unknown recipe {str(name)!r}; give {', '.join(published_recipes())} or the path of a YAML file"
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(f"recipe {name} is not text; give a YAML file") from error
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"recipe {name} is not YAML ({' '.join(str(error).split())})") from error
    return Recipe.from_dict(values, str(name))


def _prefixes(path: str) -> Iterator[str]:
    """A dotted path and the paths around it, the longest first."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        yield ".".join(parts[:length])


def _of_stage(layers: Layers, stage: int, available: int) -> tuple[int, ...]:
    if layers == "all":
        return tuple(range(available))
    return layers[stage] if isinstance(layers[0], tuple) else layers


def _lists(layers: Layers) -> list[Any] | str:
    return layers if layers == "all" else [list(item) if isinstance(item, tuple) else item for item in layers]


def _check(key: str, value: object, source: str) -> Any:
    wanted = {
        "mid": (bool, "true or false"),
        "drop_innermost": (int, "a whole number"),
        "name": (str, "a text"),
        "summary": (str, "a text"),
    }
    if key in wanted:
        kind, words = wanted[key]
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise InputError(f"recipe {source}: {key} is {value!r}; write {words}")
        return value
    if value == "all":
        return value
    if _integers(value):
        return tuple(value)  # type: ignore[arg-type]
    if isinstance(value, list) and value and all(_integers(item) for item in value):
        return tuple(tuple(item) for item in value)
    raise InputError(f"recipe {source}: {key} is {value!r}; write all, or the layers that stay, such as [0, -1]")


def _integers(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(item, int) and not isinstance(item, bool) for item in value)
    )
