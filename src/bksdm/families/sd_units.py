"""What the U-Net of Stable Diffusion 1.x and 2.x can lose: layers, the middle block, the innermost stages.

Skip connections decide which layers go together. Down layer j of a stage writes its skip connection j + 1, number 0
comes from the stage outside, and layer k of the L + 1 in the up stage reads number L - k. A down layer that is
bypassed repeats the skip connection before its own. So layers go together if the up layers that stay read each
skip connection of the student once, in order: then the teacher with bypassed layers *is* the pruned student.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, product
from typing import Literal

from bksdm.errors import InputError
from bksdm.families.sd_unet import UNetShape, derive, difference, layer_paths
from bksdm.families.units import Names, Removals, Unit
from bksdm.recipe import Config, Recipe

_MID = "mid_block"
_Layers = tuple[int, ...]


def units(config: Config) -> tuple[Unit, ...]:
    """The units of the U-Net with this config, down, middle and up; those that no recipe removes are among them."""
    shape = UNetShape.of(config)
    down = [unit for stage in range(shape.stages) for unit in _layer_units(shape, stage, "down")]
    mid = [Unit(_MID, "mid", (_MID,))] if shape.has_mid else []
    innermost = [Unit(_innermost(n), "innermost", tuple(_stage_paths(shape, n))) for n in _droppable(shape)]
    up = [unit for stage in reversed(range(shape.stages)) for unit in _layer_units(shape, stage, "up")]
    return (*down, *mid, *innermost, *up)


def removals(config: Config) -> Iterator[Removals]:
    """All that recipes for this U-Net can remove, if every kept layer is to find what it finds in the teacher."""
    shape = UNetShape.of(config)
    for dropped in (0, *_droppable(shape)):
        stages = range(shape.stages - dropped)
        groups = tuple((frozenset[str](), *_stage_removals(shape, stage)) for stage in stages)
        for mid in [frozenset[str](), frozenset([_MID])] if shape.has_mid else [frozenset[str]()]:
            always = mid | ({_innermost(dropped)} if dropped else frozenset())
            if _derives(recipe_without(config, always, "frame"), config):
                yield Removals(always, groups)


def recipes_between(teacher: Config, student: Config, name: str) -> Iterator[Recipe]:
    """The recipes that make a U-Net with the student's config out of one with the teacher's."""
    whole, part = UNetShape.of(teacher), UNetShape.of(student)
    stages, dropped = range(part.stages), whole.stages - part.stages
    frame = Recipe(name, mid=part.has_mid or not whole.has_mid, drop_innermost=dropped)
    if dropped < 0 or not _derives(frame, teacher):
        return
    for chosen in product(*(_stage_choices(frame, teacher, stage, part.layers[stage]) for stage in stages)):
        recipe = replace(frame, down=tuple(down for down, _ in chosen), up=tuple(up for _, up in chosen))
        if difference(derive(recipe, teacher).student_config, student) is None:
            yield recipe


def _stage_choices(frame: Recipe, teacher: Config, stage: int, layers: int) -> list[tuple[_Layers, _Layers]]:
    """Layers that a stage can keep, down and up, so that it has this many and one more; the others stay whole."""
    whole = UNetShape.of(teacher)
    counts = whole.layers[: whole.stages - frame.drop_innermost]
    found = []
    for down in combinations(range(counts[stage]), layers):
        for up in combinations(range(counts[stage] + 1), layers + 1):
            kept = [(tuple(range(count)), tuple(range(count + 1))) for count in counts]
            kept[stage] = down, up
            recipe = replace(frame, down=tuple(one for one, _ in kept), up=tuple(other for _, other in kept))
            if _derives(recipe, teacher):
                found.append((down, up))
    return found


def recipe_without(config: Config, names: Names, name: str, summary: str = "") -> Recipe:
    """The recipe that removes the units with these names and keeps all else."""
    shape = UNetShape.of(config)
    dropped = next((n for n in _droppable(shape) if _innermost(n) in names), 0)
    stages = range(shape.stages - dropped)
    return Recipe(
        name=name,
        down=tuple(_kept(names, _down_path(stage), shape.layers[stage]) for stage in stages),
        up=tuple(_kept(names, shape.up_path(stage), shape.layers[stage] + 1) for stage in stages),
        mid=_MID not in names,
        drop_innermost=dropped,
        summary=summary,
    )


def _kept(names: Names, path: str, available: int) -> _Layers:
    return tuple(layer for layer in range(available) if _layer(path, layer) not in names)


def _derives(recipe: Recipe, config: Config) -> bool:
    try:
        derive(recipe, config)
    except InputError:
        return False
    return True


def _layer_units(shape: UNetShape, stage: int, kind: Literal["down", "up"]) -> Iterator[Unit]:
    """The layers of a down stage, or of the up stage of its width."""
    down = kind == "down"
    path, passes = (_down_path(stage), _passes_down) if down else (shape.up_path(stage), _passes_up)
    attends = (shape.attends_down if down else shape.attends_up)[stage]
    removable = {layer for choice in _choices(shape, stage) for layer in choice[0 if down else 1]}
    for layer in range(shape.layers[stage] + (0 if down else 1)):
        fits = passes(shape, stage, layer)
        stays = "" if layer in removable else _why(shape, stage, fits)
        yield Unit(_layer(path, layer), kind, tuple(layer_paths(path, layer, attends)), not fits, stays)


def _why(shape: UNetShape, stage: int, fits: bool) -> str:
    if not fits:
        return "the hidden states change their channels there"
    if shape.layers[stage] == 1:
        return "a stage keeps one layer down and two up"
    return "no layer that can go with it would leave its skip connection to another"


def _stage_removals(shape: UNetShape, stage: int) -> Iterator[Names]:
    down, up = _down_path(stage), shape.up_path(stage)
    for gone_down, gone_up in _choices(shape, stage):
        yield frozenset([*(_layer(down, layer) for layer in gone_down), *(_layer(up, layer) for layer in gone_up)])


def _choices(shape: UNetShape, stage: int) -> Iterator[tuple[_Layers, _Layers]]:
    """Layers that a down stage and its up stage can lose together, as many of one as of the other."""
    count = shape.layers[stage]
    down = [layer for layer in range(count) if _passes_down(shape, stage, layer)]
    up = [layer for layer in range(count + 1) if _passes_up(shape, stage, layer)]
    for number in range(1, count):  # one down layer stays
        for gone_down in combinations(down, number):
            for gone_up in combinations(up, number):
                if _in_order(count, gone_down, gone_up):
                    yield gone_down, gone_up


def _in_order(count: int, gone_down: _Layers, gone_up: _Layers) -> bool:
    """Whether the up layers that stay read each skip connection that is left once, innermost first."""
    left = [0, *(layer + 1 for layer in range(count) if layer not in gone_down)]
    read = [max(n for n in left if n <= count - layer) for layer in range(count + 1) if layer not in gone_up]
    return read == left[::-1]


def _passes_down(shape: UNetShape, stage: int, layer: int) -> bool:
    takes, gives = shape.down_channels(stage, layer)
    return takes == gives


def _passes_up(shape: UNetShape, stage: int, layer: int) -> bool:
    return shape.up_hidden(stage, layer) == shape.widths[stage]


def _droppable(shape: UNetShape) -> list[int]:
    """How many of the innermost stages can go while what is around them still fits: those of one width."""
    return [n for n in range(1, shape.stages) if len(set(shape.widths[-1 - n :])) == 1]


def _stage_paths(shape: UNetShape, dropped: int) -> Iterator[str]:
    """Modules that go with the innermost stages: also the samplers that led to them."""
    first = shape.stages - dropped
    yield f"{_down_path(first - 1)}.downsamplers"
    for stage in range(first, shape.stages):
        yield from (_down_path(stage), shape.up_path(stage))


def _innermost(count: int) -> str:
    return "innermost stage" if count == 1 else f"innermost {count} stages"


def _down_path(stage: int) -> str:
    return f"down_blocks.{stage}"


def _layer(path: str, layer: int) -> str:
    return f"{path} layer {layer}"
