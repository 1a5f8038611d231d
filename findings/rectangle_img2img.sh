#!/usr/bin/env bash
# A U-Net whose sample_size is height and width draws in StableDiffusionPipeline, and the image-to-image and in-painting
# pipelines of the same parts cannot be made.
#
# UNet2DConditionModel takes sample_size as an int or as a pair, and StableDiffusionPipeline reads both. The constructors
# of StableDiffusionImg2ImgPipeline and StableDiffusionInpaintPipeline compare it with 64 and raise a TypeError. It
# matters to whoever starts from pictures with a model of wide ones: make the pipeline without its U-Net and set that
# afterwards.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0 numpy==2.4.6
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import diffusers
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel

print("diffusers", version("diffusers"))
unet = UNet2DConditionModel(sample_size=(8, 16), block_out_channels=(32, 32), cross_attention_dim=32, norm_num_groups=8,
                            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), layers_per_block=1)
parts = dict(vae=AutoencoderKL(block_out_channels=(32,), norm_num_groups=8), text_encoder=None, tokenizer=None,
             scheduler=PNDMScheduler(skip_prk_steps=True, steps_offset=1), safety_checker=None,
             feature_extractor=None, requires_safety_checker=False)
refused = []
for name in ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"):
    kind = getattr(diffusers, name)
    try:
        kind(**parts, unet=unet)
        print(name, "is made")
    except TypeError as error:
        print(name, "TypeError:", error)
        refused.append(name)
    kind(**parts, unet=None).unet = unet  # what helps
assert refused == ["StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"], refused
PYTHON
