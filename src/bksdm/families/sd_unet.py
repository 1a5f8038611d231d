"""The U-Net of Stable Diffusion 1.x and 2.x, as diffusers' `UNet2DConditionModel`.

Down stage i holds L_i layers and, but for the innermost, a downsampler; the up stage of the same
width holds L_i + 1 layers and, but for the outermost, an upsampler. Layer j of an up stage
concatenates the skip connection of layer L_i - 1 - j; its last takes the one that comes from
the stage outside, with that stage's width. So the first and the last layer of an up stage have
shapes of their own, which is why recipes keep these two.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bksdm.errors import InputError
from bksdm.recipe import Config, Pruning, Recipe, Stage, Tap

_DOWN_TYPES = ("CrossAttnDownBlock2D", "DownBlock2D")
_UP_TYPES = ("CrossAttnUpBlock2D", "UpBlock2D")
_MID_TYPES = ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None)

# Conditions besides noise level and caption, which nothing here would give the U-Net.
_CONDITIONS = {
    "addition_embed_type": "added conditions, as SDXL does",
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
    "transformer_layers_per_block",
    "only_cross_attention",
)
# Those of them that the middle block takes from the innermost stage.
_OF_MID = ("attention_head_dim", "num_attention_heads", "cross_attention_dim", "transformer_layers_per_block")
# What a student changes, as it is where a config does not say.
_DEFAULTS = {"layers_per_block": 2, "mid_block_type": _MID_TYPES[0]}
_UP_ORDER = ("up_block_types", "reverse_transformer_layers_per_block")


def why_not(config: Config) -> str | None:
    """Why a U-Net is not of this family, or None if it is."""
    return next(_objections(config), None)


def _objections(config: Config) -> Iterator[str]:
    if config.get("_class_name", "UNet2DConditionModel") != "UNet2DConditionModel":
        yield f"it is a {config['_class_name']}"
    for key, what in _CONDITIONS.items():
        if config.get(key):
            yield f"it takes {what} ({key} is {config[key]})"
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
    layers = config.get("layers_per_block", 2)
    if not isinstance(layers, int) and len(layers) != len(down):
        yield f"its layers_per_block lists {len(layers)} stages, and it has {len(down)}"


@dataclass(frozen=True)
class UNetShape:
    """A config, read as stages."""

    widths: tuple[int, ...]
    layers: tuple[int, ...]
    attends_down: tuple[bool, ...]
    attends_up: tuple[bool, ...]
    has_mid: bool

    @classmethod
    def of(cls, config: Config) -> "UNetShape":
        """The stages of the U-Net with this config, outermost first."""
        widths = tuple(config["block_out_channels"])
        layers = config.get("layers_per_block", 2)
        return cls(
            widths=widths,
            layers=(layers,) * len(widths) if isinstance(layers, int) else tuple(layers),
            attends_down=tuple(kind.startswith("CrossAttn") for kind in config["down_block_types"]),
            attends_up=tuple(kind.startswith("CrossAttn") for kind in reversed(config["up_block_types"])),
            has_mid=config.get("mid_block_type", _MID_TYPES[0]) is not None,
        )

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


def derive(recipe: Recipe, teacher_config: Config) -> Pruning:
    """What follows from `recipe` for a teacher with this config.

    Raises:
        InputError: The teacher cannot satisfy the recipe; the message says why.
    """
    teacher = UNetShape.of(teacher_config)
    stages = teacher.stages - recipe.drop_innermost
    if not 1 <= stages <= teacher.stages:
        raise _unfit(recipe, f"drop_innermost is {recipe.drop_innermost}, and the teacher has {teacher.stages} stages")
    for side, layers in (("down", recipe.down), ("up", recipe.up)):
        if isinstance(layers[0], tuple) and len(layers) != stages:  # "all" has no tuples
            raise _unfit(recipe, f"{side} lists {len(layers)} stages, and {stages} remain of the teacher's")

    down = [
        _kept(recipe, f"down_blocks.{i}", recipe.down_layers(i, teacher.layers[i]), teacher.layers[i])
        for i in range(stages)
    ]
    up = [
        _kept(recipe, teacher.up_path(i), recipe.up_layers(i, teacher.layers[i] + 1), teacher.layers[i] + 1)
        for i in range(stages)
    ]
    for i in range(stages):
        if len(up[i]) != len(down[i]) + 1:
            raise _unfit(
                recipe,
                f"{teacher.up_path(i)} keeps {len(up[i])} layers and down_blocks.{i} keeps {len(down[i])}; "
                f"an up stage has one more than its down stage",
            )

    student_config = _student_config(recipe, teacher_config, stages, [len(kept) for kept in down])
    student = UNetShape.of(student_config)
    _check_channels(recipe, teacher, student, down, up)
    if student.has_mid:
        _check_mid(recipe, teacher_config, student_config)
    key_map = dict(_key_map(teacher, student, down, up))
    return Pruning(
        recipe=recipe,
        student_config=student_config,
        key_map=key_map,
        taps=tuple(_taps(teacher, student)),
        removed=tuple(path for path in _units(teacher) if path not in set(key_map.values())),
        down=tuple(_stage(teacher, "down", i, down[i] if i < stages else ()) for i in range(teacher.stages)),
        up=tuple(_stage(teacher, "up", i, up[i] if i < stages else ()) for i in range(teacher.stages)),
        mid=Stage("mid_block", teacher.widths[-1], (("RAR", student.has_mid),)) if teacher.has_mid else None,
        attention_taps=tuple(_attention_taps(teacher_config, key_map)),
    )


def _kept(recipe: Recipe, path: str, layers: tuple[int, ...], available: int) -> tuple[int, ...]:
    """Layer numbers counted from 0, in ascending order."""
    for layer in layers:
        if not -available <= layer < available:
            raise _unfit(recipe, f"it keeps layer {layer} of {path}, which has {available} layers")
    kept = tuple(layer % available for layer in layers)
    if list(kept) != sorted(set(kept)):
        raise _unfit(
            recipe, f"it keeps layers {list(layers)} of {path}, which has {available}; name each once, in order"
        )
    return kept


def _student_config(recipe: Recipe, config: Config, stages: int, layers: list[int]) -> dict[str, Any]:
    # diffusers drops the entries that "_use_default_values" lists, so a changed one would fall back to the default.
    student = {key: value for key, value in config.items() if key not in ("_name_or_path", "_use_default_values")}
    for key in _PER_STAGE:
        if isinstance(student.get(key), (list, tuple)):
            student[key] = list(student[key][:stages])
    for key in _UP_ORDER:
        if isinstance(student.get(key), (list, tuple)):
            student[key] = list(student[key][len(student[key]) - stages :])
    student["layers_per_block"] = layers[0] if len(set(layers)) == 1 else layers
    if not recipe.mid:
        student["mid_block_type"] = None
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
                raise _unfit(
                    recipe,
                    f"layer {layer} of {path} takes {has[0]} channels, and in its place {wanted[0]} would arrive",
                )
    if student.has_mid and teacher.widths[-1] != student.widths[-1]:
        raise _unfit(
            recipe, f"the middle block has {teacher.widths[-1]} channels, and {student.widths[-1]} would arrive there"
        )


def _check_mid(recipe: Recipe, teacher: Config, student: Config) -> None:
    """What the middle block takes from the innermost stage must be the same in both."""
    for key in _OF_MID:
        has, gets = teacher.get(key), student.get(key)
        if isinstance(has, (list, tuple)) and isinstance(gets, (list, tuple)) and has[-1] != gets[-1]:
            raise _unfit(recipe, f"the middle block has {key} {has[-1]}, and in the student it would have {gets[-1]}")


def _key_map(
    teacher: UNetShape, student: UNetShape, down: list[tuple[int, ...]], up: list[tuple[int, ...]]
) -> Iterator[tuple[str, str]]:
    """Pairs (student path, teacher path) of all that is kept in stages and middle."""
    for i in range(student.stages):
        for here, there, kept, attends in (
            (f"down_blocks.{i}", f"down_blocks.{i}", down[i], teacher.attends_down[i]),
            (student.up_path(i), teacher.up_path(i), up[i], teacher.attends_up[i]),
        ):
            for number, layer in enumerate(kept):
                for kind in ("resnets", "attentions") if attends else ("resnets",):
                    yield f"{here}.{kind}.{number}", f"{there}.{kind}.{layer}"
        if i < student.stages - 1:
            yield f"down_blocks.{i}.downsamplers", f"down_blocks.{i}.downsamplers"
        if i > 0:
            yield f"{student.up_path(i)}.upsamplers", f"{teacher.up_path(i)}.upsamplers"
    if student.has_mid:
        yield "mid_block", "mid_block"


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
        own = found.get(key, _DEFAULTS.get(key, value))
        one, other = ([*item] if isinstance(item, (list, tuple)) else item for item in (value, own))
        if key == "layers_per_block":
            one, other = _listed(value, stages), _listed(own, stages)
        if one != other and not key.startswith("_"):
            return key, value, own
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


def _attention_taps(teacher_config: Config, key_map: Mapping[str, str]) -> Iterator[Tap]:
    """The self-attention of every transformer block that stays (KOALA, arXiv 2312.04005)."""
    blocks = dict(_self_attending(teacher_config))
    for here, there in key_map.items():
        for path, count in blocks.items():
            if path == there or path.startswith(f"{there}."):
                for number in range(count):
                    module = f"transformer_blocks.{number}.attn1"
                    yield Tap(f"{path}.{module}", f"{here}{path.removeprefix(there)}.{module}")


def _self_attending(config: Config) -> Iterator[tuple[str, int]]:
    """Every attention of a U-Net, by path, and its number of transformer blocks that attend to themselves."""
    unet = UNetShape.of(config)
    depths = _listed(config.get("transformer_layers_per_block", 1), unet.stages)
    depths_up = _listed(config.get("reverse_transformer_layers_per_block") or depths[::-1], unet.stages)[::-1]
    only_cross = _listed(config.get("only_cross_attention", False), unet.stages)
    for i in range(unet.stages):
        for path, attends, depth, layers in (
            (f"down_blocks.{i}", unet.attends_down[i], depths[i], unet.layers[i]),
            (unet.up_path(i), unet.attends_up[i], depths_up[i], unet.layers[i] + 1),
        ):
            if attends and not only_cross[i]:
                for layer, count in enumerate(_listed(depth, layers)):
                    yield f"{path}.attentions.{layer}", count
    if config.get("mid_block_type", _MID_TYPES[0]) == "UNetMidBlock2DCrossAttn":
        yield "mid_block.attentions.0", _listed(depths[-1], 1)[0]


def _listed(value: Any, count: int) -> list[Any]:
    """An entry of a config that holds one value for all, or one for each of `count`."""
    return list(value) if isinstance(value, (list, tuple)) else [value] * count


def _stage(teacher: UNetShape, side: str, i: int, kept: tuple[int, ...]) -> Stage:
    down = side == "down"
    attends = teacher.attends_down[i] if down else teacher.attends_up[i]
    count = teacher.layers[i] if down else teacher.layers[i] + 1
    layers = tuple(("RA" if attends else "R", layer in kept) for layer in range(count))
    return Stage(f"down_blocks.{i}" if down else teacher.up_path(i), teacher.widths[i], layers)


def _unfit(recipe: Recipe, reason: str) -> InputError:
    return InputError(f"recipe {recipe.name!r} does not fit this teacher: {reason}")
