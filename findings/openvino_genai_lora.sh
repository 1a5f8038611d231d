#!/usr/bin/env bash
# openvino-genai 2026.4.1 and a LoRA in kohya's names for Stable Diffusion 1.x:
#   - alphas in the file are not used: the matrices count as if alpha were the rank;
#   - time embeddings and shortcuts of ResNet blocks are left out, with lines on stderr;
#   - a convolution of 3 x 3 is refused with a RuntimeError.
# It matters to whoever compares its pictures with those of diffusers. Scale the matrices, and leave such layers out.
# Seen on 2026-11-27 with openvino 2026.4.1, openvino-tokenizers 2026.4.1. Exits with 1 if this changes.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0 safetensors==0.8.0 \
  openvino==2026.4.1 openvino-genai==2026.4.1.0 openvino-tokenizers==2026.4.1.0
cd "$folder"
"$folder/venv/bin/python" - 2> log <<'PY'
import json
from pathlib import Path

import numpy as np
import openvino
import openvino_genai
import openvino_tokenizers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

print("openvino-genai", openvino_genai.__version__)
torch.manual_seed(0)
letters = [chr(code) for code in range(33, 127)]
tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
tokenizer = CLIPTokenizer(vocab={token: n for n, token in enumerate(tokens)}, merges=[], model_max_length=8)
config = CLIPTextConfig(vocab_size=len(tokens), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                        max_position_embeddings=8)
blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
unet = UNet2DConditionModel(sample_size=8, block_out_channels=(32,), layers_per_block=1, cross_attention_dim=32, norm_num_groups=8,
                            attention_head_dim=4, **blocks)
vae = AutoencoderKL(block_out_channels=(16,), norm_num_groups=8, latent_channels=4, sample_size=8)
text = CLIPTextModel(config)


class Part(nn.Module):
    def __init__(self, network, call):
        super().__init__()
        self.network, self.call = network, call

    def forward(self, *given):
        return self.call(self.network, *given)


def write(name, part, inputs, outputs, settings):
    graph = openvino.convert_model(part.eval(), example_input=tuple(inputs.values()))
    for port, own in zip(graph.inputs, inputs):
        port.get_tensor().set_names({own})
    for port, own in zip(graph.outputs, outputs):
        port.get_tensor().set_names({own})
    Path("model", name).mkdir(parents=True)
    openvino.save_model(graph, f"model/{name}/openvino_model.xml", compress_to_fp16=False)
    Path("model", name, "config.json").write_text(json.dumps(settings))


noisy, context = torch.randn(2, 4, 8, 8), torch.randn(2, 8, 32)
write("unet", Part(unet, lambda net, *x: net(*x).sample), {"sample": noisy, "timestep": torch.tensor([5]), "encoder_hidden_states": context},
      ["out_sample"], dict(unet.config))
write("vae_decoder", Part(vae, lambda net, z: net.decode(z).sample), {"latent_sample": noisy[:1]}, ["sample"], dict(vae.config))
write("text_encoder", Part(text, lambda net, ids: (net(ids).last_hidden_state, net(ids).pooler_output)), {"input_ids": torch.ones(2, 8, dtype=torch.long)},
      ["last_hidden_state", "pooler_output"], config.to_dict())
Path("model/tokenizer").mkdir()
graph = openvino_tokenizers.convert_tokenizer(tokenizer, use_max_padding=True, truncation=True, max_length=8)
openvino.save_model(graph, "model/tokenizer/openvino_tokenizer.xml")
DDIMScheduler(clip_sample=False).save_pretrained("model/scheduler")
index = {"_class_name": "StableDiffusionPipeline", "unet": ["x", "UNet2DConditionModel"], "vae": ["x", "AutoencoderKL"],
         "text_encoder": ["x", "CLIPTextModel"], "tokenizer": ["x", "CLIPTokenizer"], "scheduler": ["x", "DDIMScheduler"]}
Path("model/model_index.json").write_text(json.dumps(index))
settings = {"num_inference_steps": 4, "guidance_scale": 1.0, "rng_seed": 1, "height": 8, "width": 8}


def picture(layers, alpha):
    tensors = {}
    for path in layers:
        weight = unet.get_submodule(path).weight
        rng = torch.Generator().manual_seed(len(path))
        name = f"lora_unet_{path.replace('.', '_')}"
        tensors[f"{name}.lora_down.weight"] = torch.randn(4, *weight.shape[1:], generator=rng)
        tensors[f"{name}.lora_up.weight"] = torch.randn(weight.shape[0], 4, *[1] * (weight.ndim - 2), generator=rng)
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    save_file(tensors, "lora.safetensors")
    adapters = openvino_genai.AdapterConfig(openvino_genai.Adapter("lora.safetensors"))
    drawn = openvino_genai.Text2ImagePipeline("model", "CPU", adapters=adapters)
    return drawn.generate("a cat", adapters=adapters, **settings).data.astype(int)


plain = openvino_genai.Text2ImagePipeline("model", "CPU").generate("a cat", **settings).data.astype(int)
attention = ["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v"]
whole, quarter = picture(attention, 4.0), picture(attention, 1.0)
effect, alphas = int(abs(whole - plain).max()), int(abs(whole - quarter).max())
print(f"attentions change the picture by {effect} of 255; alpha 1 in the place of 4, by {alphas}")
left_out = int(abs(picture(["down_blocks.0.resnets.0.time_emb_proj"], 4.0) - plain).max())
print(f"a time embedding changes it by {left_out}")
try:
    picture(["down_blocks.0.resnets.0.conv1"], 4.0)
    refused = False
except RuntimeError as error:
    refused = "pointwise" in str(error)
print(f"a convolution of 3 x 3 is refused: {refused}")
raise SystemExit(not (effect > 0 and alphas == 0 and left_out == 0 and refused))
PY
