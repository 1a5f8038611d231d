#!/usr/bin/env bash
# diffusers cannot draw from a folder that it saved itself in half precision, unless a dtype is given at loading.
#
# A pipeline in float16 is saved by save_pretrained and loaded by from_pretrained with no dtype. diffusers loads its own
# networks (U-Net, VAE) in float32; the text encoder is transformers', which loads in the dtype that its config.json
# names, and there stands float16. The first matrix product of the U-Net's cross-attention then fails. It matters to
# whoever publishes such folders: people load them without a dtype. "float32" in the text encoder's config is enough.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0 numpy==2.4.6
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
import json
from importlib.metadata import version
from pathlib import Path

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

print("diffusers", version("diffusers"), "transformers", version("transformers"))
vocabulary = {token: number for number, token in enumerate(["a", "a</w>", "<|startoftext|>", "<|endoftext|>"])}
tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=8)
text = CLIPTextConfig(vocab_size=4, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                      max_position_embeddings=8, bos_token_id=2, eos_token_id=3, pad_token_id=3)
unet = UNet2DConditionModel(sample_size=8, block_out_channels=(32, 32), cross_attention_dim=32, norm_num_groups=8,
                            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), layers_per_block=1)
pipeline = StableDiffusionPipeline(
    vae=AutoencoderKL(block_out_channels=(32,), norm_num_groups=8), text_encoder=CLIPTextModel(text),
    tokenizer=tokenizer, unet=unet, scheduler=PNDMScheduler(skip_prk_steps=True, steps_offset=1),
    safety_checker=None, feature_extractor=None, requires_safety_checker=False)
pipeline.to(torch.float16).save_pretrained("half")


def drawn() -> str:
    loaded = StableDiffusionPipeline.from_pretrained("half")
    print({name: str(getattr(loaded, name).dtype) for name in ("unet", "vae", "text_encoder")})
    loaded.set_progress_bar_config(disable=True)
    try:
        loaded("a", num_inference_steps=1)
    except RuntimeError as error:
        return str(error)
    return "a picture"


as_saved = drawn()
print("as it was saved:", as_saved)
file = Path("half/text_encoder/config.json")
file.write_text(json.dumps(json.loads(file.read_text()) | {"dtype": "float32"}))
mended = drawn()
print("with float32 in the text encoder's config:", mended)
assert "must have the same dtype" in as_saved, "it draws now"
assert mended == "a picture", "this mends it no longer"
PYTHON
