#!/usr/bin/env bash
# openvino-genai 2026.4.1 tells SDXL's U-Net the sizes of a picture with the width first. diffusers, and the SDXL paper
# (arXiv 2307.01952, section 2.2), have the height first: time_ids = (height, width, top, left, height, width).
#
# It matters for pictures that are not square: the model draws as if for the other shape. The U-Net below answers with
# the first two of the numbers that it is told, so that one step shows them; no model is needed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q openvino==2026.4.1 openvino-genai==2026.4.1.0 openvino-tokenizers==2026.4.1.0 transformers==5.23.0
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - 2> log <<'PYTHON'
import json
from pathlib import Path
from tempfile import mkdtemp

import openvino as ov
import openvino_genai
import openvino_tokenizers
import torch
from tokenizers import pre_tokenizers
from transformers import CLIPTokenizer

root = Path(mkdtemp())
letters = sorted(pre_tokenizers.ByteLevel.alphabet())
words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
tokenizer = CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=8)
for name in ("tokenizer", "tokenizer_2"):
    tokenizer.save_pretrained(root / name)
    graph = openvino_tokenizers.convert_tokenizer(tokenizer, use_max_padding=True, truncation=True, max_length=8)
    ov.save_model(graph, root / name / "openvino_tokenizer.xml")


class Text(torch.nn.Module):
    def __init__(self, pooled_first):
        super().__init__()
        self.pooled_first = pooled_first

    def forward(self, input_ids):
        hidden = input_ids[..., None].float().repeat(1, 1, 4)
        hidden, pooled = 0 * hidden, 0 * hidden[:, 0]
        return ((pooled, hidden + 1) if self.pooled_first else (hidden + 1, pooled)) + (hidden + 2, hidden + 3)


class UNet(torch.nn.Module):
    def forward(self, sample, timestep, encoder_hidden_states, text_embeds, time_ids):
        numbers = time_ids[:, :2].sum(0) * 0 + time_ids[0, :2]
        shown = numbers[None, :, None, None].repeat(1, 2, 1, 1)
        return sample * 0 + shown + 0 * (encoder_hidden_states.sum() + text_embeds.sum() + timestep.sum())


class Decoder(torch.nn.Module):
    def forward(self, latent_sample):
        return latent_sample[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3) / 1000


def save(name, module, inputs, outputs, config):
    model = ov.convert_model(module.eval(), example_input=tuple(inputs.values()))
    for port, key in zip(model.inputs, inputs):
        port.get_tensor().set_names({key})
    for port, key in zip(model.outputs, outputs):
        port.get_tensor().set_names({key})
    model.reshape({key: [1] if key == "timestep" else [-1, *([-1] * (v.dim() - 1))] for key, v in inputs.items()})
    (root / name).mkdir(exist_ok=True)
    ov.save_model(model, root / name / "openvino_model.xml", compress_to_fp16=False)
    (root / name / "config.json").write_text(json.dumps(config))


text = {"max_position_embeddings": 8, "hidden_size": 4, "num_hidden_layers": 1, "projection_dim": 4}
ids = {"input_ids": torch.zeros(2, 8, dtype=torch.long)}
save("text_encoder", Text(False), ids, ("last_hidden_state", "pooler_output", "hidden_states.0", "hidden_states.1"), text)
save("text_encoder_2", Text(True), ids, ("text_embeds", "last_hidden_state", "hidden_states.0", "hidden_states.1"), text)
save("unet", UNet(), {
    "sample": torch.zeros(2, 4, 8, 8), "timestep": torch.zeros(1, dtype=torch.long),
    "encoder_hidden_states": torch.zeros(2, 8, 8), "text_embeds": torch.zeros(2, 4), "time_ids": torch.zeros(2, 6),
}, ("out_sample",), {"in_channels": 4, "sample_size": 8, "time_cond_proj_dim": None})
save("vae_decoder", Decoder(), {"latent_sample": torch.zeros(1, 4, 8, 8)}, ("sample",), {
    "in_channels": 3, "latent_channels": 4, "out_channels": 3, "scaling_factor": 1.0,
    "block_out_channels": [1, 1, 1, 1],
})
(root / "scheduler").mkdir()
(root / "scheduler" / "scheduler_config.json").write_text(json.dumps({
    "_class_name": "EulerDiscreteScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000, "prediction_type": "sample", "steps_offset": 1, "timestep_spacing": "leading",
}))
(root / "model_index.json").write_text(json.dumps({
    "_class_name": "StableDiffusionXLPipeline",
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}))
seen = []
pipeline = openvino_genai.Text2ImagePipeline(root, "CPU", INFERENCE_PRECISION_HINT="f32")


def callback(step, steps, latent):
    seen.append(latent.data.copy())
    return False


pipeline.generate("a", height=128, width=320, num_inference_steps=1, guidance_scale=1.0, callback=callback)
print(openvino_genai.__version__, "height 128, width 320; time_ids begin with", seen[-1][0, :2, 0, 0])
assert seen[-1][0, :2, 0, 0].tolist() == [320.0, 128.0], "height comes first now"
PYTHON
