"""What does `prune` take for transformers at full size?

    python benchmarks/transformer_prune.py runs/full --out benchmarks/results/transformer_prune.md

Makes a folder with the configs of Z-Image, or of Flux.1, weights in bfloat16, and text encoders of one layer, which are
copied and read by nobody; prunes it in a process of its own, holds a few of the student's tensors against the
teacher's, and takes both away again. Z-Image's weights are random (one block of random numbers, over and over).
Flux.1's are a file of zeros that take no room on the disk, for which 24 GB are much.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    ZImageTransformer2DModel,
)
from safetensors import safe_open
from sdxl_prune import measured
from transformers import CLIPTextConfig, CLIPTextModel, Qwen3Config, Qwen3Model, T5Config, T5EncoderModel

from bksdm.common.assets import asset
from bksdm.common.runs import provenance, write_text
from bksdm.families import derive
from bksdm.families.recipe import load_recipe
from bksdm.models.parts import Tensors, find_weights

RECIPES = {"z-image": ("half", "two-thirds"), "flux": ("flux-lite", "flux-mini")}
_BLOCK = 2**20
_GIB = 2**30


def networks(kind: str) -> dict[str, Any]:
    """The networks of a pipeline, on the meta device but for the small ones."""
    vae = AutoencoderKL(latent_channels=16, block_out_channels=(32,), shift_factor=0.1159, scaling_factor=0.3611)
    small = {"num_hidden_layers": 1, "vocab_size": 1000, "intermediate_size": 64}
    if kind == "z-image":
        text = Qwen3Model(Qwen3Config(hidden_size=2560, num_attention_heads=20, num_key_value_heads=4, **small))
        with torch.device("meta"):
            return {"transformer": ZImageTransformer2DModel(), "vae": vae, "text_encoder": text}
    clip = CLIPTextModel(CLIPTextConfig(hidden_size=768, num_attention_heads=12, **small))
    t5 = T5EncoderModel(T5Config(d_model=4096, d_ff=64, d_kv=64, num_heads=4, num_layers=1, vocab_size=1000))
    with torch.device("meta"):
        denoiser = FluxTransformer2DModel(guidance_embeds=True)
    return {"transformer": denoiser, "vae": vae, "text_encoder": clip, "text_encoder_2": t5}


def write_teacher(folder: Path, kind: str) -> None:
    """The folder of a pipeline, its denoiser's weights never in memory."""
    made = networks(kind)
    denoiser = made["transformer"]
    for name, network in made.items():
        (folder / name).mkdir(parents=True)
        if network is not denoiser:
            network.save_pretrained(folder / name)
    denoiser.save_config(folder / "transformer")
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    write_bfloat16(file, denoiser.state_dict(), sparse=kind == "flux")
    tokenizers = ["tokenizer", "tokenizer_2"][: len(made) - 2]
    for name in tokenizers:
        shutil.copytree(asset("emoji", "model", "tokenizer"), folder / name)
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    parts = {
        name: [type(network).__module__.partition(".")[0], type(network).__name__] for name, network in made.items()
    }
    parts |= {name: ["transformers", "CLIPTokenizer"] for name in tokenizers}
    parts |= {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}
    pipeline = {"z-image": "ZImagePipeline", "flux": "FluxPipeline"}[kind]
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline, **parts}))


def write_bfloat16(file: Path, tensors: dict[str, torch.Tensor], *, sparse: bool) -> None:
    """A safetensors file with tensors of these names and shapes: random numbers, or zeros that take no room."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    random = torch.randn(_BLOCK, generator=torch.Generator().manual_seed(0)) / 50
    block = random.bfloat16().view(torch.uint8).numpy().tobytes()
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        if sparse:
            opened.truncate(8 + len(text) + end)
        for left in range(0 if sparse else end, 0, -len(block)):
            opened.write(block[:left])


def row(runs: Path, kind: str, recipe: str) -> str:
    """What pruning took."""
    teacher, student = runs / kind, runs / f"{kind}-{recipe}"
    seconds, _, memory = measured(
        sys.executable, "-m", "bksdm", "prune", "--teacher", teacher, "--recipe", recipe, "--out", student
    )
    check(teacher, student, recipe)
    sizes = [sum(part.stat().st_size for part in (folder / "transformer").iterdir()) for folder in (teacher, student)]
    shutil.rmtree(student)
    return f"| {kind} | {recipe} | {sizes[0] / _GIB:.2f} | {sizes[1] / _GIB:.2f} | {memory:.2f} | {seconds:.0f} |"


def check(teacher: Path, student: Path, recipe: str) -> None:
    """Hold every fiftieth tensor against the teacher's."""
    theirs, ours = (find_weights(folder / "transformer") for folder in (teacher, student))
    assert theirs
    assert ours
    config = json.loads((teacher / "transformer" / "config.json").read_text())
    pruning, whole, part = derive(load_recipe(recipe), config), Tensors(theirs), Tensors(ours)
    for name in list(part)[::50]:
        assert torch.equal(part[name], whole[pruning.teacher_key(name)]), name
    for file in ours.files:
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--kinds", nargs="*", default=list(RECIPES))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    rows = []
    for kind in given.kinds:
        write_teacher(given.runs / kind, kind)
        for recipe in RECIPES[kind]:
            rows.append(row(given.runs, kind, recipe))
            print(rows[-1], flush=True)
        shutil.rmtree(given.runs / kind)
    made = provenance()
    text = "\n".join(
        [
            "`bksdm prune` of transformers at full size in bfloat16, in a fresh process. Z-Image's weights are random "
            "numbers; Flux.1's are zeros, for the room on the disk.",
            "",
            "| teacher | recipe | its transformer, GiB | student's, GiB | most memory, GiB | seconds |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
            f"{made['processors']} cores of {made['processor']}, other work beside it, {made['started'][:10]}. Most "
            "memory is the largest resident set, pages of the files that are read among it.",
            "",
        ]
    )
    if given.out:
        write_text(given.out, text)


if __name__ == "__main__":
    main()
