"""What prepares data."""

from dataclasses import dataclass
from typing import Literal

from bksdm.options.shared import Computing, Precision, Printing, own_first


@own_first
@dataclass(frozen=True)
class PrepareOptions(Computing, Printing):
    """Compute the latents of a data set once, for retraining that is free of the VAE.

    Attributes:
        data: Folder of pictures with metadata.csv or metadata.jsonl (file_name,text) or with a .txt beside each,
            WebDataset .tar or folder of such, .parquet or folder of such, data set saved by Hugging Face's datasets,
            its Hub id, or 'emoji'.
        teacher: Folder, .safetensors file, Hub id, 'emoji' or 'emoji-flow'; its VAE makes the latents.
        out: Folder for the latents; the same command goes on where it stopped.
        resolution: Side of the pictures in pixels; the teacher's own by default.
        flip: Encode mirrored copies too, for a retraining that flips.
        text_embeddings: Keep the embedded captions as well; without them, retraining runs the text encoder.
        storage: Number format on the disk; fp16 takes half the room, and rounds by about the posterior's deviation.
        precision: Type in which the VAE and the text encoder compute; fp32 is what retraining from pictures does.
        batch_size: Pictures at a time.
        shard_size: Pictures a file; what a kill can lose.
        image_column: Column of the pictures, image or file_name by default; in tars, what follows the name of a sample,
            such as edited.jpg.
        text_column: Column of the captions, text, caption or prompt by default; in tars and beside pictures, a suffix,
            txt by default, or an entry of the json.
        split: Part of a data set, by default train or the only one.
        max_broken: Largest share of pictures that may be unreadable; they are skipped and listed in skipped.jsonl.
        workers: Processes that read pictures ahead, if there are as many processors.
    """

    data: str
    teacher: str
    out: str
    resolution: int | None = None
    flip: bool = True
    text_embeddings: bool = False
    storage: Literal["fp32", "fp16"] = "fp32"
    precision: Precision = "fp32"
    batch_size: int = 16
    shard_size: int = 512
    image_column: str | None = None
    text_column: str | None = None
    split: str | None = None
    max_broken: float = 0.1
    workers: int = 2
