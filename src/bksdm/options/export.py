"""What writes a model for others."""

from dataclasses import dataclass
from typing import Literal

from bksdm.options.shared import Printing, own_first

ExportFormat = Literal[
    "onnx", "openvino", "coreml", "gguf", "executorch", "ldm", "taesd", "tensorrt", "diffusers", "transformer", "web"
]


@own_first
@dataclass(frozen=True)
class ExportOptions(Printing):
    """Write a model for another runtime, compared with torch before it is called done.

    Attributes:
        model: Folder, .safetensors file, Hub id, 'emoji' or 'emoji-flow'.
        to: Format; diffusers turns a single file back into a folder, or a folder into one of another precision.
        out: Folder, or file for the formats that are one file (ldm, taesd: .safetensors, gguf: .gguf;
            transformer: that network alone, .safetensors).
        precision: Of the weights; by default the first that the format has. onnx fp32 fp16 int8; openvino fp32 fp16
            int8 int4 w8a8; coreml fp16 fp32 6bit 4bit; gguf q8_0 q4_0 fp16; executorch fp32; ldm fp32 fp16; taesd fp32
            fp16; tensorrt fp16 fp32; web int8 int4 fp16 fp32; diffusers and transformer keep (as it is) fp32 fp16 bf16.
        height: Height in pixels of the pictures that a format of fixed size makes; the model's own by default.
        width: Width in pixels; the model's own by default.
        batch_size: Pictures at a time, for the formats of fixed size.
        attention: How attention is written for Core ML; split_einsum is for the Neural Engine.
        decoder: Folder or Hub id of an AutoencoderTiny that decodes in the place of the model's own, or 'emoji' for
            its; this alone is what taesd writes.
        calibration: File of prompts whose denoising steps w8a8 is fitted to.
        scheduler: Name of a diffusers scheduler, such as DDIMScheduler, in the place of the model's own.
        unpickle: Convert pickled weights to safetensors, reading tensors and running nothing: a folder with .bin --to
            diffusers, a .ckpt file --to ldm. No other command opens them.
        pool_keys: Let the U-Net's outermost self-attentions have keys and values of means over squares of so many
            tokens a side, such as 2; it then always draws so.
        npm: Folder with the packages that web holds, as npm pack writes them; npm fetches them by default.
    """

    model: str
    to: ExportFormat
    out: str
    precision: str | None = None
    height: int | None = None
    width: int | None = None
    batch_size: int = 1
    attention: Literal["original", "split_einsum"] = "original"
    decoder: str | None = None
    calibration: str | None = None
    scheduler: str | None = None
    unpickle: bool = False
    pool_keys: int | None = None
    npm: str | None = None


@own_first
@dataclass(frozen=True)
class PushOptions(Printing):
    """Publish a model on the Hugging Face Hub: what goes there is written to a folder and checked first.

    Attributes:
        model: Folder that `bksdm prune`, `distill`, `lcm` or `personalize` wrote.
        repo: Name on the Hub, such as you/small-sd.
        out: Folder for what is to be uploaded.
        teacher: Model that it was made from, by its name on the Hub; that of the card by default. Its licence holds on.
        license: Licence, as the Hub names them, such as creativeml-openrail-m; the teacher's by default.
        data: What it learnt from, for the card; the data of the run by default.
        scores: scores.json of `bksdm evaluate`, for the card.
        private: Keep the repository private.
        dry_run: Write and check the folder, and upload nothing.
    """

    model: str
    repo: str
    out: str
    teacher: str | None = None
    license: str | None = None
    data: str | None = None
    scores: str | None = None
    private: bool = False
    dry_run: bool = False
