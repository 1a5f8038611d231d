"""What does a small decoder save, and what does it cost?

    python benchmarks/decoder.py full                          # Stable Diffusion's sizes, random weights
    python benchmarks/decoder.py embedded                      # the embedded model and its small decoder
    python benchmarks/decoder.py full --rounds 0               # without the clock
    python benchmarks/decoder.py embedded --decoder RUN/decoder

`full` sets a decoder of Stable Diffusion's VAE beside TAESD's, on one latent of 64 x 64, the two taking turns.
`embedded` compares what they decode: latents of real held-out pictures, and latents drawn for the held-out captions,
whose pictures are then scored by `bksdm evaluate`. Tables go to stdout and, with --out, to a file.
"""

import argparse
import copy
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, StableDiffusionPipeline
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bksdm.common.runs import provenance, write_text
from bksdm.data.folder import data_folder, read_captions
from bksdm.data.pictures import to_pixels
from bksdm.evaluate.run import evaluate
from bksdm.evaluate.timing import Interval, Spread, take_turns
from bksdm.generate.requests import Request
from bksdm.generate.sampling import decode, sample_latents, scheduler_named
from bksdm.models.decoder import load_decoder, with_decoder
from bksdm.models.pipelines import image_size, load_pipeline, quiet_libraries
from bksdm.options.evaluate import EvaluateOptions

SD_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}
HELD_OUT, SCORES = "emoji/heldout", ("frechet_distance", "clip_score", "retrieval_r1")
SCHEDULER, STEPS, GUIDANCE = "DPMSolverMultistepScheduler", 8, 2.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("full", "embedded"))
    parser.add_argument("--decoder", default="emoji")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="Markdown file for the tables.")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    quiet_libraries()
    tables = full(arguments.rounds) if arguments.what == "full" else embedded(arguments.decoder, arguments.rounds)
    text = f"{tables}\n\n{provenance()['processor']}, threads: {arguments.threads}\n"
    print(text)
    if arguments.out:
        write_text(arguments.out, text)


def full(rounds: int) -> str:
    """Seconds and GMACs of decoders of Stable Diffusion's size."""
    torch.manual_seed(0)
    vaes = {"AutoencoderKL of SD": AutoencoderKL(**SD_VAE).eval(), "AutoencoderTiny (TAESD)": AutoencoderTiny().eval()}
    return costs(vaes, torch.randn(1, 4, 64, 64), rounds)


def embedded(decoder: str, rounds: int) -> str:
    """Costs, errors and scores of the embedded model with its own decoder and with a small one."""
    own = load_pipeline("emoji")
    small = with_decoder(own, decoder)
    (side, _), factor = image_size(own), own.vae.config.scaling_factor
    pixels = torch.stack([to_pixels(entry.open(), side) for entry in read_captions(data_folder(HELD_OUT))])
    with torch.no_grad():
        encoded = own.vae.encode(pixels).latent_dist.mean * factor
    drawn = drawn_latents(own)
    tables = [costs({"the VAE's own": own.vae, "small": load_decoder(decoder)}, encoded[:1], rounds)]
    rows = [["own and the picture itself", f"{psnr(decoded(own, encoded), pixels):.2f}"]]
    rows += [["small and the picture itself", f"{psnr(decoded(small, encoded), pixels):.2f}"]]
    rows += [["small and own", f"{psnr(decoded(small, encoded), decoded(own, encoded)):.2f}"]]
    rows += [["small and own, drawn latents", f"{psnr(decoded(small, drawn), decoded(own, drawn)):.2f}"]]
    tables.append(table([f"mean PSNR over {len(pixels)} held-out pictures", "dB"], rows))
    return "\n\n".join([*tables, scored({"own": own, "small": small}, drawn)])


def costs(vaes: dict[str, Any], latents: Tensor, rounds: int) -> str:
    """A table of decoders that take turns; the first is compared with. Without rounds, nothing is timed."""
    if not rounds:
        counted = [[name, f"{parameters(vae) / 1e6:.3f}", f"{gmacs(vae, latents):.3f}"] for name, vae in vaes.items()]
        return table(["decoder", "M parameters", "GMACs"], counted)
    works = [partial(vae.decode, latents) for vae in vaes.values()]
    seconds = take_turns({"decode": works}, rounds=rounds, warmup=1, device=latents.device)["decode"]
    rows = []
    for (name, vae), own in zip(vaes.items(), seconds, strict=True):
        spent = Spread.of(own)
        times = Interval.of([first / this for first, this in zip(seconds[0], own, strict=True)])
        rows.append(
            [
                name,
                f"{parameters(vae) / 1e6:.3f}",
                f"{gmacs(vae, latents):.3f}",
                f"{1000 * spent.median:.1f} ({1000 * spent.lower:.1f} - {1000 * spent.upper:.1f})",
                f"{times.median:.2f} ({times.low:.2f} - {times.high:.2f})",
            ]
        )
    return table(["decoder", "M parameters", "GMACs", "ms, median (quartiles)", "times as fast"], rows)


def parameters(vae: Any) -> int:
    networks: list[nn.Module] = [vae.decoder, getattr(vae, "post_quant_conv", None) or nn.Identity()]
    return sum(parameter.numel() for network in networks for parameter in network.parameters())


def gmacs(vae: Any, latents: Tensor) -> float:
    """Of convolutions and matrix products, those inside attention with them."""
    without_data = copy.deepcopy(vae).to("meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        without_data.decode(latents.to("meta"))
    return float(counter.get_total_flops() / 2e9)


def drawn_latents(pipeline: StableDiffusionPipeline) -> Tensor:
    """Final latents for the held-out captions."""
    own = pipeline.scheduler
    pipeline.scheduler = scheduler_named(SCHEDULER, own)
    texts = [entry.text for entry in read_captions(data_folder(HELD_OUT))]
    requests = [Request(text, seed) for seed, text in enumerate(texts)]
    batches = list(sample_latents(pipeline, requests, steps=STEPS, guidance=GUIDANCE, batch_size=25))
    pipeline.scheduler = own
    return torch.cat(batches)


@torch.no_grad()
def decoded(pipeline: StableDiffusionPipeline, latents: Tensor) -> Tensor:
    """Pixels in [-1, 1] of latents as the U-Net has them."""
    chunks = (latents / pipeline.vae.config.scaling_factor).split(16)
    return torch.cat([pipeline.vae.decode(chunk).sample.clamp(-1, 1) for chunk in chunks])


def psnr(one: Tensor, other: Tensor) -> float:
    """Mean over pictures, in dB, for values in [0, 1]."""
    squared = ((one - other) / 2).square().mean(dim=(1, 2, 3)).clamp(min=1e-10)
    return float((-10 * squared.log10()).mean())


def scored(pipelines: dict[str, StableDiffusionPipeline], latents: Tensor) -> str:
    """Scores of the pictures that each makes of the same latents."""
    texts = [entry.text for entry in read_captions(data_folder(HELD_OUT))]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, pipeline in pipelines.items():
            (folder / name).mkdir()
            lines = []
            for number, picture in enumerate(decode(pipeline, latents)):
                picture.save(folder / name / f"{number:03d}.png")
                lines.append(json.dumps({"file_name": f"{number:03d}.png", "text": texts[number]}))
            write_text(folder / name / "metadata.jsonl", "\n".join(lines) + "\n")
        found = evaluate(
            EvaluateOptions(
                models=[f"{name}={folder / name}" for name in pipelines],
                out=str(folder / "scores"),
                reference=HELD_OUT,
                scores=list(SCORES),
                latency=0,
            )
        )
    rows = []
    for name, about in found["models"].items():
        values = [about["scores"][score] for score in SCORES]
        rows.append([name, *(f"{each['value']:.3f} ({each['low']:.3f} - {each['high']:.3f})" for each in values)])
    title = f"decoder, {len(texts)} pictures, {STEPS} steps, guidance {GUIDANCE}"
    return table([title, *(f"{score} (95 % interval)" for score in SCORES)], rows)


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
