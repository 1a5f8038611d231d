"""Does `distill --plan` foresee the memory of a step of a transformer?

    python benchmarks/transformer_plan.py --out benchmarks/results/transformer_plan.md

Every family at full depth and an eighth of its width, one micro-batch of one picture: the plan's estimate beside the
peak and the time of real steps with random weights, in a process of its own. Then the plan at full size, from configs
alone, of a few ways to retrain, and the card that holds it. Captions are prepared; text encoders are small ones.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    ZImageTransformer2DModel,
)
from transformers import CLIPTextConfig, Qwen3Config, T5Config

from bksdm.common.runs import provenance, write_text
from bksdm.distill import plan as planning
from bksdm.families import derive, family_of
from bksdm.families.layers import Shapes
from bksdm.families.recipe import Config, load_recipe
from bksdm.options.distill import DistillOptions

_GIB = 2**30
# Memory that is freed goes back to the system at once; glibc's heap would keep much of it, and the peak is of the whole
# process.
RETURNING = os.environ | {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}
TOKENS = 512
SMALL = {"num_hidden_layers": 1, "vocab_size": 100, "intermediate_size": 16, "num_attention_heads": 1}


@dataclass(frozen=True)
class Kind:
    """A family: what its networks are at some share of the width.

    Attributes:
        recipe: What it is pruned by.
        sides: Height and width of the latents of pictures of 512 pixels.
        transformer: Its class and config, by the share.
        vae: Its config.
        texts: Configs of text encoders, by the share.
    """

    recipe: str
    sides: int
    transformer: Callable[[int], tuple[Any, dict[str, Any]]]
    vae: type[Any]
    texts: Callable[[int], dict[str, Any]]


def _flux(share: int) -> tuple[Any, dict[str, Any]]:
    axes = {1: (16, 56, 56), 8: (4, 6, 6)}[share]
    widths = {"attention_head_dim": 128 // share, "joint_attention_dim": 4096 // share, "axes_dims_rope": axes}
    return FluxTransformer2DModel, {"guidance_embeds": True, **widths}


def _klein(share: int) -> tuple[Any, dict[str, Any]]:
    axes = {1: (32, 32, 32, 32), 8: (4, 4, 4, 4)}[share]
    widths = {"attention_head_dim": 128 // share, "joint_attention_dim": 7680 // share, "axes_dims_rope": axes}
    depths = {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24}
    return Flux2Transformer2DModel, {"guidance_embeds": False, **depths, **widths}


def _z(share: int) -> tuple[Any, dict[str, Any]]:
    axes = {1: (32, 48, 48), 8: (4, 6, 6)}[share]
    return ZImageTransformer2DModel, {"dim": 3840 // share, "cap_feat_dim": 2560 // share, "axes_dims": axes}


def _qwen(width: int) -> dict[str, Any]:
    return dict(Qwen3Config(hidden_size=width, num_key_value_heads=1, head_dim=16, **SMALL).to_dict())


def _t5(share: int) -> dict[str, Any]:
    width = 4096 // share
    t5 = T5Config(d_model=width, d_ff=16, d_kv=16, num_heads=1, num_layers=1, vocab_size=100)
    return {"text_encoder": CLIPTextConfig(hidden_size=768, **SMALL).to_dict(), "text_encoder_2": t5.to_dict()}


KINDS = {
    "Z-Image": Kind("half", 64, _z, AutoencoderKL, lambda share: {"text_encoder": _qwen(2560 // share)}),
    "Flux.1": Kind("flux-lite", 64, _flux, AutoencoderKL, _t5),
    "FLUX.2 klein 4B": Kind(
        "half", 32, _klein, AutoencoderKLFlux2, lambda share: {"text_encoder": _qwen(2560 // share)}
    ),
}


@dataclass(frozen=True)
class Prepared:
    """Latents and captions of a picture, as `bksdm prepare --text_embeddings` leaves them."""

    shapes: Shapes

    def __len__(self) -> int:
        return 1000

    def fields(self, unet: Config, vae: Config, tokens: int) -> Shapes:  # noqa: ARG002
        return self.shapes


HALF = {"gradient_checkpointing": True, "precision": "bf16", "teacher_precision": "bf16"}
EIGHT = {"teacher_precision": "fp8", "student_precision": "fp8"}
WAYS: dict[str, dict[str, Any]] = {
    "all weights": HALF,
    "rank 64, bf16": {**HALF, "lora_rank": 64},
    "rank 64, 8 bits": {**HALF, "lora_rank": 64, **EIGHT},
}


def plan(kind: str, share: int, peak_tflops: float | None, way: dict[str, Any]) -> planning.Plan:
    """Foresee a step of a family at a share of its width; measured where no peak is given."""
    own = KINDS[kind]
    network, config = own.transformer(share)
    with torch.device("meta"):
        config = dict(network(**config).config) | {"_class_name": network.__name__}
    family, recipe = family_of(config), load_recipe(own.recipe)
    latent = (family.latent_channels(config), own.sides, own.sides)
    told = family.condition_shapes(config, TOKENS)
    blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    vae = own.vae(latent_channels=16, block_out_channels=(32,), **blocks).config | {"_class_name": own.vae.__name__}
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        parts = {"transformer": config, "vae": vae, **own.texts(share)}
        for name, values in parts.items():
            (folder / name).mkdir()
            (folder / name / "config.json").write_text(json.dumps(dict(values), default=list))
        (folder / "scheduler").mkdir()
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
        options = DistillOptions(made, made, "prepared", "nowhere", steps=10, batch_size=1, peak_tflops=peak_tflops)
        options = dataclasses.replace(options, accumulation=1, **way)
        data: Any = Prepared({"latents_mean": latent, "latents_std": latent, **told})
        return planning.plan(options, derive(recipe, config), data)


def row(kind: str) -> dict[str, Any]:
    """What is planned and measured of a family, in processes of their own."""

    def run(*words: str) -> Any:
        command = [sys.executable, __file__, "--only", kind, *words]
        print(*command[3:], file=sys.stderr, flush=True)
        return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=RETURNING).stdout)

    return {"small": run(), **{way: run("--way", way) for way in WAYS}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", choices=KINDS)
    parser.add_argument("--way", choices=WAYS, help="at full size; else small, and measured")
    arguments = parser.parse_args()
    if arguments.only:
        given = (1, 989.0, WAYS[arguments.way]) if arguments.way else (8, None, {})
        print(json.dumps(plan(arguments.only, *given).to_dict()))
        return
    lines = [
        "`python benchmarks/transformer_plan.py`: a step of one picture of 512 pixels with a caption of 512 tokens.",
        "",
        "At full depth and an eighth of the width, in float32 on the CPU, estimated and measured (in a process whose "
        "freed memory goes back to the system at once; glibc's heap may hold up to half as much again):",
        "",
        "| teacher | recipe | teacher, M | student, M | estimated, GiB | measured, GiB | off | seconds a step |",
        "|---|---|---|---|---|---|---|---|",
    ]
    found = {kind: row(kind) for kind in KINDS}
    for kind, rows in found.items():
        small = rows["small"]
        estimated, peak = small["chosen"]["total"], small["measured_memory"]
        lines.append(
            f"| {kind} | {KINDS[kind].recipe} | {small['teacher_params'] / 1e6:.1f} "
            f"| {small['student_params'] / 1e6:.1f} | {estimated / _GIB:.2f} | {peak / _GIB:.2f} "
            f"| {estimated / peak - 1:+.0%} | {small['seconds_per_step']:.1f} |"
        )
    lines += [
        "",
        "At full size, from configs alone, in bfloat16 with gradient checkpointing; weights that learn, their average "
        "and two moments are float32, text encoders have left.",
        "",
        "| teacher | student, B | what learns | held, GiB | a step, GiB | a card of |",
        "|---|---|---|---|---|---|",
    ]
    for kind, rows in found.items():
        for way in WAYS:
            large = rows[way]
            chosen, card = large["chosen"], large["card_gb"]
            lines.append(
                f"| {kind} | {large['student_params'] / 1e9:.2f} | {way} | {chosen['held'] / _GIB:.1f} "
                f"| {chosen['total'] / _GIB:.1f} | {f'{card} GB' if card else 'none'} |"
            )
    made = provenance()
    lines += ["", f"{made['processors']} cores of {made['processor']}, {made['started'][:10]}.", ""]
    text = "\n".join(lines)
    print(text)
    if arguments.out:
        write_text(arguments.out, text)


if __name__ == "__main__":
    main()
