"""Which blocks of a teacher survive: data, and what follows from it.

A recipe names the layers that stay in the stages of a U-Net, and the transformer layers that stay
in their attentions; or the blocks that stay of a transformer. Together with a teacher's config it
determines everything else (`Pruning`): the student's config, where each student weight comes from,
which features are matched in retraining, and what was removed.

Source: BK-SDM, arXiv 2305.15798, section 3.1.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from bksdm.common.assets import asset
from bksdm.common.errors import InputError

if TYPE_CHECKING:
    from bksdm.options.distill import Taps

Config = Mapping[str, Any]
Layers = tuple[tuple[int, ...], ...] | tuple[int, ...] | Literal["all"]
Depth = tuple[int, ...] | Literal["all"]
Transformers = tuple[Depth | tuple[Depth, ...], ...] | Depth
Middle = tuple[int, ...] | Literal["resnet"] | bool
Blocks = tuple[int, ...] | int | str


@dataclass(frozen=True)
class Recipe:
    """Which blocks stay.

    A layer is a ResNet block with the attention that follows it, and an attention consists of one
    transformer layer or more, one after the other. Both are counted from 0 in the order in which the
    data passes them; -1 is the last.

    Attributes:
        name: What the student is called.
        summary: One sentence for people.
        down: Layers that stay in a down stage: "all", the same for every stage, or one tuple a stage,
            outermost first.
        up: Layers that stay in an up stage; likewise, outermost stage first.
        mid: Whether the middle block stays; "resnet" if nothing of it but its first ResNet does, or the
            transformer layers that stay in its attention.
        drop_innermost: How many of the innermost stages go, down and up.
        down_transformers: Transformer layers that stay in the attentions of the down stages: "all", the same for
            every attention, or one entry a stage, outermost first, each of which may be one entry an attention
            that stays.
        up_transformers: Those of the up stages; likewise.
        blocks: Of a transformer, the blocks that stay in each of its stacks: "all", how many or which share of them
            (such as "1/2", rounded up) by the regular pattern of `stack.structure`, or their numbers, counted from 0
            in the order in which the data passes them, -1 the last; or pairs of the path of a stack, such as
            "transformer_blocks", and what stays of it, where stacks that are not named stay whole.
    """

    name: str
    down: Layers = "all"
    up: Layers = "all"
    mid: Middle = True
    drop_innermost: int = 0
    summary: str = field(default="", compare=False)
    down_transformers: Transformers = "all"
    up_transformers: Transformers = "all"
    blocks: Blocks | tuple[tuple[str, Blocks], ...] = "all"

    @property
    def of_unet(self) -> list[str]:
        """What it says of a U-Net, by name."""
        usual = {item.name: item.default for item in fields(self)}
        return [key for key in _OF_UNET if getattr(self, key) != usual[key]]

    def down_layers(self, stage: int, available: int) -> tuple[int, ...]:
        """Layers that stay in a down stage of `available` layers, as the recipe writes them."""
        return _of_stage(self.down, stage, available)

    def up_layers(self, stage: int, available: int) -> tuple[int, ...]:
        """Layers that stay in the up stage of that width, as the recipe writes them."""
        return _of_stage(self.up, stage, available)

    def blocks_of(self, stacks: tuple[str, ...]) -> dict[str, Blocks]:
        """What is said of the stacks of a transformer, by their paths; of these, where it is said of all alike."""
        said: Any = self.blocks
        return dict(said) if _is_pairs(said) else dict.fromkeys(stacks, said)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as in a YAML file; of the transformer layers only where some go."""
        if self.blocks != "all":
            by_stack = {key: _lists(value) for key, value in self.blocks_of(()).items()}
            return {"name": self.name, "summary": self.summary, "blocks": by_stack or _lists(self.blocks)}
        depths = {"down_transformers": self.down_transformers, "up_transformers": self.up_transformers}
        return {
            "name": self.name,
            "summary": self.summary,
            "down": _lists(self.down),
            "up": _lists(self.up),
            "mid": _lists(self.mid),
            "drop_innermost": self.drop_innermost,
            **{key: _lists(value) for key, value in depths.items() if value != "all"},
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
        recipe = cls(**checked)
        if recipe.blocks != "all" and recipe.of_unet:
            raise InputError(
                f"recipe {source} says blocks, of a transformer, and {recipe.of_unet[0]}, of a U-Net; write one of them"
            )
        return recipe


@dataclass(frozen=True)
class Tap:
    """Two modules, by dotted path, whose outputs are matched in retraining."""

    teacher: str
    student: str


@dataclass(frozen=True)
class Stage:
    """One stage of a U-Net, or one stack of a transformer, for people: which of the teacher's layers stay.

    Attributes:
        name: Path in the teacher, such as "down_blocks.0".
        channels: Width.
        layers: For every layer of the teacher, what it consists of and whether it stays: "R", "RA", or with an
            attention of ten transformer layers "RA10", of which four stay "RA4/10"; "B" of a transformer.
    """

    name: str
    channels: int
    layers: tuple[tuple[str, bool], ...]

    @property
    def kinds(self) -> tuple[str, ...]:
        """What its layers consist of."""
        return tuple(kinds for kinds, _ in self.layers)


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
        down: Down stages of a U-Net, outermost first.
        up: Its up stages, outermost first.
        mid: Its middle block as a stage, or None where the teacher has none.
        stacks: Stacks of a transformer, in the order of the data.
        attention_taps: Pairs of self-attentions, of all layers that stay.
        layer_taps: Pairs of ResNet blocks, of attentions and of middle blocks, likewise.
    """

    recipe: Recipe
    student_config: dict[str, Any]
    key_map: dict[str, str]
    taps: tuple[Tap, ...]
    removed: tuple[str, ...]
    down: tuple[Stage, ...] = ()
    up: tuple[Stage, ...] = ()
    mid: Stage | None = None
    stacks: tuple[Stage, ...] = ()
    attention_taps: tuple[Tap, ...] = ()
    layer_taps: tuple[Tap, ...] = ()

    def chosen_taps(self, taps: "Taps") -> tuple[Tap, ...]:
        """The pairs of modules that an option names.

        Raises:
            InputError: It names self-attentions, and none stays.
        """
        if taps in ("stages", "layers"):
            return self.taps if taps == "stages" else self.layer_taps
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
    """A recipe by its name (`base`, `small`, `half`) or from a YAML file.

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


def unfit(recipe: Recipe, reason: str) -> InputError:
    """The refusal of a recipe that a teacher cannot satisfy."""
    return InputError(f"recipe {recipe.name!r} does not fit this teacher: {reason}")


def kept_numbers(recipe: Recipe, path: str, numbers: tuple[int, ...], available: int, noun: str) -> tuple[int, ...]:
    """Numbers of what stays of so many layers, as a recipe writes them, counted from 0 in ascending order.

    Raises:
        InputError: There is no such one, or they are not in order, or one of them is named twice.
    """
    for number in numbers:
        if not -available <= number < available:
            raise unfit(recipe, f"it keeps {noun} {number} of {path}, which has {available} {noun}s")
    found = tuple(number % available for number in numbers)
    if list(found) != sorted(set(found)):
        raise unfit(
            recipe, f"it keeps {noun}s {list(numbers)} of {path}, which has {available}; name each once, in order"
        )
    return found


def _prefixes(path: str) -> Iterator[str]:
    """A dotted path and the paths around it, the longest first."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        yield ".".join(parts[:length])


def _of_stage(layers: Layers, stage: int, available: int) -> tuple[int, ...]:
    if layers == "all":
        return tuple(range(available))
    return layers[stage] if isinstance(layers[0], tuple) else layers


def of_attentions(transformers: Transformers, stage: int, attentions: int) -> tuple[Depth, ...]:
    """What is said of each attention that stays in a stage: of as many as stay, or as many as are named."""
    own: Any = transformers[stage] if each_stage(transformers) else transformers
    found: tuple[Depth, ...] = (own,) * attentions if _is_one(own) else own
    return found


def each_stage(transformers: Transformers) -> bool:
    """Whether there is one entry a stage."""
    return not _is_one(transformers)


def _is_one(value: Any) -> bool:
    return value == "all" or isinstance(value[0], int)


def _lists(value: Any) -> Any:
    return [_lists(item) for item in value] if isinstance(value, tuple) else value


def _is_pairs(blocks: Any) -> bool:
    return isinstance(blocks, tuple) and isinstance(blocks[0], tuple)


def _check(key: str, value: object, source: str) -> Any:
    check, words = _KEYS[key]
    found = check(value)
    if found is None:
        raise InputError(f"recipe {source}: {key} is {value!r}; write {words}")
    return found


def _layers(value: object) -> Layers | None:
    return _depth(value) or _each(value, lambda stage: None if stage == "all" else _depth(stage))


def _transformers(value: object) -> Transformers | None:
    return _depth(value) or _each(value, lambda stage: _depth(stage) or _each(stage, _depth))


def _middle(value: object) -> Middle | None:
    if isinstance(value, bool):
        return value
    if value == "resnet":
        return "resnet"
    return tuple(value) if _integers(value) else None  # type: ignore[arg-type]


def _blocks(value: object) -> Any:
    if not isinstance(value, dict):
        return _of_stack(value)
    found = tuple((key, _of_stack(each)) for key, each in value.items() if isinstance(key, str))
    return found if len(found) == len(value) > 0 and all(each is not None for _, each in found) else None


def _of_stack(value: object) -> Blocks | None:
    if type(value) is int:
        return value
    if isinstance(value, str) and _SHARE.fullmatch(value):
        return value if 0 < Fraction(value) < 1 else None
    return _depth(value)


def _depth(value: object) -> Depth | None:
    if value == "all":
        return "all"
    return tuple(value) if _integers(value) else None  # type: ignore[arg-type]


def _each(value: object, check: Callable[[object], Any]) -> tuple[Any, ...] | None:
    """What `check` makes of every entry of a list; None where it is no list, empty, or has one that is refused."""
    found = tuple(check(item) for item in value) if isinstance(value, list) else ()
    return found if found and None not in found else None


def _integers(value: object) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(type(item) is int for item in value)


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


_SHARE = re.compile(r"\d{1,3}/[1-9]\d{0,2}")
_OF_UNET = ("down", "up", "mid", "drop_innermost", "down_transformers", "up_transformers")
_THOSE_THAT_STAY = "all, or the layers that stay, such as [0, -1], or such a list for every stage"
_TRANSFORMERS = "all, or the transformer layers that stay, such as [0, 1], or such an entry for every stage"
_KEYS: dict[str, tuple[Callable[[object], Any], str]] = {
    "name": (_text, "a text"),
    "summary": (_text, "a text"),
    "down": (_layers, _THOSE_THAT_STAY),
    "up": (_layers, _THOSE_THAT_STAY),
    "mid": (_middle, "true or false, resnet, or the transformer layers that stay, such as [0, 1]"),
    "drop_innermost": (lambda value: value if type(value) is int else None, "a whole number"),
    "down_transformers": (_transformers, _TRANSFORMERS),
    "up_transformers": (_transformers, _TRANSFORMERS),
    "blocks": (_blocks, "all, a number or a share such as 1/2, those that stay such as [0, -1], or these by stack"),
}
