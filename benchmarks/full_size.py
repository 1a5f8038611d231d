"""Stable Diffusion v1.4 and its students at full size with random weights: speed and memory do not depend on them.

    python benchmarks/full_size.py runs/full --recipes base small tiny     # folders: teacher, base, small, tiny

Configs are the published ones. The tokenizer is the embedded model's, made to give 77 tokens: a hub cannot be reached
everywhere, and what a caption says makes no difference here. Weights are drawn from one seed.
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from plan import TEXT_ENCODER, VAE
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from bksdm.common.assets import asset
from bksdm.models.pipelines import save_pipeline
from bksdm.options.pruning import PruneOptions
from bksdm.pruning.run import prune

DATA = Path(__file__).parents[1] / "tests" / "data"
NOISE_SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def stable_diffusion(unet: Path = DATA / "unet_sd_v1.4.json") -> StableDiffusionPipeline:
    """A pipeline around the U-Net with this config, with random weights."""
    torch.manual_seed(0)
    words = asset("emoji", "model", "tokenizer")
    merges = [tuple(line.split()) for line in (words / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]]
    vocabulary = json.loads((words / "vocab.json").read_text(encoding="utf-8"))
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TEXT_ENCODER["max_position_embeddings"])
    text = CLIPTextConfig(**TEXT_ENCODER, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL(**VAE).eval(),
        text_encoder=CLIPTextModel(text).eval(),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel.from_config(json.loads(unet.read_text())).eval(),
        scheduler=PNDMScheduler(**NOISE_SCHEDULE, skip_prk_steps=True),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def folders(out: Path, recipes: list[str]) -> dict[str, Path]:
    """The teacher and its students on the disk, by name; those that are there are left as they are."""
    found = {"teacher": out / "teacher"}
    if not found["teacher"].exists():
        save_pipeline(stable_diffusion(), found["teacher"])
    for recipe in recipes:
        found[recipe] = out / recipe
        prune(PruneOptions(str(found["teacher"]), recipe, str(found[recipe])))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--recipes", nargs="*", default=["base", "small", "tiny"])
    given = parser.parse_args()
    for name, folder in folders(given.out, given.recipes).items():
        print(name, folder)


if __name__ == "__main__":
    main()
