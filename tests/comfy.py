"""By what ComfyUI tells an SDXL checkpoint from its tensors' names, written without the package under test.

It counts the transformer layers of each ResNet's attention on the way down, and takes a file whose list is one of five;
the middle block and the way up are as they are. Read in comfy/model_detection.py and comfy/supported_models.py.
"""

import re
from collections import defaultdict
from collections.abc import Iterable

KNOWN = {
    "SDXL": [0, 0, 2, 2, 10, 10],
    "SSD-1B": [0, 0, 2, 2, 4, 4],
    "Vega": [0, 0, 1, 1, 2, 2],
    "KOALA-700M": [0, 2, 5],
    "KOALA-1B": [0, 2, 6],
}


def way_down(names: Iterable[str]) -> list[int]:
    """Transformer layers behind each ResNet of the way down."""
    blocks: dict[int, set[str]] = defaultdict(set)
    for name in names:
        found = re.match(r"model\.diffusion_model\.input_blocks\.(\d+)\.(.+)", name)
        if found:
            blocks[int(found[1])].add(found[2])
    resnets = [inside for _, inside in sorted(blocks.items()) if "0.in_layers.0.weight" in inside]
    return [len({n.split(".")[2] for n in inside if n.startswith("1.transformer_blocks.")}) for inside in resnets]


def taken_for(names: Iterable[str]) -> str | None:
    """The model that a checkpoint with these names is taken for; None where it is refused."""
    found = way_down(names)
    return next((name for name, depths in KNOWN.items() if depths == found), None)
