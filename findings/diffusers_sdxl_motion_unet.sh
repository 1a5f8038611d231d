#!/usr/bin/env bash
# UNetMotionModel.from_unet2d of diffusers 0.42.1 copies every weight of an SDXL U-Net but those of add_embedding, which
# takes the pooled caption and the sizes: these stay random, without a word, so that what it draws changes from run to run.
# AnimateDiffSDXLPipeline makes its U-Net in this way. Seen on 2026-11-28. Exits with 1 if this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - 2> log <<'PYTHON'
import diffusers
import torch
from diffusers import MotionAdapter, UNet2DConditionModel, UNetMotionModel

unet = UNet2DConditionModel(
    block_out_channels=(16, 32),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    cross_attention_dim=16,
    attention_head_dim=(2, 4),
    norm_num_groups=8,
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=64,
)
adapter = MotionAdapter(
    block_out_channels=(16, 32), motion_layers_per_block=1, motion_num_attention_heads=2, motion_norm_num_groups=8
)
moving = UNetMotionModel.from_unet2d(unet, adapter).state_dict()
others = sorted({name.partition(".")[0] for name, tensor in unet.state_dict().items() if not tensor.equal(moving[name])})
print("diffusers", diffusers.__version__, "differs in", others)
assert others == ["add_embedding"], others
PYTHON
