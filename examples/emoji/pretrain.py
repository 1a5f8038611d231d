"""Train the parts of the embedded model with bksdm's own loop, one stage a call.

    python examples/emoji/art.py                # render the art
    python examples/emoji/pretrain.py vae       # autoencoder, on `train` and `extra`
    python examples/emoji/pretrain.py encoder   # dual encoder, on `train` and `extra`
    python examples/emoji/pretrain.py teacher   # text encoder and U-Net, on `train`
    python examples/emoji/ship.py               # assemble the shipped folder and measure it

Every stage resumes where it was stopped. `--steps`, `--batch-size` and `--lr` fit a stage to the machine.
`pretrain.py adopt` first makes the shipped weights the starting point of all stages, where their own
checkpoints are gone.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from objectives import Contrast, Pretraining, Reconstruction
from safetensors.torch import load_file
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from bksdm.common.assets import asset
from bksdm.common.devices import choose_precision, plain_attention_is_faster
from bksdm.common.runs import replace_folder
from bksdm.data.folder import read_captions
from bksdm.data.pictures import PictureSamples
from bksdm.data.stream import Batch, Samples, Stream
from bksdm.distill.conditions import Conditions
from bksdm.distill.loop import Objective, Schedule, train
from bksdm.distill.state import Checkpoints, Ema, TrainState
from bksdm.families.noise import NoiseSchedule
from bksdm.families.sd import StableDiffusion
from bksdm.models.folders import save_vocabulary
from bksdm.models.pipelines import load_pipeline, tokenizing

HERE = Path(__file__).parent
SIZE = 64
CHUNK = 64
MAX_TOKENS = 16
VOCABULARY = 3000
START = "<|startoftext|>"
END = "<|endoftext|>"

ModuleT = TypeVar("ModuleT", bound=nn.Module)


@dataclass(frozen=True)
class Pace:
    """How long and how fast a stage trains."""

    steps: int
    batch_size: int
    lr: float
    ema_decay: float
    device: str = "cpu"

    @property
    def machine(self) -> tuple[torch.device, torch.dtype]:
        """Device, and the autocast type that is fast there."""
        device = torch.device(self.device)
        return device, choose_precision("auto", device, training=True)


class InMemory:
    """Samples made once and kept, for art that is small."""

    def __init__(self, samples: Sequence[Batch]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def sample(self, index: int, rng_seed: int) -> Batch:  # noqa: ARG002
        return self.samples[index]

    def name(self, index: int) -> str:
        return str(index)


@dataclass(frozen=True)
class Workspace:
    """Where the stages leave their results for one another."""

    root: Path

    def stage(self, name: str) -> Path:
        return self.root / name

    def samples(self, tokenize: Callable[[str], Tensor], *splits: str) -> InMemory:
        entries = [entry for split in splits for entry in read_captions(self.root / "art" / split)]
        folder = PictureSamples(entries, SIZE, tokenize)
        return InMemory([folder.sample(index, 0) for index in range(len(folder))])

    def tokenizer(self) -> CLIPTokenizer:
        """The same tokenizer for both text towers, learnt once from all captions of the training splits.

        It is kept, because learning breaks ties between equally frequent pairs differently each time.
        """
        kept = self.stage("tokenizer")
        if not kept.exists():
            splits = (self.root / "art" / split for split in ("train", "extra"))
            keep_vocabulary(learn_tokenizer([entry.text for split in splits for entry in read_captions(split)]), kept)
        vocabulary = json.loads((kept / "vocab.json").read_text())
        merges = [tuple(line.split()) for line in (kept / "merges.txt").read_text().splitlines()[1:]]
        return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)


def learn_tokenizer(captions: Sequence[str]) -> CLIPTokenizer:
    """A byte-pair vocabulary in CLIP's form, learnt from the captions; the special tokens come last, as CLIP's do."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    alphabet = letters + [f"{letter}</w>" for letter in letters]
    blank = CLIPTokenizer(vocab={token: index for index, token in enumerate([*alphabet, START, END])}, merges=[])
    learnt = json.loads(blank.train_new_from_iterator(captions, VOCABULARY).backend_tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in learnt["merges"]]
    tokens = list(dict.fromkeys([*alphabet, *("".join(pair) for pair in merges), START, END]))
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)}, merges=merges, model_max_length=MAX_TOKENS
    )


def keep_vocabulary(tokenizer: CLIPTokenizer, folder: Path) -> None:
    with replace_folder(folder) as partial:
        save_vocabulary(tokenizer, partial)


def text_config(tokenizer: CLIPTokenizer, width: int, layers: int) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def build_vae() -> AutoencoderKL:
    """0.95 M parameters; 64 px become latents of 16 x 16 x 4."""
    return AutoencoderKL(
        block_out_channels=(32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=16,
        sample_size=SIZE,
    )


def build_encoder(tokenizer: CLIPTokenizer) -> CLIPModel:
    vision = {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "image_size": SIZE,
        "patch_size": 8,
        "projection_dim": 64,
    }
    text = text_config(tokenizer, width=96, layers=3) | {"projection_dim": 64}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))


def build_teacher(tokenizer: CLIPTokenizer) -> nn.ModuleDict:
    """U-Net with SD v1's four stages of two layers, and its text encoder."""
    unet = UNet2DConditionModel(
        sample_size=SIZE // 4,
        block_out_channels=(48, 80, 112, 112),
        layers_per_block=2,
        cross_attention_dim=128,
        attention_head_dim=2,
        norm_num_groups=16,
    )
    text_encoder = CLIPTextModel(CLIPTextConfig(**text_config(tokenizer, width=128, layers=4)))
    return nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})


def build_scheduler() -> PNDMScheduler:
    """As Stable Diffusion v1 has it."""
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        set_alpha_to_one=False,
        skip_prk_steps=True,
        steps_offset=1,
    )
    scheduler.register_to_config(clip_sample=False)  # for the schedulers that are made from its config
    return scheduler


def train_vae(work: Workspace, pace: Pace) -> None:
    vae = build_vae()
    samples = work.samples(lambda text: torch.zeros(0), "train", "extra")
    fit(vae, Reconstruction(vae), samples, work.stage("vae"), pace)


def train_encoder(work: Workspace, pace: Pace) -> None:
    tokenizer = work.tokenizer()
    clip = build_encoder(tokenizer)
    samples = work.samples(tokenizing(tokenizer), "train", "extra")
    clip.set_attn_implementation("eager" if plain_attention_is_faster(*pace.machine) else "sdpa")
    fit(clip, Contrast(clip), samples, work.stage("encoder"), pace)


def train_teacher(work: Workspace, pace: Pace) -> None:
    """U-Net and text encoder together, on latents of the trained VAE."""
    tokenizer = work.tokenizer()
    model = build_teacher(tokenizer)
    conditions = Conditions(StableDiffusion(), trained(build_vae(), work.stage("vae")), [model["text_encoder"]])
    latents = encode(conditions, work.samples(tokenizing(tokenizer), "train"))
    model.train().requires_grad_(True)
    unet: UNet2DConditionModel = model["unet"]
    if plain_attention_is_faster(*pace.machine):
        unet.set_attn_processor(AttnProcessor())
    objective = Pretraining(
        unet,
        model["text_encoder"],
        conditions.latents,
        NoiseSchedule.from_scheduler(build_scheduler()),
        empty_ids=tokenizing(tokenizer)(""),
        caption_dropout=0.1,
        snr_gamma=5.0,
    )
    fit(model, objective, latents, work.stage("teacher"), pace)


def adopt(work: Workspace) -> None:
    """The shipped weights as step 0 of every stage."""
    pipeline, clip = load_pipeline("emoji"), CLIPModel.from_pretrained(asset("emoji") / "encoder")
    parts = {
        "vae": pipeline.vae,
        "encoder": clip,
        "teacher": nn.ModuleDict({"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}),
    }
    taken = [name for name in parts if Checkpoints(work.stage(name) / "checkpoints").all()]
    if taken:
        raise SystemExit(f"{work.stage(taken[0])} has checkpoints; go on with them, or remove them to adopt")
    keep_vocabulary(pipeline.tokenizer, work.stage("tokenizer"))
    for name, model in parts.items():
        state = TrainState(model.float(), torch.optim.AdamW(model.parameters()), Ema(model, 0.0))
        Checkpoints(work.stage(name) / "checkpoints").save(state)


def encode(conditions: Conditions, samples: Samples) -> InMemory:
    """The samples with the posterior of their latents in place of pixels; makes the VAE's scaling factor fit them."""
    raw = [samples.sample(index, 0) for index in range(len(samples))]
    conditions.vae.register_to_config(scaling_factor=1.0)
    chunks = [torch.stack([sample["pixel_values"] for sample in raw[k : k + CHUNK]]) for k in range(0, len(raw), CHUNK)]
    posteriors = [conditions.posterior(chunk) for chunk in chunks]
    means, stds = (torch.cat(parts) for parts in zip(*posteriors, strict=True))
    factor = float(1 / means.std())
    conditions.vae.register_to_config(scaling_factor=factor)
    return InMemory(
        [
            {"latents_mean": mean * factor, "latents_std": std * factor, "input_ids": sample["input_ids"]}
            for sample, mean, std in zip(raw, means, stds, strict=True)
        ]
    )


def fit(
    model: nn.Module,
    objective: Objective,
    samples: Samples,
    folder: Path,
    pace: Pace,
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Train `model` at `pace`, by AdamW at first; the result is the last checkpoint, with the averaged weights."""
    device, precision = pace.machine
    model.to(device)
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), weight_decay=1e-2, fused=True)
    state = TrainState(model, optimizer, Ema(model, pace.ema_decay))
    checkpoints = Checkpoints(folder / "checkpoints", keep=1)
    checkpoints.restore(state)
    schedule = Schedule(steps=pace.steps, lr=pace.lr, warmup=100, cosine=True, log_every=20, checkpoint_every=200)
    began = time.perf_counter()

    def report(step: int, record: dict[str, float]) -> None:
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in record.items())
        print(f"{step}/{pace.steps}  {time.perf_counter() - began:.0f} s  {numbers}", flush=True)

    stream = Stream(samples, pace.batch_size)
    train(
        state,
        objective,
        stream,
        schedule,
        checkpoints,
        device=device,
        precision=precision,
        report=report,
    )


def trained(model: ModuleT, folder: Path) -> ModuleT:
    """`model` with the averaged weights of a stage's newest checkpoint."""
    checkpoint = Checkpoints(folder / "checkpoints").all()[-1]
    averages = {
        name.removeprefix("ema."): tensor
        for name, tensor in load_file(checkpoint / "tensors.safetensors").items()
        if name.startswith("ema.")
    }
    missing, unexpected = model.load_state_dict(averages, strict=False)
    assert not unexpected
    assert all(name.endswith("position_ids") for name in missing)
    return model.eval()


STAGES: dict[str, tuple[Callable[[Workspace, Pace], None], Pace]] = {
    "vae": (train_vae, Pace(steps=1900, batch_size=16, lr=1e-3, ema_decay=0.995)),
    "encoder": (train_encoder, Pace(steps=900, batch_size=128, lr=1e-3, ema_decay=0.998)),
    "teacher": (train_teacher, Pace(steps=2450, batch_size=64, lr=1e-3, ema_decay=0.998)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=[*STAGES, "adopt"])
    parser.add_argument("--work", type=Path, default=HERE / "work")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    if arguments.stage == "adopt":
        adopt(Workspace(arguments.work))
        return
    run, pace = STAGES[arguments.stage]
    given = {name: value for name in ("steps", "batch_size", "lr", "device") if (value := getattr(arguments, name))}
    torch.manual_seed(0)
    run(Workspace(arguments.work), dataclasses.replace(pace, **given))


if __name__ == "__main__":
    main()
