"""Does `prepare` use as much memory for 10,000 pictures as for a few, and how near is it to the VAE's own limit?

    python benchmarks/prepare_memory.py

Makes 10,000 pictures of various sizes out of the embedded art, packs them into WebDataset tars, and prepares them
with the embedded teacher, mirrored copies too, in a process whose memory (and that of its readers) is watched.
Beside it: the VAE alone on pictures that are in memory already.
"""

import argparse
import io
import json
import random
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import psutil
import torch
from PIL import Image

from bksdm.common.devices import VAE_LAYOUT
from bksdm.common.runs import provenance, write_text
from bksdm.data.folder import data_folder, read_captions
from bksdm.data.pictures import to_pixels
from bksdm.distill.conditions import Conditions
from bksdm.models.pipelines import load_pipeline, quiet_libraries

BATCH = 16
TAR = 2000


def make(folder: Path, count: int) -> None:
    """Tars of JPEGs with captions, as img2dataset writes them."""
    entries, rng = read_captions(data_folder("emoji/train")), random.Random(0)
    pictures = [entry.open() for entry in entries]
    folder.mkdir(parents=True)
    for first in range(0, count, TAR):
        with tarfile.open(folder / f"{first // TAR:05d}.tar", "w") as tar:
            for number in range(first, min(first + TAR, count)):
                entry, picture = entries[number % len(entries)], pictures[number % len(entries)]
                jpeg = io.BytesIO()
                picture.resize((rng.randrange(96, 512), rng.randrange(96, 512))).save(jpeg, "JPEG")
                for kind, content in (("jpg", jpeg.getvalue()), ("txt", entry.text.encode())):
                    info = tarfile.TarInfo(f"{number:09d}.{kind}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


def watch(command: list[str], out: Path) -> list[tuple[int, float]]:
    """Pairs (finished shards, MiB of the process and its readers) while a command runs."""
    seen = []
    process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        try:
            family = [process, *process.children(recursive=True)]
            held = sum(member.memory_full_info().uss for member in family) / 2**20
            seen.append((len(list(out.glob("data-*.arrow"))), held))
        except psutil.Error:
            pass
        time.sleep(0.25)
    assert process.wait() == 0
    return seen


@torch.no_grad()
def vae_alone(seconds: float = 20.0) -> float:
    """Pictures a second, mirrored copies included, without reading or writing anything."""
    pipeline = load_pipeline("emoji", with_denoiser=False)
    pipeline.vae.to(memory_format=VAE_LAYOUT)
    conditions = Conditions.of(pipeline)
    pixels = torch.stack([to_pixels(Image.new("RGB", (64, 64), (n, n, n)), 64) for n in range(BATCH)])
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        conditions.posterior(pixels)
        conditions.posterior(pixels.flip(-1))
        done += BATCH
    return done / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=10_000)
    parser.add_argument("--work", type=Path, default=Path("runs/prepare_memory"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    quiet_libraries()
    shutil.rmtree(arguments.work, ignore_errors=True)
    data, latents = arguments.work / "tars", arguments.work / "latents"
    make(data, arguments.pictures)
    limit = vae_alone()
    command = [sys.executable, "-m", "bksdm", "prepare", str(data), "--teacher", "emoji", "--out", str(latents)]
    began = time.perf_counter()
    seen = watch(command, latents)
    seconds = time.perf_counter() - began
    about = json.loads((latents / "prepared.json").read_text())
    last = max(shards for shards, _ in seen)
    by_shard = {shards: max(held for count, held in seen if count == shards) for shards, _ in seen if shards < last}
    lines = [
        "| shards of 512 done | most memory until the next, MiB |",
        "|---|---|",
        *(f"| {shards} | {held:.0f} |" for shards, held in sorted(by_shard.items())),
    ]
    first, final = by_shard[1], by_shard[max(by_shard)]
    made_by = provenance()
    summary = (
        f"{about['pictures']} pictures and as many mirrored ones in {seconds:.0f} s: {about['pictures'] / seconds:.1f} "
        f"pictures/s in all, {about['images_per_second']:.1f} while it encoded; the VAE alone {limit:.1f} (in the "
        f"run {about['vae_images_per_second']:.1f}). Memory after the first shard {first:.0f} MiB, before the last "
        f"{final:.0f} MiB."
    )
    machine = f"{made_by['processors']} cores of {made_by['processor']}, {made_by['started'][:10]}."
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_text(arguments.out / "prepare_memory.md", "\n\n".join([summary, "\n".join(lines), machine]) + "\n")
    print(summary)


if __name__ == "__main__":
    main()
