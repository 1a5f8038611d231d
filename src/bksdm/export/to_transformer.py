"""The transformer alone as one `.safetensors` file with the names of its authors' checkpoints, for other programs."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from bksdm.common.devices import PRECISIONS
from bksdm.export.formats import Format
from bksdm.families import family_of_pipeline
from bksdm.families.originals import Joined
from bksdm.models.parts import Tensors, write_file
from bksdm.models.pipelines import denoiser, open_pipeline


class _Original(Mapping[str, Tensor]):
    """Tensors by their original names, each made when it is asked for."""

    def __init__(self, names: Mapping[str, Joined], tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> None:
        self._names, self._tensors, self._like = names, tensors, like

    def __getitem__(self, name: str) -> Tensor:
        return self._names[name].made(self._tensors).to(self._like[name].dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def stream(model: str, precision: str, file: Path) -> None:
    """Write the transformer of MODEL into `file`, every tensor in the number format that it has for `keep`."""
    pipeline, tensors = open_pipeline(model)
    family, network = family_of_pipeline(pipeline), denoiser(pipeline)
    names = family.original_tensors(network.state_dict().keys())

    def stored(name: str) -> torch.dtype:
        if precision != "keep":
            return PRECISIONS[precision]
        return tensors.dtype(name) if isinstance(tensors, Tensors) else tensors[name].dtype

    empty = {name: tensor.to(stored(name)) for name, tensor in network.state_dict().items()}
    like = {name: joined.made(empty) for name, joined in names.items()}
    write_file(file, _Original(names, tensors, like), like)


FORMAT = Format(
    name="transformer",
    precisions=("keep", "bf16", "fp16", "fp32"),
    packages={},
    stream=stream,
    suffix=".safetensors",
    has_scheduler=False,
)
