"""The folders that a pipeline of diffusers consists of: where their weights lie, and how they are copied.

Weights are one file, NAME.safetensors, or pieces with an index. diffusers and transformers read a variant,
NAME.fp16.safetensors, where it is asked for by name; here it stands in where there is nothing else.
"""

import json
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from bksdm.common.errors import InputError
from bksdm.common.runs import write_text
from bksdm.data.names import files_in

_NAME = re.compile(
    r"(?P<stem>diffusion_pytorch_model|model|pytorch_model)(\.(?P<variant>[^.]+?))?(?P<piece>-\d{5}-of-\d{5})?"
    r"(\.(?P<late>[^.]+))?\.(?P<suffix>safetensors|bin)"
)
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_VARIANTS = (None, "fp16")
PAPERS = ("README.md", "LICEN[CS]E*", "Licen[cs]e*", "licen[cs]e*", "NOTICE*")  # beside the parts
_WEIGHTS = {".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle", ".msgpack", ".h5", ".pb", ".gguf"}
_WEIGHTS |= {".onnx", ".onnx_data", ".data", ".xml"}  # ONNX and OpenVINO, of which the rest lies in a .bin
_INDEX = re.compile(r".+\.index(\.[^.]+)?\.json")
_PIECE = 10 * 10**9  # bytes
_STORED = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
_STORED |= {torch.int64: "I64", torch.int32: "I32"}
_READ = {name: dtype for dtype, name in _STORED.items()}
_HALF = {"F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Weights:
    """The files with the weights of a part, and of which variant they are; None for the plain ones."""

    files: tuple[Path, ...]
    variant: str | None


def find_weights(folder: Path, suffix: str = "safetensors") -> Weights | None:
    """The weights in the folder of a part: the plain ones before those of a variant; None where there are none.

    Raises:
        InputError: There are several variants, and none that is usual.
    """
    found: dict[tuple[str, str | None], list[Path]] = defaultdict(list)
    for file in sorted(folder.iterdir()):
        name = _NAME.fullmatch(file.name)
        if name and name["suffix"] == suffix:
            found[name["stem"], name["variant"] or name["late"]].append(file)
    usual = [(stem, variant) for stem in _STEMS for variant in _VARIANTS if (stem, variant) in found]
    if not usual and len(found) > 1:
        raise InputError(
            f"{folder} has weights of {', '.join(str(variant) for _, variant in found)}; leave one of them"
        )
    for stem, variant in usual or found:
        files = found[stem, variant]
        whole = [file for file in files if "-of-" not in file.name]
        return Weights(tuple(whole or files), variant)
    return None


class Tensors(Mapping[str, Tensor]):
    """Tensors by name, each read from its file when it is asked for."""

    def __init__(self, weights: Weights) -> None:
        self._files: dict[str, Path] = {}
        self._about: dict[str, tuple[tuple[int, ...], str]] = {}
        for file in weights.files:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - not a mapping
                    tensor = opened.get_slice(name)
                    self._files[name], self._about[name] = file, (tuple(tensor.get_shape()), tensor.get_dtype())

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._files[name], framework="pt") as opened:
            return cast(Tensor, opened.get_tensor(name))

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, which is not read for that."""
        return self._about[name][0]

    def dtype(self, name: str) -> torch.dtype:
        """The number format of a tensor.

        Raises:
            InputError: It is none that networks are kept in here.
        """
        if self.stored(name) not in _READ:
            raise InputError(
                f"{self._files[name]} has {name} in the number format {self.stored(name)}, which is not read; give a "
                f"model in bf16, fp16 or fp32"
            )
        return _READ[self.stored(name)]

    def stored(self, name: str) -> str:
        """The number format of a tensor as safetensors calls it."""
        return self._about[name][1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def write_weights(folder: Path, tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> None:
    """Write the weights of a network of diffusers, each tensor read and written before the next.

    Pieces are as large as diffusers makes them, and the bytes those of `safetensors.torch.save_file`.

    Arguments:
        folder: Of the network.
        tensors: By name.
        like: Tensors of the same names, shapes and number formats, whose numbers do not matter.
    """
    pieces: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in like.items():
        size += _bytes(tensor)
        if pieces[-1] and size > _PIECE:
            pieces.append({})
            size = _bytes(tensor)
        pieces[-1][name] = tensor
    for number, piece in enumerate(pieces, 1):
        of_several = f"-{number:05d}-of-{len(pieces):05d}" if len(pieces) > 1 else ""
        write_file(folder / f"{_STEMS[0]}{of_several}.safetensors", tensors, piece)
    write_index(folder)


def write_file(
    file: Path, tensors: Mapping[str, Tensor], like: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write one file, each tensor read and written before the next.

    Arguments:
        file: Where to.
        tensors, like: As for `write_weights`.
        metadata: More texts for the header.
    """
    names = sorted(like, key=lambda name: (-like[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name in names:
        start, end = end, end + _bytes(like[name])
        header[name] = {
            "dtype": _STORED[like[name].dtype],
            "shape": list(like[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            opened.write(tensors[name].contiguous().flatten().view(torch.uint8).numpy().data)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def copy_part(source: Path, target: Path) -> None:
    """Copy a part, its weights under the names that are looked for first; every byte stays.

    Pickles, weights of other variants and of other libraries stay behind, and hidden files.
    """
    target.mkdir(exist_ok=True)
    weights = find_weights(source)
    files = weights.files if weights else ()
    index = {f"{plain_name(file).partition('-')[0]}.safetensors.index.json" for file in files[1:]}
    for name in files_in(source):
        file = source / name
        if file.suffix not in _WEIGHTS and (file.name in index or not _INDEX.fullmatch(file.name)):
            (target / name).parent.mkdir(exist_ok=True, parents=True)
            shutil.copyfile(file, target / name)
    for file in files:
        shutil.copyfile(file, target / plain_name(file))
    if weights and weights.variant:
        write_index(target)


def copy_papers(source: Path, target: Path) -> None:
    """Copy the card, licences and notices of a model."""
    for file in (found for pattern in PAPERS for found in source.glob(pattern) if found.is_file()):
        shutil.copyfile(file, target / file.name)


def rewrite_weights(folder: Path, dtype: torch.dtype | None, prefix: str = "") -> None:
    """Bring the weights of a part into a number format, if one is given, and let their names begin with `prefix`."""
    weights = find_weights(folder)
    if weights is None or (_stored_in(weights, dtype) and all(name.startswith(prefix) for name in Tensors(weights))):
        return
    for file in weights.files:
        tensors = {
            name if name.startswith(prefix) else prefix + name: t.to(dtype) if dtype and t.is_floating_point() else t
            for name, t in load_file(file).items()
        }
        save_file(tensors, file, metadata={"format": "pt"})
    write_index(folder)


def _stored_in(weights: Weights, dtype: torch.dtype | None) -> bool:
    """Whether all numbers but whole ones are in a number format already, if one is given."""
    tensors = Tensors(weights)
    return dtype is None or all(tensors.stored(name) in (_STORED[dtype], "I32", "I64") for name in tensors)


def half_format(files: Iterable[Path], prefix: str = "") -> torch.dtype | None:
    """float16 or bfloat16, if most of the tensors whose names begin with `prefix` are so."""
    count: Counter[str] = Counter()
    for file in files:
        with safe_open(file, framework="pt") as opened:
            names = [name for name in opened.keys() if name.startswith(prefix)]  # noqa: SIM118 - not a mapping
            count.update(opened.get_slice(name).get_dtype() for name in names)
    return _HALF.get(count.most_common(1)[0][0]) if count else None


def load_in_float32(folder: Path) -> None:
    """Let a network of transformers load in float32 where its user asks for nothing.

    Those of diffusers do. transformers takes the format that `config.json` names, or else that of the weights, and
    networks of two formats do not compute together.
    """
    file, weights = folder / "config.json", find_weights(folder)
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if weights is None or "_class_name" in config:
        return
    named = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    stored = "float32" if half_format(weights.files) is None else "half"
    if any(config.get(key, stored) != "float32" for key in named):
        write_text(file, json.dumps(config | dict.fromkeys(named, "float32"), indent=2) + "\n")


def plain_name(file: Path) -> str:
    """The name of a file of weights without its variant."""
    name = _NAME.fullmatch(file.name)
    assert name
    return f"{name['stem']}{name['piece'] or ''}.{name['suffix']}"


def write_index(folder: Path) -> None:
    """Say which tensor is in which piece, where the weights lie in pieces."""
    weights = find_weights(folder)
    if weights is None or len(weights.files) == 1:
        return
    places = {name: file.name for file in weights.files for name in Tensors(Weights((file,), None))}
    size = sum(file.stat().st_size for file in weights.files)
    stem = weights.files[0].name.partition("-")[0]
    text = json.dumps({"metadata": {"total_size": size}, "weight_map": places}, indent=2)
    write_text(folder / f"{stem}.safetensors.index.json", text + "\n")
