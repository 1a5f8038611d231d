"""What draws."""

from dataclasses import dataclass
from typing import Literal

from bksdm.options.shared import Precision, Seeded, Sparing, own_first

Runtime = Literal["auto", "torch", "openvino", "onnx"]


@own_first
@dataclass(frozen=True)
class GenerateOptions(Seeded, Sparing):
    """Make pictures from prompts, one seed a picture.

    Attributes:
        model: Folder, .safetensors file, Hub id, 'emoji', 'emoji-flow', or folder that `bksdm export` wrote for onnx or
            openvino.
        out: Folder for the PNGs and metadata.jsonl; the same command makes only what is missing.
        prompt: One prompt or several.
        prompts: File with one prompt a line, or .csv, .tsv, .jsonl or .parquet with a column text, caption or prompt.
        images_per_prompt: Pictures of each prompt.
        negative_prompt: What the pictures should not show.
        scheduler: Name of a diffusers scheduler, such as DDIMScheduler; the model's own by default.
        fast: Draw in 10 steps of DPMSolverMultistepScheduler, with --reuse 3, where nothing else is asked for.
        height: Height in pixels; the model's own by default.
        width: Width in pixels; the model's own by default.
        image: Picture to start from (image-to-image); its middle, cut to the shape of the output.
        strength: Share of the denoising that is done anew with --image, in (0, 1].
        strengths: Several strengths in the place of one; grid.png then has a row a picture and a column a strength.
        mask: Picture of the size of --image, white where it is painted anew (in-painting); the rest stays as it is.
        lora: LoRA for this model, a .safetensors file or a folder with one.
        lora_scale: How strongly it counts.
        decoder: Folder or Hub id of an AutoencoderTiny that decodes in the place of the model's own; 'emoji' for its.
        runtime: What computes; auto takes torch, and on a CPU OpenVINO where converting saves more time than it takes.
        precision: Of the weights in torch, of the arithmetic in OpenVINO, where auto is fp32. Some CPUs do bf16 faster.
    """

    model: str
    out: str
    prompt: list[str] | None = None
    prompts: str | None = None
    images_per_prompt: int = 1
    negative_prompt: str = ""
    scheduler: str | None = None
    fast: bool = False
    height: int | None = None
    width: int | None = None
    image: str | None = None
    strength: float = 0.8
    strengths: list[float] | None = None
    mask: str | None = None
    lora: str | None = None
    lora_scale: float = 1.0
    decoder: str | None = None
    runtime: Runtime = "auto"
    precision: Precision = "auto"


@own_first
@dataclass(frozen=True)
class DemoOptions(Sparing):
    """Open a page to try a model on, beside another one if wished; it is reached from this machine alone.

    Attributes:
        model: Folder, .safetensors file, Hub id, or 'emoji'.
        compare: Model that draws the same beside it, such as the teacher.
        steps: Denoising steps that the page begins with; each model's own by default, else 25.
        guidance: Guidance scale that the page begins with, 1 for none; each model's own by default, else 7.5.
        decoder: Folder or Hub id of an AutoencoderTiny that decodes in the place of each model's own; 'emoji' for its.
        host: Address to listen at; 0.0.0.0 opens the page to the network.
        port: Port to listen at.
        waiting: How many may wait while one draws; others are told to come back.
        precision: Type of the weights.
        web: Folder of `bksdm export --to web`, which is served as it is, in the place of a model.
    """

    model: str = "emoji"
    compare: str | None = None
    decoder: str | None = None
    host: str = "127.0.0.1"
    port: int = 7860
    waiting: int = 8
    precision: Precision = "auto"
    web: str | None = None
