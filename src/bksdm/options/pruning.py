"""What describes, prunes and finds out what blocks are worth."""

from dataclasses import KW_ONLY, dataclass
from typing import Literal

from bksdm.options.shared import Computing, Precision, Printing, Seeded, own_first

UnitScore = Literal["output", "frechet", "clip", "latents"]


@own_first
@dataclass(frozen=True)
class DescribeOptions(Printing):
    """Show which blocks a recipe keeps and removes, parameters and multiply-accumulates.

    Attributes:
        model: Folder, .safetensors file, Hub id, 'emoji' or 'emoji-flow'; a folder may hold only unet/config.json.
        recipe: base, small, tiny; for SDXL base, small, ssd-1b, vega, koala-1b, koala-700m, comfy; or a YAML file;
            without one, the model as it is.
    """

    model: str
    recipe: str | None = None


@own_first
@dataclass(frozen=True)
class PruneOptions(Computing, Printing):
    """Make a student that inherits the teacher's weights.

    Attributes:
        teacher: Folder, .safetensors file, Hub id, 'emoji' or 'emoji-flow'.
        recipe: base, small, tiny, or a YAML file.
        out: Folder for the student, in diffusers format.
        precision: Number format of the weights; keep leaves each network the one that it has in the teacher.
        repair: Captioned pictures, as prepare takes them, on which the layers that stay are brought by least squares to
            what the teacher has there; repair.json then tells how far.
        repair_pictures: Noisy latents for that.
        ridge: How much the least squares keep to the inherited weights, as a share of the mean square of what is
            multiplied by them.
        seed: Root of noise and timesteps for that.
    """

    teacher: str
    recipe: str
    out: str
    precision: Literal["keep", "fp32", "bf16", "fp16"] = "keep"
    repair: str | None = None
    _: KW_ONLY
    repair_pictures: int = 192
    ridge: float = 0.03
    seed: int = 0


@own_first
@dataclass(frozen=True)
class SensitivityOptions(Seeded):
    """Measure what each block of the U-Net is worth, and find the recipe that loses least within a budget.

    Attributes:
        teacher: Folder, .safetensors file, Hub id, 'emoji' or 'emoji-flow'.
        data: Captioned pictures, as prepare takes them, for noisy latents, prompts and the real side of the distance.
        out: Folder for the scores, the page and recipe.yaml; the same command goes on where it stopped.
        scores: What is measured, of output, frechet, clip and latents; all by default, and output alone is quick.
        params: Budget of the recipe, as a share of the parameters of the teacher's U-Net.
        gmacs: Budget of the recipe, as a share of the multiply-accumulates of the teacher's U-Net.
        budget_score: Score that the recipe is to lose least of.
        encoder: CLIP folder or Hub id whose features are compared; the embedded one by default.
        pictures: Noisy latents and generated pictures for each block.
        scheduler: Name of a diffusers scheduler, such as DPMSolverMultistepScheduler; the teacher's own by default.
        seed: Seed of the first picture, and root of noise and timesteps.
        precision: Type of the weights.
    """

    teacher: str
    data: str
    out: str
    scores: list[UnitScore] | None = None
    params: float | None = None
    gmacs: float | None = None
    budget_score: UnitScore = "output"
    encoder: str = "emoji"
    pictures: int = 100
    scheduler: str | None = None
    precision: Precision = "auto"
    _: KW_ONLY
    batch_size: int = 16
