#!/usr/bin/env bash
# A DoRA of a text encoder that diffusers 0.42.1 saves, it does not read again: peft saves magnitudes as
# `lora_magnitude_vector`, and transformers 5.23.0, which loads them into the text encoder, looks for
# `lora_magnitude_vector.weight`. The magnitudes stay as they begin, and transformers prints a table of missing and unexpected
# keys. U-Nets are read right. Seen on 2026-11-27 with peft 0.21.2, torch 2.13.0. Exits with 1 if this changes.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0 safetensors==0.8.0
cd "$folder"
"$folder/venv/bin/python" - 2> log <<'PY'
import diffusers
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

print("diffusers", diffusers.__version__)
config = CLIPTextConfig(vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
FILE = "pytorch_lora_weights.safetensors"


def encoder():
    torch.manual_seed(0)
    return CLIPTextModel(config).eval()


def embedding(network):
    with torch.no_grad():
        return network(torch.tensor([[1, 2, 3]])).last_hidden_state


taught = encoder()
taught.add_adapter(LoraConfig(r=4, lora_alpha=4, use_dora=True, target_modules=["q_proj", "out_proj"]))
torch.manual_seed(1)
for name, parameter in taught.named_parameters():
    if "lora_" in name:
        parameter.data = torch.rand_like(parameter) + 0.5 * ("magnitude" in name)
layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(taught))
StableDiffusionPipeline.save_lora_weights(".", text_encoder_lora_layers=layers)


def read(tensors):
    save_file(tensors, FILE, metadata={"format": "pt"})
    state, alphas, metadata = StableDiffusionPipeline.lora_state_dict(".", weight_name=FILE, return_lora_metadata=True)
    fresh = encoder()
    StableDiffusionPipeline.load_lora_into_text_encoder(state, alphas, fresh, prefix="text_encoder", metadata=metadata)
    return float((embedding(fresh) - embedding(taught)).norm() / (embedding(encoder()) - embedding(taught)).norm())


saved = load_file(FILE)
print(next(name for name in saved if "magnitude" in name))
as_saved = read(saved)
renamed = read({f"{name}.weight" if name.endswith("magnitude_vector") else name: tensor for name, tensor in saved.items()})
print(f"distance from what was taught, as a share of all that was taught: {as_saved:.3f} as saved, {renamed:.1e} renamed")
raise SystemExit(not (as_saved > 0.05 and renamed < 1e-4))
PY
