"""The published facts about BK-SDM (tests/data/published.json), read without the package under test."""

import json
from pathlib import Path

DATA = Path(__file__).parent / "data"
FACTS = json.loads((DATA / "published.json").read_text())
RECIPES = ("base", "small", "tiny")
UNETS = {
    "v1": json.loads((DATA / "unet_sd_v1.4.json").read_text()),
    "v2": json.loads((DATA / "unet_sd_v2.1_base.json").read_text()),
}


def teacher_key(student_key: str, recipe: str) -> str:
    """The teacher's tensor that a student's tensor is inherited from: the published prefixes, else the same name."""
    for student, teacher in FACTS["weights_student_from_teacher"][recipe]:
        if student_key.startswith(student):
            return teacher + student_key.removeprefix(student)
    return student_key


def student_config(version: str, recipe: str) -> dict:
    """The full-size student's config."""
    changes = dict(FACTS["student_config"][recipe])
    if (version, recipe) == ("v2", "tiny"):
        changes |= FACTS["student_config_v2_tiny_too"]
    return UNETS[version] | changes


def taps(recipe: str) -> list[tuple[str, str]]:
    """Pairs (teacher's module, student's module)."""
    return [(teacher, student) for teacher, student in FACTS["taps_teacher_student"][recipe]]
