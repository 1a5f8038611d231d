"""What a repair has done, layer by layer: `repair.json` in the student's folder, and a table for people."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bksdm.common.tables import aligned

RECORD = "repair.json"


@dataclass(frozen=True)
class Residual:
    """How far what a layer of a student gives is from its teacher's, as a share of the teacher's mean square.

    Attributes:
        layer: Path in the student; "output" for what it answers.
        teacher: Path of the layer that it stands for.
        before: Before its own correction, and after that of the layers before it.
        after: After both.
    """

    layer: str
    teacher: str
    before: float
    after: float


@dataclass(frozen=True)
class Repaired:
    """A repair.

    Attributes:
        pictures: How many noisy latents were compared.
        output: Mean squared difference of the answers on them, just pruned and repaired.
        layers: In the order of the data.
    """

    pictures: int
    output: tuple[float, float]
    layers: tuple[Residual, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as in `repair.json`."""
        before, after = self.output
        layers: Sequence[dict[str, Any]] = [dataclasses.asdict(layer) for layer in self.layers]
        return {"pictures": self.pictures, "output_error": {"pruned": before, "repaired": after}, "layers": layers}

    def json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def read(cls, folder: str | Path) -> "Repaired | None":
        """Of a student in a folder; None where it was not repaired."""
        file = Path(folder) / RECORD
        if not file.is_file():
            return None
        values = json.loads(file.read_text(encoding="utf-8"))
        error = values["output_error"]
        layers = tuple(Residual(**layer) for layer in values["layers"])
        return cls(values["pictures"], (error["pruned"], error["repaired"]), layers)

    def text(self) -> str:
        """The table, and what has become of the answer."""
        rows = [["layer", "brought to the teacher's", "residual", "repaired"]]
        rows += [[own.layer, own.teacher, f"{own.before:.2%}", f"{own.after:.2%}"] for own in self.layers]
        before, after = self.output
        closed = f"{1 - after / before:.1%} closed" if before else "nothing to close"
        error = f"output error {before:.4g} -> {after:.4g}, {closed}"
        return f"{aligned(rows)}\n{error}, on the noisy latents that it fits ({self.pictures})"
