"""What scores and times."""

from dataclasses import KW_ONLY, dataclass, field
from typing import Literal

from bksdm.options.shared import Precision, Printing, Seeded, Sparing, own_first

Intervals = Literal["influence", "bootstrap"]


@own_first
@dataclass(frozen=True)
class EvaluateOptions(Seeded, Sparing):
    """Score one or several models' pictures against real ones, with uncertainty.

    Attributes:
        models: Folders, .safetensors files, Hub ids, 'emoji', 'emoji-flow', or folders of finished pictures; NAME=MODEL
            gives a name.
        out: Folder for report.html, scores.json, scores.csv, features and pictures; the same command goes on.
        reference: Real pictures in any layout of data, their statistics as pytorch-fid's .npz, or 'emoji'.
        prompts: File with one prompt a line, a table as of generate, or MS-COCO's captions_val2014.json; the
            reference's captions by default.
        limit: Use no more than the first so many prompts.
        scores: Scores to give, such as frechet_distance, kernel_distance, inception_score, precision, recall,
            clip_score, retrieval_r1, output_error, error_left; by default those that the features and the reference
            allow, which wants as many pictures as features, or more, for the Fréchet distance.
        features: Network whose features are compared, inception or the encoder; the embedded encoder for its art.
        inception_weights: File of the Inception network's weights; downloaded once and verified by default.
        encoder: CLIP folder or Hub id for the captions; ViT-g/14 by default, and for the embedded art its own.
        preparation: How pictures are made ready, paper (through JPEG to 256 px, as the paper's authors did) or none;
            auto takes paper for Inception features.
        distractors: Captions (as prompts) that fill the pool of the retrieval; for the embedded art, its own.
        teacher: Model whose outputs on the same noisy latents are compared.
        unseen: Captions (as prompts) that have no pictures: the teacher draws them, and error_left is given of these
            too; 'emoji/unseen' are some for the embedded art.
        images_per_prompt: Pictures of each prompt; two or more give the band from seed to seed.
        scheduler: Name of a diffusers scheduler, such as DDIMScheduler; each model's own by default.
        batch_size: Pictures at a time, at most 64.
        keep_pictures: Keep all pictures; else only those that the report shows.
        resamples: Resamples of the bootstrap over prompts.
        intervals: What gives the Fréchet distance's interval, its derivative by the weight of every picture (influence)
            or, as for the other scores, resamples (bootstrap).
        latency: Timed pictures of every model, for the plot of quality against latency; 0 for none.
        decoder: Folder or Hub id of an AutoencoderTiny that decodes in the place of each model's own; 'emoji' for its.
        precision: Type of the weights.
    """

    models: list[str]
    out: str
    reference: str = "emoji"
    prompts: str | None = None
    limit: int | None = None
    scores: list[str] | None = None
    features: str | None = None
    inception_weights: str | None = None
    encoder: str | None = None
    preparation: Literal["auto", "paper", "none"] = "auto"
    distractors: str | None = None
    teacher: str | None = None
    unseen: str | None = None
    images_per_prompt: int = 1
    scheduler: str | None = None
    keep_pictures: bool = True
    resamples: int = 200
    intervals: Intervals = "influence"
    latency: int = 3
    decoder: str | None = None
    precision: Precision = "auto"
    _: KW_ONLY
    batch_size: int = 16


@own_first
@dataclass(frozen=True)
class BenchmarkOptions(Sparing, Printing):
    """Measure latency, memory and cost of models side by side.

    Attributes:
        models: One model or several, each a folder, .safetensors file, Hub id, 'emoji', or a folder that `bksdm export`
            wrote for onnx or openvino; the first is compared with.
        out: Folder for benchmark.json and benchmark.csv; the same command measures again.
        batch_sizes: Pictures at a time, one number or several.
        rounds: Timed rounds; in each, every model does everything once.
        warmup: Rounds before those, which do not count.
        steps: Denoising steps of a whole picture; each model's own by default, else 25.
        guidance: Guidance scale, 1 for none, which halves the work of the U-Net; each model's own by default, else 7.5.
        height: Height in pixels; each model's own by default.
        width: Width in pixels; each model's own by default.
        decoder: Folder or Hub id of an AutoencoderTiny; every model is measured with its own decoder, then with this.
        runtimes: What computes: torch, openvino, onnx; a model is converted once for the others, and kept.
        precision: Type of the weights in torch.
    """

    models: list[str]
    out: str | None = None
    batch_sizes: list[int] = field(default_factory=lambda: [1, 4])
    rounds: int = 7
    warmup: int = 1
    height: int | None = None
    width: int | None = None
    decoder: str | None = None
    runtimes: list[Literal["torch", "openvino", "onnx"]] = field(default_factory=lambda: ["torch"])
    precision: Precision = "auto"
