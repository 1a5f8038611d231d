"""Stable Diffusion v1.4's tiny student at full size as GGUF: seconds, size, and how near its pictures are.

    python benchmarks/gguf.py                            # all precisions; needs pip install 'bksdm[gguf]'

Weights are random. Pictures of 64x64 by stable-diffusion.cpp and by torch are compared, as the export does.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from full_size import DATA, stable_diffusion
from transformers import CLIPTokenizer

from bksdm.common.runs import provenance, write_text
from bksdm.export.formats import Source
from bksdm.export.to_gguf import FORMAT, torch_picture
from bksdm.families import derive
from bksdm.families.recipe import load_recipe


def tiny() -> Any:
    """The pipeline around tiny's U-Net, with CLIP's numbers for single letters."""
    recipe = load_recipe("tiny")
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.json"
        student = derive(recipe, json.loads((DATA / "unet_sd_v1.4.json").read_text())).student_config
        config.write_text(json.dumps(student))
        pipeline = stable_diffusion(config)
    pipeline.tokenizer = letters()
    give_contrast(pipeline)
    return pipeline


@torch.no_grad()
def give_contrast(pipeline: Any) -> None:
    """Scale the last layers, so that noise is predicted with deviation 1 and pictures are not grey."""
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    context = torch.randn(1, 77, 768, generator=torch.Generator().manual_seed(1))
    noise = pipeline.unet(latents, torch.tensor(500), context).sample
    pipeline.unet.conv_out.weight /= noise.std()
    pixels = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    pipeline.vae.decoder.conv_out.weight *= 0.4 / pixels.std()


def letters() -> CLIPTokenizer:
    """CLIP's vocabulary as far as it is needed: bytes, then bytes that end a word, and the two marks last."""
    shown = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    signs = [chr(code) for code in shown] + [chr(0x100 + n) for n in range(256 - len(shown))]
    words = [*signs, *(f"{sign}</w>" for sign in signs)]
    words += [f"<|unused {n}|>" for n in range(49406 - len(words))] + ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: n for n, word in enumerate(words)}, merges=[], model_max_length=77)


def measure(pipeline: Any, precision: str) -> dict[str, Any]:
    source = Source("tiny", pipeline, load_recipe("tiny"), precision, 512, 512)
    reason = FORMAT.why_not(source)
    assert reason is None, reason
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tiny.gguf"
        started = time.perf_counter()
        FORMAT.write(source, file)
        seconds = time.perf_counter() - started
        assert FORMAT.check is not None
        parity = FORMAT.check(file, source)
        return {
            "precision": precision,
            "seconds": seconds,
            "bytes": file.stat().st_size,
            "deviation": float(torch_picture(pipeline).std()),
            **parity.to_dict(),
        }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| precision | s to convert | file, MiB | PSNR, dB "
        "| largest difference, of 255 | deviation of the picture, of 255 |",
    ]
    lines.append("|---|---|---|---|---|---|")
    for row in rows:
        size = f"{row['bytes'] / 2**20:.0f}"
        near = f"{row['psnr']} | {row['largest']} | {row['deviation']:.1f}"
        lines.append(f"| {row['precision']} | {row['seconds']:.0f} | {size} | {near} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precisions", nargs="+", default=["q4_0", "q8_0", "fp16"])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args()
    made_by, pipeline, rows = provenance(), tiny(), []
    for precision in given.precisions:
        rows.append(measure(pipeline, precision))
        print(rows[-1], flush=True)
        machine = f"{made_by['processors']} cores of {made_by['processor']}, {made_by['started'][:10]}"
        write_text(given.out / "gguf.md", f"{table(rows)}\n\n{machine}; shared with other work.\n")


if __name__ == "__main__":
    main()
