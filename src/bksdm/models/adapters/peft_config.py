"""How strongly matrices count by peft's own config, which lies beside them or in a file's header.

What else a config asks for and is not understood here is refused: it would change what the matrices mean.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bksdm.common.errors import InputError
from bksdm.models.adapters.kinds import peft_config_beside
from bksdm.models.adapters.names import TEXT_PREFIX

_HEADER = "lora_adapter_metadata"
_TYPES = ("LORA", "LOHA", "LOKR", "IA3")
_BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal")  # others change the model's own weights
# What says where matrices lie, how they were trained, or is read below.
_OF_NO_CONCERN = {
    *("auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "layers_pattern"),
    *("layers_to_transform", "peft_type", "peft_version", "revision", "target_modules", "task_type"),
    *("decompose_both", "decompose_factor", "eva_config", "init_ia3_weights", "init_weights", "lora_dropout"),
    *(
        "megatron_core",
        "module_dropout",
        "qalora_group_size",
        "rank_dropout",
        "rank_dropout_scale",
        "use_effective_conv2d",
    ),
    *(
        "alpha",
        "alpha_pattern",
        "feedforward_modules",
        "init_lora_weights",
        "lora_alpha",
        "lora_bias",
        "r",
        "rank_pattern",
    ),
    *("use_dora", "use_rslora"),
}
_NOTHING: tuple[object, ...] = (None, False, "none", {}, [])


class PeftConfig:
    """A config of peft.

    Arguments:
        values: Its entries.
        source: What to call it in errors.

    Raises:
        InputError: It asks for what is not understood.
    """

    def __init__(self, values: Mapping[str, Any], source: str | Path) -> None:
        kind = values.get("peft_type") or "LORA"
        if kind not in _TYPES:
            raise InputError(f"{source} is an adapter of peft's type {kind}; those of {', '.join(_TYPES)} are read")
        begun = values.get("init_lora_weights", True)
        if begun not in _BEGINNINGS:
            raise InputError(
                f"{source} was begun by {begun}, which changes the model's own weights; save it as a plain LoRA first "
                f"(peft's path_initial_model_for_weight_conversion)"
            )
        for key, value in values.items():
            if key not in _OF_NO_CONCERN and value not in _NOTHING:
                raise InputError(f"{source} has {key} {value!r}, which is not understood; merge it with peft")
        for key in ("alpha", "lora_alpha", "r"):
            _check_number(values.get(key, 1), key, source)
        for key in ("alpha_pattern", "rank_pattern"):
            patterns = values.get(key) or {}
            if not isinstance(patterns, dict):
                raise InputError(f"{source} has {key} {patterns!r}; write patterns with a number each")
            for pattern, value in patterns.items():
                _check_number(value, f"{key} {pattern}", source)
        self._values = values

    def scale(self, path: str, rank: int) -> float:
        """What the product of matrices of a rank is multiplied by in the layer at `path`."""
        alpha = self._of("alpha", path, self._values.get("lora_alpha", self._values.get("alpha", rank)))
        return alpha / (math.sqrt(rank) if self._values.get("use_rslora") else rank)

    def whole_scale(self, path: str) -> float:
        """The same where the tensors have no rank, by that of the config."""
        return self.scale(path, int(self._of("rank", path, self._values.get("r", 1))))

    def _of(self, what: str, path: str, otherwise: float) -> float:
        """`alpha` or `rank` of the layer at `path`."""
        patterns = self._values.get(f"{what}_pattern") or {}
        return float(next((given for pattern, given in patterns.items() if _matches(pattern, path)), otherwise))

    def on_input(self, path: str) -> bool:
        """Whether (IA)^3 multiplies what comes into the layer at `path`, and not what goes out."""
        modules = self._values.get("feedforward_modules") or []
        if isinstance(modules, str):
            return any(re.fullmatch(modules, spelling) for spelling in _spellings(path))
        return any(spelling.endswith(str(name)) for spelling in _spellings(path) for name in modules)


def read_configs(file: Path, header: Mapping[str, str]) -> dict[str | None, PeftConfig]:
    """The configs of the networks by their names; under None that of all.

    Arguments:
        file: The file of the matrices, beside which peft's own has its config.
        header: What its header says.

    Raises:
        InputError: One is damaged, or asks for what is not understood.
    """
    beside = peft_config_beside(file)
    try:
        held = dict(json.loads(header.get(_HEADER, "{}") if beside is None else beside.read_text("utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{beside or file} has a config that cannot be read ({error}); copy it again") from error
    if beside is not None:
        return {None: PeftConfig(held, beside)}
    parts: dict[str, dict[str, Any]] = {}
    for key, value in held.items():
        part, _, name = key.partition(".")
        parts.setdefault(part, {})[name] = value
    return {part: PeftConfig(values, file) for part, values in parts.items()}


def _check_number(value: object, key: str, source: str | Path) -> None:
    if type(value) not in (int, float):
        raise InputError(f"{source} has {key} {value!r}; write a number")


def _spellings(path: str) -> tuple[str, str]:
    """A path as peft may have seen it: transformers had text encoders inside `text_model` once."""
    return path, TEXT_PREFIX + path


def _matches(pattern: str, path: str) -> bool:
    """As peft has it: a regular expression for the end of a path."""
    try:
        return any(re.match(rf"(.*\.)?({pattern})$", spelling) for spelling in _spellings(path))
    except re.error as error:
        raise InputError(f"alpha_pattern has {pattern!r}, which is no regular expression ({error})") from error
