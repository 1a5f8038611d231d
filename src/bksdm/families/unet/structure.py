"""The U-Nets of Stable Diffusion 1.x and 2.x and of SDXL, as diffusers' `UNet2DConditionModel`.

Down stage i holds L_i layers and, but for the innermost, a downsampler; the up stage of the same
width holds L_i + 1 layers and, but for the outermost, an upsampler. Layer j of an up stage
concatenates the skip connection of layer L_i - 1 - j; its last takes the one that comes from
the stage outside, with that stage's width. So the first and the last layer of an up stage have
shapes of their own, which is why recipes keep these two. `depth` has how many transformer layers
the attentions hold: one in Stable Diffusion, up to ten in SDXL.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bksdm.families.recipe import (
    Config,
    Depth,
    Pruning,
    Recipe,
    Stage,
    Tap,
    each_stage,
    kept_numbers,
    of_attentions,
    unfit,
)
from bksdm.families.unet import depth
from bksdm.families.unet.depth import Depths, listed

_DOWN_TYPES = ("CrossAttnDownBlock2D", "DownBlock2D")
_UP_TYPES = ("CrossAttnUpBlock2D", "UpBlock2D")
_MID_TYPES = ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None)

# Conditions besides noise level and caption, which no family here would give the U-Net.
_CONDITIONS = {
    "class_embed_type": "class labels",
    "num_class_embeds": "class labels",
    "encoder_hid_dim": "embeddings of another kind",
}

# Config entries that may hold one value a stage, outermost first; those in _UP_ORDER innermost first.
_PER_STAGE = (
    "block_out_channels",
    "down_block_types",
    "attention_head_dim",
    "num_attention_heads",
    "cross_attention_dim",
    depth.DOWN,
    "only_cross_attention",
)
# Those of them that the middle block's attention takes from the innermost stage.
_OF_MID = ("attention_head_dim", "num_attention_heads", "cross_attention_dim")
# What a student changes, as it is where a config does not say.
_DEFAULTS = {"layers_per_block": 2, "mid_block_type": _MID_TYPES[0]}
_UP_ORDER = ("up_block_types", depth.UP)
ADDED = "addition_embed_type"
NUMBERS = 6  # sizes and places that SDXL is told of a picture
# What goes where the middle block keeps its ResNet only: diffusers' `UNetMidBlock2D` has no second one.
MID_BEHIND_RESNET = ("mid_block.attentions.0", "mid_block.resnets.1")
_MID_ATTENTION = "mid_block.attentions.0"


def why_not(config: Config) -> str | None:
    """Why a U-Net is not of this family, or None if it is."""
    return next(_objections(config), None)


def _objections(config: Config) -> Iterator[str]:
    if config.get("_class_name", "UNet2DConditionModel") != "UNet2DConditionModel":
        yield f"it is a {config['_class_name']}"
    for key, what in _CONDITIONS.items():
        if config.get(key):
            yield f"it takes {what} ({key} is {config[key]})"
    added = config.get(ADDED)
    if added not in (None, "text_time"):
        yield f"it takes added conditions of another kind ({ADDED} is {added})"
    for key in ("block_out_channels", "down_block_types", "up_block_types"):
        if not isinstance(config.get(key), (list, tuple)):
            yield f"its {key} is {config.get(key)!r}, not a list"
    down, up = config["down_block_types"], config["up_block_types"]
    mid = config.get("mid_block_type", _MID_TYPES[0])
    for kinds, usable in ((down, _DOWN_TYPES), (up, _UP_TYPES), ((mid,), _MID_TYPES)):
        for kind in kinds:
            if kind not in usable:
                yield f"it has blocks of type {kind}"
    if not down or len(down) != len(up) or len(config["block_out_channels"]) != len(down):
        yield "its config does not list as many widths and up stages as down stages"
    yield from _layer_objections(config, len(down))
    if added:
        yield from _added_objections(config)


def _layer_objections(config: Config, stages: int) -> Iterator[str]:
    layers = config.get("layers_per_block", 2)
    if not isinstance(layers, int) and len(layers) != stages:
        yield f"its layers_per_block lists {len(layers)} stages, and it has {stages}"
    if not all(type(count) is int and count > 0 for count in listed(layers, 1)):
        yield f"its layers_per_block is {layers}; each stage has one layer or more"
    yield from depth.objections(config, listed(layers, stages))
    depths = UNetShape.of(config).depths
    if 0 in depths or (config.get("mid_block_type", _MID_TYPES[0]) == _MID_TYPES[0] and not depths.mid):
        yield "it has attentions without a transformer layer"


def _added_objections(config: Config) -> Iterator[str]:
    """SDXL is told the caption's pooled embedding and six numbers about the picture, and its refiner five."""
    keys = ("addition_time_embed_dim", "projection_class_embeddings_input_dim")
    each, takes = (config.get(key) for key in keys)
    if not isinstance(each, int) or not isinstance(takes, int) or takes <= NUMBERS * each:
        yield f"its {keys[0]} is {each} and its {keys[1]} {takes}, which leaves no room for a caption and six numbers"
    elif takes - 5 * each == config.get("cross_attention_dim") and not UNetShape.of(config).attends_down[-1]:
        yield (
            f"it is shaped like SDXL's refiner, which takes five numbers about the picture, an aesthetic score among "
            f"them ({keys[1]} is {takes})"
        )


@dataclass(frozen=True)
class UNetShape:
    """A config, read as stages, outermost first.

    Attributes:
        widths: Channels.
        layers: Layers of the down stages.
        depths: Transformer layers of the attentions.
        has_mid: Whether there is a middle block, which may be no more than a ResNet.
    """

    widths: tuple[int, ...]
    layers: tuple[int, ...]
    depths: Depths
    has_mid: bool

    @classmethod
    def of(cls, config: Config) -> "UNetShape":
        """The stages of the U-Net with this config, outermost first."""
        widths = tuple(config["block_out_channels"])
        layers = tuple(listed(config.get("layers_per_block", 2), len(widths)))
        mid = config.get("mid_block_type", _MID_TYPES[0])
        depths = Depths.of(
            config,
            layers,
            [kind.startswith("CrossAttn") for kind in config["down_block_types"]],
            [kind.startswith("CrossAttn") for kind in reversed(config["up_block_types"])],
            mid=mid == _MID_TYPES[0],
        )
        return cls(widths, layers, depths, has_mid=mid is not None)

    @property
    def attends_down(self) -> tuple[bool, ...]:
        """Whether the layers of each down stage have attentions."""
        return tuple(map(bool, self.depths.down))

    @property
    def attends_up(self) -> tuple[bool, ...]:
        """Likewise of the up stages."""
        return tuple(map(bool, self.depths.up))

    @property
    def stages(self) -> int:
        """How many stages there are, down or up."""
        return len(self.widths)

    def up_path(self, stage: int) -> str:
        """Path of the up stage that has the width of down stage `stage`."""
        return f"up_blocks.{self.stages - 1 - stage}"

    def down_channels(self, stage: int, layer: int) -> tuple[int, int]:
        """Channels that come into and go out of a layer of a down stage."""
        before = self.widths[max(stage - 1, 0)]
        return (before if layer == 0 else self.widths[stage]), self.widths[stage]

    def up_channels(self, stage: int, layer: int) -> tuple[int, int]:
        """Channels that come into (with the skip connection) and go out of a layer of an up stage."""
        skip = self.widths[max(stage - 1, 0) if layer == self.layers[stage] else stage]
        return self.up_hidden(stage, layer) + skip, self.widths[stage]

    def up_hidden(self, stage: int, layer: int) -> int:
        """Channels of the hidden states that come into a layer of an up stage, without the skip connection."""
        return self.widths[min(stage + 1, self.stages - 1) if layer == 0 else stage]


@dataclass(frozen=True)
class _Blocks:
    """Transformer layers of an attention that stays: those that do, and how many there are."""

    kept: tuple[int, ...]
    available: int

    @property
    def in_part(self) -> bool:
        return len(self.kept) < self.available

    def __str__(self) -> str:
        """As behind an A in a drawing."""
        whole = str(self.available) if self.available > 1 else ""
        return f"{len(self.kept)}/{whole}" if self.in_part else whole


def derive(recipe: Recipe, teacher_config: Config) -> Pruning:
    """What follows from `recipe` for a teacher with this config.

    Raises:
        InputError: The teacher cannot satisfy the recipe; the message says why.
    """
    if recipe.blocks != "all":
        raise unfit(
            recipe, "it says which blocks of a transformer stay, and this is a U-Net; give a recipe such as base"
        )
    teacher = UNetShape.of(teacher_config)
    stages = teacher.stages - recipe.drop_innermost
    if not 1 <= stages <= teacher.stages:
        raise unfit(recipe, f"drop_innermost is {recipe.drop_innermost}, and the teacher has {teacher.stages} stages")
    for side, layers in (("down", recipe.down), ("up", recipe.up)):
        if isinstance(layers[0], tuple) and len(layers) != stages:  # "all" has no tuples
            raise unfit(recipe, f"{side} lists {len(layers)} stages, and {stages} remain of the teacher's")

    down = [
        kept_numbers(recipe, f"down_blocks.{i}", recipe.down_layers(i, teacher.layers[i]), teacher.layers[i], "layer")
        for i in range(stages)
    ]
    up = [
        kept_numbers(
            recipe, teacher.up_path(i), recipe.up_layers(i, teacher.layers[i] + 1), teacher.layers[i] + 1, "layer"
        )
        for i in range(stages)
    ]
    for i in range(stages):
        if len(up[i]) != len(down[i]) + 1:
            raise unfit(
                recipe,
                f"{teacher.up_path(i)} keeps {len(up[i])} layers and down_blocks.{i} keeps {len(down[i])}; "
                f"an up stage has one more than its down stage",
            )

    blocks = dict(_attentions(recipe, teacher, down, up))
    depths = _depths(teacher, down, up, blocks)
    student_config = _student_config(recipe, teacher_config, [len(kept) for kept in down], depths)
    student = UNetShape.of(student_config)
    _check_channels(recipe, teacher, student, down, up)
    if student.depths.mid:
        _check_mid(recipe, teacher_config, student_config)
    key_map = dict(_key_map(teacher, student, down, up, blocks))
    matched = {here: there for here, there in key_map.items() if there != "mid_block" or stages == teacher.stages}
    return Pruning(
        recipe=recipe,
        student_config=student_config,
        key_map=key_map,
        taps=tuple(_taps(teacher, student)),
        removed=tuple(_removed(teacher, student, set(key_map.values()), blocks)),
        down=tuple(_stage(teacher, "down", i, down[i] if i < stages else (), blocks) for i in range(teacher.stages)),
        up=tuple(_stage(teacher, "up", i, up[i] if i < stages else (), blocks) for i in range(teacher.stages)),
        mid=_middle(teacher, student, blocks) if teacher.has_mid else None,
        attention_taps=tuple(_attention_taps(teacher_config, matched, blocks)),
        layer_taps=tuple(_layer_taps(matched)),
    )


def _attentions(
    recipe: Recipe, teacher: UNetShape, down: list[tuple[int, ...]], up: list[tuple[int, ...]]
) -> Iterator[tuple[str, _Blocks]]:
    """Every attention that stays, by its path in the teacher."""
    for i in range(len(down)):
        for side, path, kept, depths in (
            ("down", f"down_blocks.{i}", down[i], teacher.depths.down[i]),
            ("up", teacher.up_path(i), up[i], teacher.depths.up[i]),
        ):
            said = _said_of_stage(recipe, side, i, path, len(kept) if depths else 0, len(down))
            for layer, own in zip(kept, said, strict=False):  # without attention, nothing is said
                attention = f"{path}.attentions.{layer}"
                yield attention, _blocks(recipe, attention, own, depths[layer])
    if teacher.depths.mid and recipe.mid not in (False, "resnet"):
        own = recipe.mid if isinstance(recipe.mid, tuple) else "all"
        yield _MID_ATTENTION, _blocks(recipe, _MID_ATTENTION, own, teacher.depths.mid)
    elif isinstance(recipe.mid, tuple):
        raise unfit(recipe, f"mid is {list(recipe.mid)}, and the teacher's middle block has no attention; write true")


def _said_of_stage(recipe: Recipe, side: str, i: int, path: str, attentions: int, stages: int) -> tuple[Depth, ...]:
    """What a recipe says of each of the attentions that stay in stage `i` of `stages`."""
    said = recipe.down_transformers if side == "down" else recipe.up_transformers
    key = f"{side}_transformers"
    if each_stage(said) and len(said) != stages:
        raise unfit(recipe, f"{key} lists {len(said)} stages, and {stages} remain of the teacher's")
    if not attentions:
        if each_stage(said) and said[i] != "all":
            raise unfit(recipe, f"{key} names transformer layers of {path}, which has no attention; write all")
        return ()
    found = of_attentions(said, i, attentions)
    if len(found) != attentions:
        raise unfit(recipe, f"{key} lists {len(found)} attentions of {path}, and {attentions} of its layers stay")
    return found


def _depths(
    teacher: UNetShape, down: list[tuple[int, ...]], up: list[tuple[int, ...]], blocks: Mapping[str, _Blocks]
) -> Depths:
    """Transformer layers of the student's attentions."""

    def counts(path: str, kept: tuple[int, ...]) -> tuple[int, ...]:
        found = (blocks.get(f"{path}.attentions.{layer}") for layer in kept)
        return tuple(len(own.kept) for own in found if own)

    return Depths(
        tuple(counts(f"down_blocks.{i}", kept) for i, kept in enumerate(down)),
        tuple(counts(teacher.up_path(i), kept) for i, kept in enumerate(up)),
        len(blocks[_MID_ATTENTION].kept) if _MID_ATTENTION in blocks else 0,
    )


def _blocks(recipe: Recipe, path: str, depth: Depth, available: int) -> _Blocks:
    layers = tuple(range(available)) if depth == "all" else depth
    return _Blocks(kept_numbers(recipe, path, layers, available, "transformer layer"), available)


def _student_config(recipe: Recipe, config: Config, layers: list[int], depths: Depths) -> dict[str, Any]:
    # diffusers drops the entries that "_use_default_values" lists, so a changed one would fall back to the default.
    student = {key: value for key, value in config.items() if key not in ("_name_or_path", "_use_default_values")}
    stages = len(layers)
    for key in _PER_STAGE:
        if isinstance(student.get(key), (list, tuple)):
            student[key] = list(student[key][:stages])
    for key in _UP_ORDER:
        if isinstance(student.get(key), (list, tuple)):
            student[key] = list(student[key][len(student[key]) - stages :])
    student["layers_per_block"] = layers[0] if len(set(layers)) == 1 else layers
    if not recipe.mid:
        student["mid_block_type"] = None
    elif recipe.mid == "resnet" and student.get("mid_block_type", _MID_TYPES[0]):
        student["mid_block_type"] = "UNetMidBlock2D"
    if UNetShape.of(student).depths != depths:
        student |= depths.entries(student)
    found = UNetShape.of(student).depths.mid
    if found != depths.mid:
        raise unfit(
            recipe,
            f"the middle block has {depths.mid} transformer layers, and diffusers gives it the {found} of the first "
            f"attention of down_blocks.{stages - 1}; keep as many in both, or mid: resnet",
        )
    return student


def _check_channels(
    recipe: Recipe, teacher: UNetShape, student: UNetShape, down: list[tuple[int, ...]], up: list[tuple[int, ...]]
) -> None:
    """Every kept layer must find in the student the channels that it has in the teacher."""
    for i in range(student.stages):
        pairs = [
            *(
                (f"down_blocks.{i}", k, teacher.down_channels(i, k), student.down_channels(i, n))
                for n, k in enumerate(down[i])
            ),
            *(
                (teacher.up_path(i), k, teacher.up_channels(i, k), student.up_channels(i, n))
                for n, k in enumerate(up[i])
            ),
        ]
        for path, layer, has, wanted in pairs:
            if has != wanted:
                raise unfit(
                    recipe,
                    f"layer {layer} of {path} takes {has[0]} channels, and in its place {wanted[0]} would arrive",
                )
    if student.has_mid and teacher.widths[-1] != student.widths[-1]:
        raise unfit(
            recipe, f"the middle block has {teacher.widths[-1]} channels, and {student.widths[-1]} would arrive there"
        )


def _check_mid(recipe: Recipe, teacher: Config, student: Config) -> None:
    """What the middle block takes from the innermost stage must be the same in both."""
    for key in _OF_MID:
        has, gets = teacher.get(key), student.get(key)
        if isinstance(has, (list, tuple)) and isinstance(gets, (list, tuple)) and has[-1] != gets[-1]:
            raise unfit(recipe, f"the middle block has {key} {has[-1]}, and in the student it would have {gets[-1]}")


def _key_map(
    teacher: UNetShape,
    student: UNetShape,
    down: list[tuple[int, ...]],
    up: list[tuple[int, ...]],
    blocks: Mapping[str, _Blocks],
) -> Iterator[tuple[str, str]]:
    """Pairs (student path, teacher path) of all that is kept in stages and middle."""
    for i in range(student.stages):
        for here, there, kept, attends in (
            (f"down_blocks.{i}", f"down_blocks.{i}", down[i], teacher.attends_down[i]),
            (student.up_path(i), teacher.up_path(i), up[i], teacher.attends_up[i]),
        ):
            for number, layer in enumerate(kept):
                yield f"{here}.resnets.{number}", f"{there}.resnets.{layer}"
                if attends:
                    pair = f"{here}.attentions.{number}", f"{there}.attentions.{layer}"
                    yield pair
                    yield from _block_map(*pair, blocks[pair[1]])
        if i < student.stages - 1:
            yield f"down_blocks.{i}.downsamplers", f"down_blocks.{i}.downsamplers"
        if i > 0:
            yield f"{student.up_path(i)}.upsamplers", f"{teacher.up_path(i)}.upsamplers"
    if student.has_mid:
        yield "mid_block", "mid_block"
        if _MID_ATTENTION in blocks:
            yield from _block_map(_MID_ATTENTION, _MID_ATTENTION, blocks[_MID_ATTENTION])


def _block_map(here: str, there: str, blocks: _Blocks) -> Iterator[tuple[str, str]]:
    """The transformer layers of an attention, where they are not all kept."""
    if blocks.in_part:
        for number, block in enumerate(blocks.kept):
            yield f"{here}.{_block(number)}", f"{there}.{_block(block)}"


def _removed(teacher: UNetShape, student: UNetShape, kept: set[str], blocks: Mapping[str, _Blocks]) -> Iterator[str]:
    """Paths of the teacher's modules that go, each with all that is in it, in the order of the data."""
    for path in _units(teacher):
        if path not in kept:
            yield path
        elif path == "mid_block" and teacher.depths.mid and not student.depths.mid:
            yield from MID_BEHIND_RESNET
        else:
            attention = _MID_ATTENTION if path == "mid_block" else path
            own = blocks.get(attention, _Blocks((), 0))
            yield from (f"{attention}.{_block(n)}" for n in range(own.available) if n not in own.kept)


def _block(number: int) -> str:
    return f"transformer_blocks.{number}"


def _units(unet: UNetShape) -> Iterator[str]:
    """Everything in the stages and the middle that a recipe can remove, in the order of the data."""
    for i in range(unet.stages):
        for layer in range(unet.layers[i]):
            yield from layer_paths(f"down_blocks.{i}", layer, unet.attends_down[i])
        if i < unet.stages - 1:
            yield f"down_blocks.{i}.downsamplers"
    if unet.has_mid:
        yield "mid_block"
    for i in reversed(range(unet.stages)):
        for layer in range(unet.layers[i] + 1):
            yield from layer_paths(unet.up_path(i), layer, unet.attends_up[i])
        if i > 0:
            yield f"{unet.up_path(i)}.upsamplers"


def difference(wanted: Config, found: Config) -> tuple[str, Any, Any] | None:
    """Name and both values of an entry in which two configs differ; each may leave out its defaults."""
    stages = len(wanted["block_out_channels"])
    for key, value in (_DEFAULTS | dict(wanted)).items():
        if key in (depth.DOWN, depth.UP):
            continue  # there are several ways to write one
        own = found.get(key, _DEFAULTS.get(key, value))
        one, other = ([*item] if isinstance(item, (list, tuple)) else item for item in (value, own))
        if key == "layers_per_block":
            one, other = listed(value, stages), listed(own, stages)
        if one != other and not key.startswith("_"):
            return key, value, own
    own = {depth.DOWN: found.get(depth.DOWN, 1), depth.UP: found.get(depth.UP)}
    whole = UNetShape.of(wanted)
    if next(depth.objections(own, whole.layers), None) or whole.depths != UNetShape.of({**wanted, **own}).depths:
        return depth.DOWN, wanted.get(depth.DOWN, 1), own[depth.DOWN]
    return None


def skip_connections(config: Config) -> tuple[str, ...]:
    """Paths of the modules whose outputs a U-Net keeps for its way up, in the order in which it makes them."""
    unet = UNetShape.of(config)
    paths = ["conv_in"]
    for i in range(unet.stages):
        paths += [list(layer_paths(f"down_blocks.{i}", n, unet.attends_down[i]))[-1] for n in range(unet.layers[i])]
        if i < unet.stages - 1:
            paths.append(f"down_blocks.{i}.downsamplers")
    return tuple(paths)


def passed(config: Config) -> tuple[str, ...]:
    """Paths of the layers of a U-Net in the order in which the data leaves them; see `Family.passed`."""
    unet = UNetShape.of(config)
    paths: list[str] = []
    for i in range(unet.stages):
        for layer in range(unet.layers[i]):
            paths += _leaving(f"down_blocks.{i}", layer, unet.depths.down[i])
        if i < unet.stages - 1:
            paths.append(f"down_blocks.{i}.downsamplers.0")
    if unet.has_mid:
        paths += _leaving("mid_block", 0, (unet.depths.mid,) if unet.depths.mid else ())
        paths += [MID_BEHIND_RESNET[1]] if unet.depths.mid else []
    for i in reversed(range(unet.stages)):
        for layer in range(unet.layers[i] + 1):
            paths += _leaving(unet.up_path(i), layer, unet.depths.up[i])
        if i > 0:
            paths.append(f"{unet.up_path(i)}.upsamplers.0")
    return tuple(paths)


def _leaving(stage: str, layer: int, depths: tuple[int, ...]) -> Iterator[str]:
    """A ResNet block, the transformer layers of the attention behind it if these are several, and the attention."""
    yield f"{stage}.resnets.{layer}"
    if depths:
        attention = f"{stage}.attentions.{layer}"
        if depths[layer] > 1:
            yield from (f"{attention}.{_block(number)}" for number in range(depths[layer]))
        yield attention


def layer_paths(stage: str, layer: int, attends: bool) -> Iterator[str]:
    """Paths of the modules of a layer of the stage at path `stage`."""
    yield f"{stage}.resnets.{layer}"
    if attends:
        yield f"{stage}.attentions.{layer}"


def _taps(teacher: UNetShape, student: UNetShape) -> Iterator[Tap]:
    """The output of every stage.

    The innermost stage that remains after a cut has lost its downsampler, so there its last
    layer's own output is matched: of the attention before the residual sum, as published.
    """
    innermost = student.stages - 1
    for i in range(student.stages):
        if i == innermost < teacher.stages - 1:
            module = "attentions.{}.proj_out" if teacher.attends_down[i] else "resnets.{}"
            last, kept_last = teacher.layers[i] - 1, student.layers[i] - 1
            yield Tap(f"down_blocks.{i}.{module.format(last)}", f"down_blocks.{i}.{module.format(kept_last)}")
        else:
            yield Tap(f"down_blocks.{i}", f"down_blocks.{i}")
    for i in reversed(range(student.stages)):
        yield Tap(teacher.up_path(i), student.up_path(i))


def _attention_taps(teacher_config: Config, key_map: Mapping[str, str], blocks: Mapping[str, _Blocks]) -> Iterator[Tap]:
    """The self-attention of every transformer layer that stays (KOALA, arXiv 2312.04005)."""
    teacher = UNetShape.of(teacher_config)
    only_cross = listed(teacher_config.get("only_cross_attention", False), teacher.stages)
    without = {
        path for i in range(teacher.stages) if only_cross[i] for path in (f"down_blocks.{i}", teacher.up_path(i))
    }
    for here, there in key_map.items():
        inside = _MID_ATTENTION.removeprefix("mid_block") if there == "mid_block" else ""
        if f"{there}{inside}" in blocks and there.partition(".attentions")[0] not in without:
            for number, block in enumerate(blocks[f"{there}{inside}"].kept):
                yield Tap(f"{there}{inside}.{_block(block)}.attn1", f"{here}{inside}.{_block(number)}.attn1")


def _layer_taps(key_map: Mapping[str, str]) -> Iterator[Tap]:
    """Every ResNet block and every attention that stays, and the middle block as one, as SSD-1B was distilled."""
    for here, there in key_map.items():
        if here == "mid_block" or here.split(".")[-2] in ("resnets", "attentions"):
            yield Tap(there, here)


def _stage(teacher: UNetShape, side: str, i: int, kept: tuple[int, ...], blocks: Mapping[str, _Blocks]) -> Stage:
    down = side == "down"
    path = f"down_blocks.{i}" if down else teacher.up_path(i)
    depths = (teacher.depths.down if down else teacher.depths.up)[i]

    def consists_of(layer: int) -> str:
        if not depths:
            return "R"
        return f"RA{blocks.get(f'{path}.attentions.{layer}', _whole(depths[layer]))}"

    count = teacher.layers[i] if down else teacher.layers[i] + 1
    return Stage(path, teacher.widths[i], tuple((consists_of(layer), layer in kept) for layer in range(count)))


def _middle(teacher: UNetShape, student: UNetShape, blocks: Mapping[str, _Blocks]) -> Stage:
    whole = _whole(teacher.depths.mid)
    layers: tuple[tuple[str, bool], ...]
    if not teacher.depths.mid:
        layers = (("R", student.has_mid),)
    elif student.has_mid and not student.depths.mid:
        layers = ("R", True), (f"A{whole}R", False)
    else:
        layers = ((f"RA{blocks.get(_MID_ATTENTION, whole)}R", student.has_mid),)
    return Stage("mid_block", teacher.widths[-1], layers)


def _whole(depth: int) -> _Blocks:
    return _Blocks(tuple(range(depth)), depth)
