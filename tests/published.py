"""The published facts about BK-SDM (tests/data/published.json) and about students of SDXL (published_sdxl.json), read
without the package under test."""

import json
import re
from pathlib import Path

DATA = Path(__file__).parent / "data"
FACTS = json.loads((DATA / "published.json").read_text())
RECIPES = ("base", "small", "tiny")
UNETS = {
    "v1": json.loads((DATA / "unet_sd_v1.4.json").read_text()),
    "v2": json.loads((DATA / "unet_sd_v2.1_base.json").read_text()),
}
XL = json.loads((DATA / "unet_sdxl_base_1.0.json").read_text())
XL_FACTS = json.loads((DATA / "published_sdxl.json").read_text())
TEACHERS = UNETS | {"xl": XL}
STUDENTS = [
    *((version, recipe) for version in UNETS for recipe in RECIPES),
    *(("xl", recipe) for recipe in XL_FACTS["student_config"]),
]


def params(version: str, recipe: str = "whole") -> int:
    """Parameters of a U-Net."""
    if version == "xl":
        return XL_FACTS["params"][recipe]
    return FACTS["unets"][f"{version}-{recipe}"]["params"]


def teacher_key(student_key: str, recipe: str, version: str = "v1") -> str:
    """The teacher's tensor that a student's tensor is inherited from: the published prefixes, else the same name."""
    if version == "xl":
        one_layer = XL_FACTS["student_config"].get(recipe, {}).get("layers_per_block") == 1
        return re.sub(r"^(up_blocks\.\d\.\w+)\.1\.", r"\1.2.", student_key) if one_layer else student_key
    for student, teacher in FACTS["weights_student_from_teacher"][recipe]:
        if student_key.startswith(student):
            return teacher + student_key.removeprefix(student)
    return student_key


def student_config(version: str, recipe: str) -> dict:
    """The full-size student's config."""
    if version == "xl":
        return XL | XL_FACTS["student_config"][recipe]
    changes = dict(FACTS["student_config"][recipe])
    if (version, recipe) == ("v2", "tiny"):
        changes |= FACTS["student_config_v2_tiny_too"]
    return UNETS[version] | changes


def taps(recipe: str, version: str = "v1") -> list[tuple[str, str]]:
    """Pairs (teacher's module, student's module)."""
    if version == "xl":
        return [(stage, stage) for side in ("down_blocks", "up_blocks") for stage in (f"{side}.{i}" for i in range(3))]
    return [(teacher, student) for teacher, student in FACTS["taps_teacher_student"][recipe]]
