#!/usr/bin/env bash
# diffusers 0.42.1 leaves out parts of LoRAs in kohya's names for Stable Diffusion 1.x, at most with a log line.
#   - Alphas that differ between layers: those of the U-Net's attentions are lost, so that these layers count by the most
#     frequent alpha.
#   - Queries, keys and values of the text encoder, where the file has no output projection (out_proj).
#   - Magnitudes of DoRA (dora_scale); the matrices are then used as a plain LoRA.
# It matters to whoever compares pictures of one file between programs. One alpha for all, an out_proj, or diffusers' own
# names for DoRA avoid it. Seen on 2026-11-27 with torch 2.13.0, transformers 5.23.0, peft 0.21.2. Exits with 1 if any of this
# changes.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0 safetensors==0.8.0
cd "$folder"
"$folder/venv/bin/python" - 2> log <<'PY'
import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

print("diffusers", diffusers.__version__)
UNET, TEXT = "unet", "text_encoder"
QUERY, KEY = (f"down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_{name}" for name in "qk")


def pipeline():
    torch.manual_seed(0)
    letters = [chr(code) for code in range(33, 127)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={token: n for n, token in enumerate(tokens)}, merges=[], model_max_length=8)
    config = CLIPTextConfig(vocab_size=len(tokens), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    unet = UNet2DConditionModel(block_out_channels=(32,), layers_per_block=1, cross_attention_dim=32, norm_num_groups=8, **blocks)
    parts = {"vae": AutoencoderKL(), "text_encoder": CLIPTextModel(config), "tokenizer": tokenizer, "unet": unet}
    return StableDiffusionPipeline(**parts, scheduler=DDIMScheduler(), safety_checker=None, feature_extractor=None)


def matrices(name, alpha):
    torch.manual_seed(len(name))
    tensors = {"lora_down.weight": torch.randn(4, 32), "lora_up.weight": torch.randn(32, 4), "alpha": torch.tensor(alpha)}
    return {f"{name}.{kind}": tensor for kind, tensor in tensors.items()}


def share(tensors, part, path, alpha):
    """What is added to a layer, as a share of alpha / 4 times the product of its matrices."""
    save_file(tensors, "it.safetensors")
    made = pipeline()
    layer = getattr(made, part).get_submodule(path)
    before = layer.weight.detach().clone()
    made.load_lora_weights("it.safetensors")
    made.fuse_lora()
    made.unload_lora_weights()
    name = f"lora_unet_{path.replace('.', '_')}" if part == UNET else f"lora_te_text_model_{path.replace('.', '_')}"
    wanted = tensors[f"{name}.lora_up.weight"] @ tensors[f"{name}.lora_down.weight"] * alpha / 4
    change = getattr(made, part).get_submodule(path).weight.detach() - before
    return float((change * wanted).sum() / wanted.norm() ** 2)


flat = {path: f"lora_unet_{path.replace('.', '_')}" for path in (QUERY, KEY)}
others = [f"lora_unet_{side}_blocks_0_attentions_0_transformer_blocks_0_attn2_to_v" for side in ("down", "up")]
alphas = matrices(flat[QUERY], 1.0) | matrices(flat[KEY], 4.0) | matrices(others[0], 4.0) | matrices(others[1], 4.0)
one = share(alphas, UNET, QUERY, 1.0)
print(f"alpha 1 of a query beside alphas of 4: {one:.2f} times its change")

text = "encoder.layers.0.self_attn.q_proj"
named = f"lora_te_text_model_{text.replace('.', '_')}"
feed = matrices("lora_te_text_model_encoder_layers_0_mlp_fc1", 4.0)
feed["lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight"] = torch.randn(64, 4)
tensors = matrices(flat[QUERY], 4.0) | matrices(named, 4.0) | feed
two = share(tensors, TEXT, text, 4.0)
print(f"a query of the text encoder without an output projection: {two:.2f} times its change")
with_output = share(tensors | matrices(named.replace("q_proj", "out_proj"), 4.0), TEXT, text, 4.0)
print(f"with one: {with_output:.2f}")

dora = matrices(flat[QUERY], 4.0) | {f"{flat[QUERY]}.dora_scale": torch.full((32, 1), 3.0)}
three = share(dora, UNET, QUERY, 4.0)
print(f"a query with magnitudes of DoRA: {three:.2f} times its plain change")
raise SystemExit([round(value, 2) for value in (one, two, with_output, three)] != [4.0, 0.0, 1.0, 1.0])
PY
