"""Assemble the embedded model from the newest checkpoints, and measure it.

    python examples/emoji/ship.py

Writes `model/`, `encoder/` and `art/` of the package's `emoji` assets; what it prints is what the
documents may quote. It works at any moment of the training.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from pretrain import (
    HERE,
    SIZE,
    Workspace,
    build_encoder,
    build_scheduler,
    build_teacher,
    build_vae,
    encode,
    trained,
)

from bksdm.common.assets import asset
from bksdm.common.runs import replace_folder
from bksdm.data.folder import read_captions
from bksdm.data.pictures import to_pixels
from bksdm.distill.conditions import Conditions
from bksdm.evaluate.encoder import DualEncoder
from bksdm.evaluate.scores import retrieval_r1
from bksdm.families.sd import StableDiffusion
from bksdm.models.folders import save_vocabulary
from bksdm.models.pipelines import save_pipeline, tokenizing
from bksdm.runtime.defaults import Defaults, as_files

DRAWS_BEST = Defaults(steps=25, guidance=2.5)  # docs/log.md
CARD = """---
license: cc-by-4.0
library_name: diffusers
pipeline_tag: text-to-image
---
# emoji

A small text-to-image pipeline in the shape of Stable Diffusion v1: 64 px, latents of 16 x 16 x 4. It was
trained from nothing by `examples/emoji` of bksdm on open emoji art; see ATTRIBUTION.md beside this folder.
"""


def assemble_model(work: Workspace, out: Path) -> StableDiffusionPipeline:
    tokenizer = work.tokenizer()
    teacher = trained(build_teacher(tokenizer), work.stage("teacher"))
    vae = trained(build_vae(), work.stage("vae"))
    encode(Conditions(StableDiffusion(), vae, [teacher["text_encoder"]]), work.samples(tokenizing(tokenizer), "train"))
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=teacher["text_encoder"],
        tokenizer=tokenizer,
        unet=teacher["unet"],
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    save_pipeline(pipeline.to(torch.float16), out, {"README.md": CARD, **as_files(DRAWS_BEST)})
    return pipeline.to(torch.float32)


def assemble_encoder(work: Workspace, out: Path) -> None:
    tokenizer = work.tokenizer()
    with replace_folder(out) as partial:
        trained(build_encoder(tokenizer), work.stage("encoder")).half().save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        save_vocabulary(tokenizer, partial)
        colours = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        (partial / "preprocessor_config.json").write_text(json.dumps(colours) + "\n")


def copy_art(work: Workspace, out: Path) -> None:
    for split in ("train", "heldout"):
        with replace_folder(out / split) as partial:
            for entry in read_captions(work.root / "art" / split):
                entry.open().save(partial / entry.path.name, optimize=True)
            shutil.copy(work.root / "art" / split / "metadata.jsonl", partial)


@torch.no_grad()
def reconstruction_psnr(pipeline: StableDiffusionPipeline, split: Path) -> float:
    """Mean over pictures, in dB, for values in [0, 1]."""
    pixels = torch.stack([to_pixels(entry.open(), SIZE) for entry in read_captions(split)])
    decoded = pipeline.vae.decode(pipeline.vae.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
    squared = ((decoded - pixels) / 2).square().mean(dim=(1, 2, 3))
    return float((-10 * squared.log10()).mean())


def art_retrieval(art: Path) -> float:
    """R@1 among 100 captions of the dual encoder on real held-out art."""
    encoder = DualEncoder.load("emoji")
    entries = read_captions(art / "heldout")
    captions = [entry.text for split in ("heldout", "train") for entry in read_captions(art / split)]
    pool = dict(zip(captions, encoder.text_features(captions), strict=True))
    images = encoder.image_features([entry.open() for entry in entries])
    return retrieval_r1(images, [entry.text for entry in entries], pool, among=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=HERE / "work")
    parser.add_argument("--only", choices=("model", "encoder", "art"))
    arguments = parser.parse_args()
    work, out = Workspace(arguments.work), asset("emoji")
    if arguments.only in (None, "art"):
        copy_art(work, out / "art")
    if arguments.only in (None, "model"):
        pipeline = assemble_model(work, out / "model")
        for name in ("unet", "vae", "text_encoder"):
            print(f"{name}: {sum(p.numel() for p in getattr(pipeline, name).parameters()):,} parameters")
        print(f"VAE reconstruction of held-out art: {reconstruction_psnr(pipeline, out / 'art' / 'heldout'):.2f} dB")
    if arguments.only in (None, "encoder"):
        assemble_encoder(work, out / "encoder")
        print(f"dual encoder, held-out art, R@1 among 100: {art_retrieval(out / 'art'):.1%}")


if __name__ == "__main__":
    main()
