"""The embedded model: what is shipped does what the documents say of it."""

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, ZImagePipeline

from bksdm.api import describe
from bksdm.common.assets import EMBEDDED, asset
from bksdm.data.folder import read_captions
from bksdm.data.pictures import open_picture, to_pixels
from bksdm.data.prompts import read_prompts
from bksdm.evaluate.encoder import DualEncoder
from bksdm.evaluate.scores import retrieval_r1
from bksdm.generate.run import generate
from bksdm.models.pipelines import load_pipeline
from bksdm.options.generate import GenerateOptions

ART = asset("emoji", "art")
ENOUGH = 60  # pictures whose captions are of different subjects


@pytest.mark.parametrize(("name", "most"), [("emoji", 30e6), ("emoji-flow", 12e6)])
def test_what_ships_is_small(name: str, most: float) -> None:
    assert sum(path.stat().st_size for path in asset(name).rglob("*") if path.is_file()) < most


def test_the_flow_teacher_is_a_stock_pipeline_in_the_shape_of_z_image() -> None:
    pipeline = DiffusionPipeline.from_pretrained(asset("emoji-flow", "model"), local_files_only=True)
    assert type(pipeline) is ZImagePipeline
    assert pipeline.transformer.config.n_layers == 12
    assert describe("emoji-flow", "half").pruning.student_config["n_layers"] == 6


def test_nothing_that_is_held_out_is_trained_on() -> None:
    held_out, train = ({entry.text for entry in read_captions(ART / split)} for split in ("heldout", "train"))
    assert len(held_out) == 75
    assert not held_out & train


@torch.no_grad()
def test_the_autoencoder_reconstructs_held_out_art() -> None:
    pixels = torch.stack([to_pixels(entry.open(), 64) for entry in read_captions(ART / "heldout")])
    vae = load_pipeline("emoji").vae
    decoded = vae.decode(vae.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
    psnr = -10 * ((decoded - pixels) / 2).square().mean(dim=(1, 2, 3)).log10()
    assert psnr.mean() >= 26


@pytest.mark.slow
@pytest.mark.parametrize("teacher", EMBEDDED)
def test_the_teachers_pictures_are_recognised(teacher: str, tmp_path: Path) -> None:
    captions = read_prompts("emoji/train")
    chosen = captions[:: len(captions) // ENOUGH]
    made = generate(GenerateOptions(teacher, out=str(tmp_path), prompt=chosen, batch_size=20))
    encoder = DualEncoder.load("emoji")
    known = list(dict.fromkeys([*captions, *(entry.text for entry in read_captions(ART / "heldout"))]))
    pool = dict(zip(known, encoder.text_features(known), strict=True))
    pictures = encoder.image_features([open_picture(path) for path in made])
    assert retrieval_r1(pictures, chosen, pool, among=100) >= 0.6
