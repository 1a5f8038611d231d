"""Which programs read a U-Net that was pruned: a table that is data, `assets/readers.yaml`, and its rules."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import yaml

from bksdm.common.assets import asset
from bksdm.families.reader import Reader
from bksdm.families.recipe import Config
from bksdm.families.unet.depth import listed
from bksdm.families.unet.structure import ADDED, UNetShape

_WIDTHS = (320, 640, 1280, 1280)
_MODELS = {(768, False): "sd1", (1024, False): "sd2", (2048, True): "sdxl"}


def readers(config: Config) -> list[Reader]:
    """What is known of programs and a U-Net with this config, in the order of the table."""
    facts = _facts(config)
    found = []
    for entry in _table():
        rule = next((rule for rule in entry["rules"] if _holds(rule, facts)), None)
        if rule:
            found.append(Reader(entry["program"], entry["file"], rule["answer"], rule["seen"], rule.get("why", "")))
    return found


@cache
def _table() -> Any:
    return yaml.safe_load(asset("readers.yaml").read_text(encoding="utf-8"))


def _holds(rule: Mapping[str, Any], facts: Mapping[str, Any]) -> bool:
    return all(value in rule[key] for key, value in facts.items() if key in rule)


def _facts(config: Config) -> dict[str, Any]:
    unet = UNetShape.of(config)
    plain = unet.widths in (_WIDTHS, _WIDTHS[:3]) and config.get("in_channels", 4) == 4
    takes = listed(config.get("cross_attention_dim"), 1)
    kind = _MODELS.get((takes[0], bool(config.get(ADDED))), "other")
    down = [counts or (0,) * n for counts, n in zip(unet.depths.down, unet.layers, strict=True)]
    up = [counts or (0,) * (n + 1) for counts, n in zip(unet.depths.up, unet.layers, strict=True)]
    return {
        "model": kind if plain and len(set(takes)) == 1 else "other",
        "layers": list(unet.layers),
        "down": [count for counts in down for count in counts],
        "up": [count for counts in reversed(up) for count in counts],
        "mid": "attention" if unet.depths.mid else "resnet" if unet.has_mid else "none",
    }
