"""The folders that a pipeline of diffusers consists of: where their weights lie, and how they are copied.

Weights are one file, NAME.safetensors, or pieces with an index. diffusers and transformers read a variant,
NAME.fp16.safetensors, where it is asked for by name; here it stands in where there is nothing else.

A file of safetensors is a header, which says where each tensor lies, and their bytes behind one another. A tensor that
takes another name or place keeps its bytes, so torch is imported only where numbers are read.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from safetensors import safe_open

from bksdm.common.errors import InputError
from bksdm.common.runs import replace_file, write_text
from bksdm.data.names import files_in

if TYPE_CHECKING:
    import torch
    from torch import Tensor

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
PIECE = 10 * 10**9  # bytes
_BUFFER = 2**20  # bytes
# Number formats as safetensors calls them, by what torch does.
_STORED = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64", "int64": "I64", "int32": "I32"}
_READ = {name: dtype for dtype, name in _STORED.items()}
_HALF = ("F16", "BF16")


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
        return Weights(tuple(whole or _indexed(folder / f"{stem}.{suffix}.index", variant, files)), variant)
    return None


def _indexed(index: Path, variant: str | None, pieces: list[Path]) -> list[Path]:
    """Of pieces those that the index beside them names, if there is one; others are left from an earlier save."""
    file = index.with_name(f"{index.name}{f'.{variant}' if variant else ''}.json")
    try:
        named = set(json.loads(file.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return pieces
    return [piece for piece in pieces if piece.name in named] or pieces


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, which is not read.

    Attributes:
        file: The file.
        dtype: Its number format as safetensors calls it.
        shape: Its shape.
        start: Where its bytes begin in the file.
        size: How many they are.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int

    @property
    def is_read(self) -> bool:
        """Whether networks are kept in its number format here."""
        return self.dtype in _READ


def stored(files: Iterable[Path]) -> dict[str, Stored]:
    """The tensors of files that were found whole, by their names."""
    found = {}
    for file in files:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length))
        for name, about in header.items():
            if name != "__metadata__":
                start, end = about["data_offsets"]
                found[name] = Stored(file, about["dtype"], tuple(about["shape"]), 8 + length + start, end - start)
    return found


class Tensors(Mapping[str, "Tensor"]):
    """Tensors by name, each read from its file when it is asked for."""

    def __init__(self, weights: Weights) -> None:
        self._stored = stored(weights.files)
        self._opened: dict[Path, Any] = {}

    def __getitem__(self, name: str) -> Tensor:
        file = self._stored[name].file
        if file not in self._opened:  # once: all of its header is read then
            self._opened[file] = safe_open(file, framework="pt")
        return cast("Tensor", self._opened[file].get_tensor(name))

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, which is not read for that."""
        return self._stored[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """The number format of a tensor.

        Raises:
            InputError: It is none that networks are kept in here.
        """
        import torch

        tensor = self._stored[name]
        if not tensor.is_read:
            raise InputError(
                f"{tensor.file} has {name} in the number format {tensor.dtype}, which is not read; give a model in "
                f"bf16, fp16 or fp32"
            )
        return cast("torch.dtype", getattr(torch, _READ[tensor.dtype]))

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def write_weights(folder: Path, tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> None:
    """Write the weights of a network of diffusers, each tensor read and written before the next.

    Pieces are as large as diffusers makes them, and the bytes those of `safetensors.torch.save_file`.

    Arguments:
        folder: Of the network.
        tensors: By name.
        like: Tensors of the same names, shapes and number formats, whose numbers do not matter.
    """
    for file, names in _pieces(folder, {name: _bytes(tensor) for name, tensor in like.items()}):
        write_file(file, tensors, {name: like[name] for name in names})
    write_index(folder)


def copy_weights(folder: Path, tensors: Mapping[str, Stored]) -> None:
    """As `write_weights`, of tensors that lie in other files and keep their bytes."""
    for file, names in _pieces(folder, {name: tensor.size for name, tensor in tensors.items()}):
        copy_tensors(file, {name: tensors[name] for name in names})
    write_index(folder)


def _pieces(folder: Path, sizes: Mapping[str, int]) -> Iterator[tuple[Path, list[str]]]:
    """The files of a network whose tensors have these sizes in bytes, and what is in each."""
    pieces: list[list[str]] = [[]]
    whole = 0
    for name, size in sizes.items():
        whole += size
        if pieces[-1] and whole > PIECE:
            pieces.append([])
            whole = size
        pieces[-1].append(name)
    for number, names in enumerate(pieces, 1):
        of_several = f"-{number:05d}-of-{len(pieces):05d}" if len(pieces) > 1 else ""
        yield folder / f"{_STEMS[0]}{of_several}.safetensors", names


def write_file(
    file: Path, tensors: Mapping[str, Tensor], like: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write one file, each tensor read and written before the next.

    Arguments:
        file: Where to.
        tensors, like: As for `write_weights`.
        metadata: More texts for the header.
    """
    about = {
        name: (_STORED[_named(tensor.dtype)], tuple(tensor.shape), _bytes(tensor)) for name, tensor in like.items()
    }
    with file.open("wb") as opened:
        for name in _write_header(opened, about, metadata or {}):
            opened.write(_raw(tensors[name]))


def copy_tensors(file: Path, tensors: Mapping[str, Stored]) -> None:
    """Write one file of tensors that lie in others, of whose numbers none is read."""
    about = {name: (tensor.dtype, tensor.shape, tensor.size) for name, tensor in tensors.items()}
    with contextlib.ExitStack() as stack, file.open("wb") as opened:
        sources = {source: stack.enter_context(source.open("rb")) for source in {t.file for t in tensors.values()}}
        for name in _write_header(opened, about, {}):
            _copy_bytes(sources[tensors[name].file], tensors[name], opened)


def _write_header(
    opened: BinaryIO, about: Mapping[str, tuple[str, tuple[int, ...], int]], metadata: Mapping[str, str]
) -> list[str]:
    """Write where tensors will lie, given number format, shape and bytes of each; returns the order of their bytes.

    Wide numbers come first, so that all of them begin where a processor likes to read them.
    """
    names = sorted(about, key=lambda name: (-_width(about[name]), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name in names:
        dtype, shape, size = about[name]
        start, end = end, end + size
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    opened.write(len(text).to_bytes(8, "little") + text)
    return names


def _width(about: tuple[str, tuple[int, ...], int]) -> int:
    """Bytes of a number."""
    _, shape, size = about
    return size // max(1, prod(shape))


def _copy_bytes(source: BinaryIO, tensor: Stored, target: BinaryIO) -> None:
    source.seek(tensor.start)
    left = tensor.size
    while left:
        found = source.read(min(left, _BUFFER))
        if not found:
            raise InputError(f"{tensor.file} is cut short; copy or make it again")
        target.write(found)
        left -= len(found)


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _raw(tensor: Tensor) -> memoryview:
    import torch

    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


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
        shutil.copyfile(file, target / plain_name(file, alone=len(files) == 1))
    if weights and weights.variant:
        write_index(target)


def copy_papers(source: Path, target: Path) -> None:
    """Copy the card, licences and notices of a model."""
    for file in (found for pattern in PAPERS for found in source.glob(pattern) if found.is_file()):
        shutil.copyfile(file, target / file.name)


def rewrite_weights(folder: Path, dtype: torch.dtype | None, prefix: str = "") -> None:
    """Bring the weights of a part into a number format, if one is given, and let their names begin with `prefix`."""
    weights = find_weights(folder)
    tensors = stored(weights.files) if weights else {}
    wanted = None if _stored_in(tensors.values(), dtype) else dtype
    if weights is None or (wanted is None and all(name.startswith(prefix) for name in tensors)):
        return
    for file in weights.files:
        with replace_file(file) as partial:
            if wanted:
                _convert(file, partial, wanted, prefix)
            else:
                named = {_prefixed(name, prefix): tensor for name, tensor in stored([file]).items()}
                copy_tensors(partial, named)
    write_index(folder)


def _convert(file: Path, target: Path, dtype: torch.dtype, prefix: str) -> None:
    from safetensors.torch import load_file, save_file

    tensors = {
        _prefixed(name, prefix): tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in load_file(file).items()
    }
    save_file(tensors, target, metadata={"format": "pt"})


def _prefixed(name: str, prefix: str) -> str:
    return name if name.startswith(prefix) else prefix + name


def _stored_in(tensors: Iterable[Stored], dtype: torch.dtype | None) -> bool:
    """Whether all numbers but whole ones are in a number format already, if one is given."""
    return dtype is None or all(tensor.dtype in (_STORED[_named(dtype)], "I32", "I64") for tensor in tensors)


def half_format(files: Iterable[Path], prefix: str = "") -> torch.dtype | None:
    """float16 or bfloat16, if most of the tensors whose names begin with `prefix` are so."""
    usual = _usual_format(files, prefix)
    if usual not in _HALF:
        return None
    import torch

    return cast("torch.dtype", getattr(torch, _READ[usual]))


def _usual_format(files: Iterable[Path], prefix: str = "") -> str | None:
    """The number format of most of the tensors whose names begin with `prefix`; None where there are none."""
    count = Counter(tensor.dtype for name, tensor in stored(files).items() if name.startswith(prefix))
    return count.most_common(1)[0][0] if count else None


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
    own = "half" if _usual_format(weights.files) in _HALF else "float32"
    if any(config.get(key, own) != "float32" for key in named):
        write_text(file, json.dumps(config | dict.fromkeys(named, "float32"), indent=2) + "\n")


def plain_name(file: Path, *, alone: bool = False) -> str:
    """The name of a file of weights without its variant, and without its number where it is the only piece."""
    name = _NAME.fullmatch(file.name)
    assert name
    piece = "" if alone else name["piece"] or ""
    return f"{name['stem']}{piece}.{name['suffix']}"


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
