"""A small flow teacher in the shape of Z-Image that draws the emoji art.

    python examples/emoji/flow.py                             # resumes where it was stopped
    python examples/emoji/flow.py --save runs/flow/teacher    # the pipeline of the newest checkpoint
    bksdm quickstart runs/flow/quickstart --teacher runs/flow/teacher --recipe half

Its VAE is the embedded model's. The transformer and a text encoder of its own learn together, from the art and from
the answers of the embedded U-Net, whose noise predictions are velocities too.
"""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UNet2DConditionModel, ZImagePipeline, ZImageTransformer2DModel
from objectives import Succession
from pretrain import CHUNK, HERE, SIZE, InMemory, Pace, build_vae, fit, keep_vocabulary, trained
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

from bksdm.data.folder import data_folder, read_captions
from bksdm.data.pictures import PictureSamples
from bksdm.distill.conditions import Conditions
from bksdm.distill.optimizers import Muon
from bksdm.families.noise import Corrupted, NoiseSchedule
from bksdm.families.zimage import ZImage
from bksdm.models.pipelines import load_pipeline, save_pipeline, tokenizing
from bksdm.runtime.defaults import Defaults, as_files

VOCABULARY = 1500
MAX_TOKENS = 32  # what the transformer fills captions up to, at the least
WIDTH = 128
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT = """\
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
CLEAREST = 0.8  # noise level up to which a noise prediction says much of the picture
CARD = """---
license: cc-by-4.0
library_name: diffusers
pipeline_tag: text-to-image
---
# emoji-flow

A small text-to-image pipeline in the shape of Z-Image: 64 px, latents of 16 x 16 x 4. It was trained from nothing by
`examples/emoji` of bksdm on open emoji art; see ATTRIBUTION.md beside the folder of the embedded art.
"""


def learn_tokenizer(captions: Sequence[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A byte-pair vocabulary in Qwen's form and its merges."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    blank = Qwen2Tokenizer(vocab={letter: index for index, letter in enumerate(letters)}, merges=[])
    said = [*captions, *(f"user\n{caption}\n" for caption in captions), *["assistant\n"] * len(captions)]
    model = json.loads(blank.train_new_from_iterator(said, VOCABULARY).backend_tokenizer.to_str())["model"]
    merges = [(left, right) for left, right in model["merges"]]
    tokens = dict.fromkeys([*SPECIAL, *letters, *("".join(pair) for pair in merges)])
    return {token: index for index, token in enumerate(tokens)}, merges


def build_tokenizer(folder: Path) -> Qwen2Tokenizer:
    """The tokenizer that `folder` keeps, learnt from the captions of the art where there is none yet."""
    if not folder.exists():
        vocabulary, merges = learn_tokenizer([entry.text for entry in read_captions(data_folder("emoji/train"))])
        keep_vocabulary(Qwen2Tokenizer(vocab=vocabulary, merges=merges), folder)
    vocabulary = json.loads((folder / "vocab.json").read_text())
    pairs = [line.split() for line in (folder / "merges.txt").read_text().splitlines()[1:]]
    merges = [(left, right) for left, right in pairs]
    made = Qwen2Tokenizer(
        vocab=vocabulary, merges=merges, eos_token="<|im_end|>", chat_template=CHAT, model_max_length=MAX_TOKENS
    )
    made.add_tokens(list(SPECIAL), special_tokens=True)
    return made


def build_text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen3Model:
    """0.7 M parameters. The transformer is told what the last layer but one gives."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=WIDTH // 4,
        max_position_embeddings=MAX_TOKENS,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return Qwen3Model(config)


def build_transformer() -> ZImageTransformer2DModel:
    """4.0 M parameters: twelve blocks behind one each that refine picture and caption; latents of 16 x 16 x 4."""
    made = ZImageTransformer2DModel(
        in_channels=4,
        dim=WIDTH,
        n_layers=12,
        n_refiner_layers=1,
        n_heads=4,
        n_kv_heads=4,
        cap_feat_dim=WIDTH,
        axes_dims=(8, 12, 12),
    )
    made.register_to_config(_sample_size=SIZE // 4)
    for block in [*made.layers, *made.noise_refiner]:  # change nothing at first
        torch.nn.init.zeros_(block.adaLN_modulation[0].weight)
        torch.nn.init.zeros_(block.adaLN_modulation[0].bias)
    return made


def build_pipeline(folder: Path) -> ZImagePipeline:
    """The pipeline before it has learnt; `folder` keeps its vocabulary."""
    tokenizer, known, vae = build_tokenizer(folder), load_pipeline("emoji").vae, build_vae()
    vae.load_state_dict(known.state_dict())
    vae.register_to_config(scaling_factor=known.config.scaling_factor, shift_factor=0.0)
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=build_text_encoder(tokenizer),
        tokenizer=tokenizer,
        transformer=build_transformer(),
    )


class Velocity:
    r"""What a U-Net that predicts noise says of latents in flow matching.

    $x_s = (1 - s)\,x_0 + s\,\epsilon$ over its root mean square, $c = \sqrt{(1 - s)^2 + s^2}$, is the U-Net's latent at
    the timestep with $\sqrt{\bar\alpha} = (1 - s) / c$, and its noise gives $(\epsilon - x_s) / (1 - s)$. Where noise
    hides the picture that divides by little, so the target stands there.
    """

    def __init__(self, unet: UNet2DConditionModel, noise_schedule: NoiseSchedule) -> None:
        self.unet = unet.eval().requires_grad_(False)
        self.signal = noise_schedule.alphas_cumprod.flip(0)  # ascending

    def __call__(self, noisy: Corrupted, context: Tensor) -> Tensor:
        level = noisy.timesteps / 1000
        clear = level <= CLEAREST
        level, latents = level[clear], noisy.latents[clear]
        squared = (1 - level).square() + level.square()
        signal = self.signal.to(level)
        found = torch.searchsorted(signal, (1 - level).square() / squared).clamp(1, len(signal) - 1)
        timesteps = len(signal) - 1 - found
        noise = self.unet(latents / _wide(squared.sqrt()), timesteps, context[clear]).sample
        answer = noisy.target.clone()
        answer[clear] = (noise - latents) / _wide(1 - level)
        return answer


def _wide(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def samples(pipeline: ZImagePipeline, embedded: Any) -> InMemory:
    """The embedded art as latents, with captions for both."""
    entries = read_captions(data_folder("emoji/train"))
    pictures = PictureSamples(entries, SIZE, tokenizing(pipeline))
    seen, conditions = tokenizing(embedded), Conditions.of(embedded)
    found = []
    for start in range(0, len(entries), CHUNK):
        rows = [pictures.sample(index, 0) for index in range(start, min(start + CHUNK, len(entries)))]
        mean, std = conditions.posterior(torch.stack([row["pixel_values"] for row in rows]))
        tokens = torch.stack([seen(entry.text) for entry in entries[start : start + CHUNK]])
        columns = {"latents_mean": mean, "latents_std": std, "taught": conditions.embedded(tokens)["context"]}
        found += [
            {name: column[index] for name, column in columns.items()} | {"input_ids": row["input_ids"]}
            for index, row in enumerate(rows)
        ]
    return InMemory(found)


def learn(pipeline: ZImagePipeline, folder: Path, pace: Pace) -> nn.ModuleDict:
    """Train transformer and text encoder, or go on with them; the averaged weights of the end."""
    embedded = load_pipeline("emoji")
    model = nn.ModuleDict({"transformer": pipeline.transformer, "text_encoder": pipeline.text_encoder})
    model.train().requires_grad_(True)
    family, conditions = ZImage(), Conditions.of(embedded)
    for block in [*pipeline.transformer.layers, *pipeline.transformer.noise_refiner]:
        block.compile()

    def answer(latents: Tensor, timesteps: Tensor, batch: dict[str, Tensor]) -> Tensor:
        told = family.embedded([model["text_encoder"]], batch["input_ids"])
        return family.answer(model["transformer"], latents, timesteps, told)

    objective = Succession(
        answer,
        Velocity(embedded.unet.to(pace.machine[0]), NoiseSchedule.from_scheduler(embedded.scheduler)),
        conditions.latents,
        family.noise_schedule(pipeline.scheduler),
        empty={
            "input_ids": tokenizing(pipeline)("")[None],
            "taught": conditions.embedded(tokenizing(embedded)("")[None])["context"],
        },
        caption_dropout=0.1,
    )
    fit(model, objective, samples(pipeline, embedded), folder, pace, optimizer(model.to(pace.device)))
    return model


def optimizer(model: nn.ModuleDict) -> Muon:
    """Muon for the matrices inside blocks."""
    inside = re.compile(r"\.(layers|noise_refiner|context_refiner)\.\d+\..+weight$")
    named = dict(model.named_parameters())
    matrices = [name for name, weight in named.items() if weight.ndim == 2 and inside.search(name)]
    others = [weight for name, weight in named.items() if name not in matrices]
    return Muon([named[name] for name in matrices], others, lr=1e-3, weight_decay=1e-2)  # the rate is the pace's


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=HERE / "work" / "flow")
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--save", type=Path, help="write the pipeline of the newest checkpoint there; train nothing")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    pipeline = build_pipeline(arguments.work / "tokenizer")
    if arguments.save is None:
        pace = Pace(arguments.steps, arguments.batch_size, arguments.lr, ema_decay=0.998, device=arguments.device)
        learn(pipeline, arguments.work, pace)
        return
    trained(nn.ModuleDict({name: getattr(pipeline, name) for name in ("transformer", "text_encoder")}), arguments.work)
    files = {"README.md": CARD, **as_files(Defaults(steps=25, guidance=1.5))}
    save_pipeline(pipeline.to(torch.float16), arguments.save, files)


if __name__ == "__main__":
    main()
