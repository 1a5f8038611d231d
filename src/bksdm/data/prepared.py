"""Prepared data: latents of captioned pictures, computed once and read from the disk as they are needed.

A prepared folder is a data set in the Arrow format of Hugging Face's `datasets`, which `load_from_disk` opens,
with one row a picture:

| column | what |
|---|---|
| `name`, `text` | where the picture came from, and its caption |
| `mean`, `std` | the VAE's posterior, scaled for the U-Net: C * h * w numbers each |
| `mean_flipped`, `std_flipped` | the same of the mirrored picture, if asked for |
| `context` | the embedded caption, L * D numbers, if asked for |
| others | what else the denoiser is told: of SDXL `text_embeds`, if asked for, and `time_ids` |

Numbers lie in lists of fixed size, so that a row is read from the memory-mapped file at its place. Keeping mean
and deviation, every draw of training samples the posterior anew, as it does from pictures. `prepared.json` says
what made the rows.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from bksdm.common.errors import InputError, one_line
from bksdm.common.runs import digest, replace_file, write_text
from bksdm.data.pictures import Size, flips
from bksdm.data.stream import Batch

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

ABOUT = "prepared.json"
Storage = Literal["fp32", "fp16"]


@dataclass(frozen=True)
class Prepared:
    """What a prepared folder holds.

    Attributes:
        teacher: The MODEL whose networks made it.
        vae: Digest of that VAE.
        text_encoder: Digest of that text encoder, or of all, where captions are embedded.
        source: Digest of the pictures that it was made from.
        resolution: Of the pictures in pixels.
        latent_shape: (C, h, w).
        context_shape: (L, D), where captions are embedded.
        flip: Whether there are mirrored copies.
        storage: Number format on the disk.
        told: Shapes of further conditions by name.
        pictures: Rows.
        skipped: Pictures that could not be read; `skipped.jsonl` lists them.
    """

    teacher: str
    vae: str
    text_encoder: str | None
    source: str
    resolution: Size
    latent_shape: tuple[int, int, int]
    context_shape: tuple[int, int] | None
    flip: bool
    storage: Storage
    pictures: int = 0
    skipped: int = 0
    told: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)

    @property
    def digest(self) -> str:
        return digest({name: value for name, value in dataclasses.asdict(self).items() if name != "told" or value})

    @property
    def conditions(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all conditions by name."""
        return ({"context": self.context_shape} if self.context_shape else {}) | self.told

    @property
    def columns(self) -> dict[str, int]:
        """Columns of numbers, and how many numbers each has in a row."""
        latent = int(np.prod(self.latent_shape))
        columns = {"mean": latent, "std": latent}
        if self.flip:
            columns |= {"mean_flipped": latent, "std_flipped": latent}
        return columns | {name: int(np.prod(shape)) for name, shape in self.conditions.items()}

    @property
    def schema(self) -> "pa.Schema":
        import pyarrow as pa  # noqa: PLC0415 - large, and other data do not need it

        numbers = {name: pa.list_(pa.from_numpy_dtype(self._kind(name)), n) for name, n in self.columns.items()}
        return pa.schema({"name": pa.string(), "text": pa.string(), **numbers})

    def _kind(self, column: str) -> type[np.floating[Any]]:
        """Number format of a column on the disk; sizes in pixels are no numbers to round."""
        return np.float16 if self.storage == "fp16" and column not in self.told else np.float32

    def rows(self, names: Sequence[str], texts: Sequence[str], numbers: dict[str, Tensor]) -> "pa.RecordBatch":
        """B rows from tensors with shape (B, ...)."""
        import pyarrow as pa  # noqa: PLC0415 - as above

        columns = [pa.array(names, pa.string()), pa.array(texts, pa.string())]
        for name, size in self.columns.items():
            flat = numbers[name].float().cpu().numpy().astype(self._kind(name)).reshape(-1)
            columns.append(pa.FixedSizeListArray.from_arrays(pa.array(flat), size))
        return pa.record_batch(columns, schema=self.schema)


def is_prepared(data: str | Path) -> bool:
    """Whether DATA is a folder that `bksdm prepare` wrote, or began to."""
    path = Path(data)
    return (path / ABOUT).is_file() or (path / "shards").is_dir()


def read_prepared(folder: Path) -> Prepared:
    """What a prepared folder holds.

    Raises:
        InputError: It is not finished, or was not made by `bksdm prepare`.
    """
    if not (folder / ABOUT).is_file():
        raise InputError(f"{folder} is not finished; run the bksdm prepare that made it again, it goes on")
    try:
        values = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        for name in ("latent_shape", "context_shape", "resolution"):
            values[name] = tuple(values[name]) if isinstance(values[name], list) else values[name]
        values["told"] = {name: tuple(shape) for name, shape in values.get("told", {}).items()}
        return Prepared(**{field.name: values[field.name] for field in dataclasses.fields(Prepared)})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{folder / ABOUT} was not written by this bksdm prepare ({error}); prepare again") from error


@contextmanager
def write_shard(file: Path, schema: "pa.Schema") -> Iterator[Callable[["pa.RecordBatch"], None]]:
    """A function that adds rows to `file`, which appears when the block ends without an error."""
    import pyarrow as pa  # noqa: PLC0415 - as above

    try:
        with (
            replace_file(file) as partial,
            pa.OSFile(str(partial), "wb") as sink,
            pa.ipc.new_stream(sink, schema) as stream,
        ):
            yield stream.write_batch
    except OSError as error:
        raise InputError(
            f"{file} cannot be written ({' '.join(str(error).split())}); make room and run the same command again, "
            f"it goes on after the last whole shard"
        ) from error


def write_index(folder: Path, shards: Sequence[str], about: Prepared, extra: dict[str, Any]) -> None:
    """Make a folder of shards one data set, for `datasets.load_from_disk` and `read_prepared`."""
    import datasets  # noqa: PLC0415 - slow to import, and most of what is here works without

    features = datasets.Features.from_arrow_schema(about.schema)
    info = datasets.DatasetInfo(description="Latents by bksdm prepare.", features=features)
    write_text(folder / "dataset_info.json", json.dumps(dataclasses.asdict(info), indent=2, default=str) + "\n")
    state: dict[str, Any] = {
        "_data_files": [{"filename": name} for name in shards],
        "_fingerprint": about.digest,
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    write_text(folder / "state.json", json.dumps(state, indent=2) + "\n")
    write_text(folder / ABOUT, json.dumps({**dataclasses.asdict(about), **extra}, indent=2) + "\n")


class PreparedSamples:
    """The rows of a prepared folder.

    A sample has `latents_mean` and `latents_std` with shape (C, h, w), the conditions that the folder has, and
    `input_ids` where captions are not embedded.

    Arguments:
        folder: The folder.
        about: What it holds.
        tokenize: Turns a caption into `input_ids`.
        flip: Whether every other draw is mirrored, by chance.

    Raises:
        InputError: A file is missing or cut short.
    """

    def __init__(self, folder: Path, about: Prepared, tokenize: Callable[[str], Tensor], flip: bool = False) -> None:
        self._rows = open_rows(folder, about)
        self._about = about
        self._tokenize = tokenize
        self._flip = flip

    def __len__(self) -> int:
        return self._about.pictures

    def name(self, index: int) -> str:
        return _text(self._rows[index], "name")

    def sample(self, index: int, rng_seed: int) -> Batch:
        row, about = self._rows[index], self._about
        copy = "_flipped" if self._flip and flips(rng_seed) else ""
        sample = {
            "latents_mean": _numbers(row, f"mean{copy}", about.latent_shape),
            "latents_std": _numbers(row, f"std{copy}", about.latent_shape),
        }
        sample |= {name: _numbers(row, name, shape) for name, shape in about.conditions.items()}
        return sample if about.context_shape else sample | {"input_ids": self._tokenize(_text(row, "text"))}


def open_captions(folder: Path, about: Prepared, indices: Sequence[int]) -> list[str]:
    """The captions of some rows."""
    rows = open_rows(folder, about)
    return [_text(rows[index], "text") for index in indices]


def open_rows(folder: Path, about: Prepared) -> "Dataset":
    """The memory-mapped rows, each an Arrow table.

    Raises:
        InputError: A file is missing or cut short.
    """
    import datasets  # noqa: PLC0415 - slow to import, and writing works without

    try:
        rows = datasets.load_from_disk(str(folder))
    except Exception as error:  # Arrow and datasets have many ways to say that a file is damaged
        reason = one_line(error)
        raise InputError(f"prepared data {folder} cannot be read ({reason}); prepare it again") from error
    if len(rows) != about.pictures or rows.column_names != about.schema.names:
        raise InputError(
            f"prepared data {folder} has {len(rows)} rows of {', '.join(rows.column_names)}, and its {ABOUT} "
            f"speaks of {about.pictures} of {', '.join(about.schema.names)}; prepare it again"
        )
    return rows.with_format("arrow")


def _text(row: "pa.Table", column: str) -> str:
    return str(row.column(column)[0])


def _numbers(row: "pa.Table", column: str, shape: tuple[int, ...]) -> Tensor:
    flat = row.column(column).chunk(0).flatten().to_numpy()
    return torch.from_numpy(flat.astype(np.float32)).view(shape)
