#!/bin/sh
# DeepCache 0.1.1 fails on U-Nets without a middle block, which diffusers makes and draws with (mid_block_type=None).
#
# What: DeepCacheSDHelper.enable() asks unet.mid_block for its forward, and raises AttributeError where it is None;
# disable() then raises KeyError, because it looks up what was never wrapped.
# Why it matters: BK-SDM's small and tiny, and SDXS, have no middle block. Their users find DeepCache in diffusers'
# documentation as a drop-in acceleration. Token merging (tomesd) takes the same U-Nets.
#
# Exits 0 while it is so, and 1 when it is no longer.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 DeepCache==0.1.1
"$folder/venv/bin/python" - <<'PYTHON'
import sys
from importlib.metadata import version

import torch
from DeepCache import DeepCacheSDHelper
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

print({name: version(name) for name in ("DeepCache", "diffusers", "torch")})


def attempt(mid_block_type):
    """What drawing with DeepCache ends in, without it and with it."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        mid_block_type=mid_block_type,
        cross_attention_dim=16,
        norm_num_groups=16,
    ).eval()
    pipeline = StableDiffusionPipeline(
        vae=None,
        text_encoder=None,
        tokenizer=None,
        unet=unet,
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)

    def draw():
        embeds = torch.zeros(1, 4, 16)
        pipeline(
            prompt_embeds=embeds,
            negative_prompt_embeds=embeds,
            num_inference_steps=3,
            height=64,
            width=64,
            output_type="latent",
        )

    draw()
    helper = DeepCacheSDHelper(pipe=pipeline)
    helper.set_params(cache_interval=2, cache_branch_id=0)
    try:
        helper.enable()
        draw()
    except AttributeError as error:
        return f"AttributeError: {error}"
    return "draws"


found = {str(kind): attempt(kind) for kind in ("UNetMidBlock2DCrossAttn", None)}
for kind, ended in found.items():
    print(f"mid_block_type {kind}: with DeepCache {ended}")
expected = {
    "UNetMidBlock2DCrossAttn": "draws",
    "None": "AttributeError: 'NoneType' object has no attribute 'forward'",
}
sys.exit(0 if found == expected else 1)
PYTHON
