"""What the U-Net of Stable Diffusion or SDXL can lose: layers, the middle block, the innermost stages.

Skip connections decide which layers go together. Down layer j of a stage writes its skip connection j + 1, number 0
comes from the stage outside, and layer k of the L + 1 in the up stage reads number L - k. A down layer that is
bypassed repeats the skip connection before its own. So layers go together if the up layers that stay read each
skip connection of the student once, in order: then the teacher with bypassed layers *is* the pruned student.

Where an attention holds several transformer layers, each of them is a unit too, and all but one can go, whatever
else does. The middle block alone has to stay as deep as the innermost stage's first attention, for a config says both
in one; or it loses its attention whole, with the ResNet behind it.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, product
from typing import Literal

from bksdm.common.errors import InputError
from bksdm.families.recipe import Config, Depth, Middle, Recipe, Transformers
from bksdm.families.unet import depth
from bksdm.families.unet.structure import MID_BEHIND_RESNET, UNetShape, derive, difference, layer_paths
from bksdm.families.units import Kind, Names, Removals, Unit

_MID, _MID_ATTENTION = "mid_block", "mid_block attention"
_Layers = tuple[int, ...]
_Blocks = tuple[str, ...]


def units(config: Config) -> tuple[Unit, ...]:
    """The units of the U-Net with this config, down, middle and up; those that no recipe removes are among them."""
    shape = UNetShape.of(config)
    down = [unit for stage in range(shape.stages) for unit in _layer_units(shape, stage, "down")]
    mid = [Unit(_MID, "mid", (_MID,))] if shape.has_mid else []
    if shape.depths.mid > 1:
        mid.append(Unit(_MID_ATTENTION, "mid", MID_BEHIND_RESNET))
        mid += _block_units(_MID, "mid", MID_BEHIND_RESNET[0], shape.depths.mid)
    innermost = [Unit(_innermost(n), "innermost", tuple(_stage_paths(shape, n))) for n in _droppable(shape)]
    up = [unit for stage in reversed(range(shape.stages)) for unit in _layer_units(shape, stage, "up")]
    return (*down, *mid, *innermost, *up)


def removals(config: Config) -> Iterator[Removals]:
    """All that recipes for this U-Net can remove, if every kept layer is to find what it finds in the teacher."""
    shape = UNetShape.of(config)
    middles = [frozenset[str](), *([frozenset([_MID_ATTENTION])] if shape.depths.mid > 1 else [])]
    for dropped in (0, *_droppable(shape)):
        for mid in [*middles, frozenset([_MID])] if shape.has_mid else middles[:1]:
            always = mid | ({_innermost(dropped)} if dropped else frozenset())
            if _derives(recipe_without(config, always, "frame"), config):
                yield Removals(always, tuple(_groups(shape, dropped, 0 if mid else shape.depths.mid)))


def _groups(shape: UNetShape, dropped: int, depth_of_mid: int) -> Iterator[tuple[Removals, ...]]:
    """What each stage can lose, and the middle block whose attention is kept with this many transformer layers."""
    mid = _blocks(_MID, depth_of_mid)
    last = shape.stages - dropped - 1
    for stage in range(last + 1):
        yield tuple(_stage_removals(shape, stage, mid if stage == last else (), mid_moves=dropped > 0))
    if len(mid) > 1 and not shape.attends_down[last]:
        yield _all_but_some(mid)


def recipes_between(teacher: Config, student: Config, name: str) -> Iterator[Recipe]:
    """The recipes that make a U-Net with the student's config out of one with the teacher's.

    Of the transformer layers that can have stayed in an attention, the first and the last are told of, for there may
    be thousands of ways.
    """
    shallow = {depth.DOWN: 1, depth.UP: None}
    whole, part = UNetShape.of({**teacher, **shallow}), UNetShape.of(student)
    stages, dropped = range(part.stages), whole.stages - part.stages
    frame = Recipe(name, mid=_middle_between(teacher, student), drop_innermost=dropped)
    if dropped < 0 or not _derives(frame, {**teacher, **shallow}):
        return
    choices = (_stage_choices(frame, {**teacher, **shallow}, stage, part.layers[stage]) for stage in stages)
    for chosen in product(*choices):
        recipe = replace(frame, down=tuple(down for down, _ in chosen), up=tuple(up for _, up in chosen))
        for deep in dict.fromkeys(_with_depths(recipe, teacher, part, first) for first in (True, False)):
            if _derives(deep, teacher) and difference(derive(deep, teacher).student_config, student) is None:
                yield deep


def _middle_between(teacher: Config, student: Config) -> Middle:
    whole, part = UNetShape.of(teacher), UNetShape.of(student)
    if not part.has_mid:
        return not whole.has_mid
    return True if part.depths.mid or not whole.depths.mid else "resnet"


def _with_depths(recipe: Recipe, teacher: Config, part: UNetShape, first: bool) -> Recipe:
    """The recipe with as many transformer layers in every attention as `part` has, the first or the last."""
    whole = UNetShape.of(teacher)

    def some(kept: int, available: int) -> Depth:
        if kept >= available:
            return "all"
        return tuple(range(kept) if first else range(available - kept, available))

    def side(layers: object, depths: tuple[_Layers, ...], left: tuple[_Layers, ...]) -> Transformers:
        assert isinstance(layers, tuple)
        stages = zip(layers, depths, left, strict=False)
        return _short(
            [
                [some(n, own[k]) for k, n in zip(kept, counts, strict=False)] if own else []
                for kept, own, counts in stages
            ]
        )

    mid = some(part.depths.mid, whole.depths.mid)
    return replace(
        recipe,
        mid=recipe.mid if mid == "all" or recipe.mid == "resnet" or not part.depths.mid else mid,
        down_transformers=side(recipe.down, whole.depths.down, part.depths.down),
        up_transformers=side(recipe.up, whole.depths.up, part.depths.up),
    )


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
    down = tuple(_kept(names, _down_path(stage), shape.layers[stage]) for stage in stages)
    up = tuple(_kept(names, shape.up_path(stage), shape.layers[stage] + 1) for stage in stages)
    depths = shape.depths
    return Recipe(
        name=name,
        down=down,
        up=up,
        mid=_kept_of_mid(names, depths.mid),
        drop_innermost=dropped,
        summary=summary,
        down_transformers=_short([_depths(names, _down_path(i), down[i], depths.down[i]) for i in stages]),
        up_transformers=_short([_depths(names, shape.up_path(i), up[i], depths.up[i]) for i in stages]),
    )


def _kept_of_mid(names: Names, available: int) -> Middle:
    if _MID in names:
        return False
    if _MID_ATTENTION in names:
        return "resnet"
    kept = _kept_blocks(names, _MID, available)
    return True if kept == "all" else kept


def _depths(names: Names, path: str, layers: _Layers, depths: _Layers) -> list[Depth]:
    """What stays in the attentions of the layers that do."""
    return [_kept_blocks(names, _layer(path, layer), depths[layer]) for layer in layers] if depths else []


def _kept_blocks(names: Names, owner: str, available: int) -> Depth:
    blocks = _blocks(owner, available)
    kept = tuple(number for number, block in enumerate(blocks) if block not in names)
    return kept if len(kept) < available else "all"


def _short(stages: list[list[Depth]]) -> Transformers:
    """What is said of every attention of every stage, in as few words as a recipe needs."""
    entries = tuple(stage[0] if len(set(stage)) == 1 else tuple(stage) or "all" for stage in stages)
    return "all" if set(entries) == {"all"} else entries


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
    depths = (shape.depths.down if down else shape.depths.up)[stage]
    attends = bool(depths)
    removable = {layer for choice in _choices(shape, stage) for layer in choice[0 if down else 1]}
    for layer in range(shape.layers[stage] + (0 if down else 1)):
        fits = passes(shape, stage, layer)
        stays = "" if layer in removable else _why(shape, stage, fits)
        paths = tuple(layer_paths(path, layer, attends))
        yield Unit(_layer(path, layer), kind, paths, not fits, stays)
        if attends:
            yield from _block_units(_layer(path, layer), kind, paths[-1], depths[layer])


def _block_units(owner: str, kind: Kind, attention: str, count: int) -> Iterator[Unit]:
    """The transformer layers of an attention, where there are several."""
    if count > 1:
        for number, name in enumerate(_blocks(owner, count)):
            yield Unit(name, kind, (f"{attention}.transformer_blocks.{number}",))


def _blocks(owner: str, count: int) -> _Blocks:
    return tuple(f"{owner} transformer {number}" for number in range(count))


def _why(shape: UNetShape, stage: int, fits: bool) -> str:
    if not fits:
        return "the hidden states change their channels there"
    if shape.layers[stage] == 1:
        return "a stage keeps one layer down and two up"
    return "no layer that can go with it would leave its skip connection to another"


def _stage_removals(shape: UNetShape, stage: int, mid: _Blocks, *, mid_moves: bool) -> Iterator[Removals]:
    """What a stage can lose: layers, and transformer layers of those that stay.

    Arguments:
        mid: Transformer layers of the middle block, if they have to be as many as in this stage's first attention.
        mid_moves: Whether they stay, for what they cost is not known where stages are missing.
    """
    down, up = _down_path(stage), shape.up_path(stage)
    for gone_down, gone_up in (((), ()), *_choices(shape, stage)):
        names = [*(_layer(down, layer) for layer in gone_down), *(_layer(up, layer) for layer in gone_up)]
        inside = [
            _blocks(_layer(path, layer), depth)
            for path, depths, gone in ((down, shape.depths.down, gone_down), (up, shape.depths.up, gone_up))
            for layer, depth in enumerate(depths[stage])
            if layer not in gone
        ]
        groups = []
        if mid and shape.attends_down[stage]:
            groups.append(tuple(_as_many(inside.pop(0), mid, mid_moves=mid_moves)))
        groups += [_all_but_some(blocks) for blocks in inside if len(blocks) > 1]
        yield Removals(frozenset(names), tuple(group for group in groups if len(group) > 1 or group[0].groups))


def _as_many(first: _Blocks, mid: _Blocks, *, mid_moves: bool) -> Iterator[Removals]:
    """Ways to leave as many transformer layers in a stage's first attention as in the middle block."""
    for left in [len(mid)] if mid_moves else range(min(len(first), len(mid)), 0, -1):
        yield Removals(frozenset(), (_leaving(first, left), _leaving(mid, left)))


def _all_but_some(blocks: _Blocks) -> tuple[Removals, ...]:
    return tuple(choice for left in range(len(blocks), 0, -1) for choice in _leaving(blocks, left))


def _leaving(blocks: _Blocks, left: int) -> tuple[Removals, ...]:
    return tuple(Removals(frozenset(gone)) for gone in combinations(blocks, len(blocks) - left))


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
