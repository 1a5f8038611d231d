"""How wide are intervals of the Fréchet distance by influence, beside the bootstrap's, and what do they cost?

    python benchmarks/frechet_intervals.py

Draws many sets of pictures' features from one distribution: the spread of their distances is what an interval is an
estimate of. Some of the sets are resampled too. Then it times value and interval of 64 pictures and of 30,000 with
Inception's 2,048 features, and `bksdm evaluate` of 64 finished pictures with a random Inception network. Seconds are
the processor's, since they depend less on what else runs.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from bksdm.common.devices import peak_memory
from bksdm.common.runs import provenance, write_text
from bksdm.common.tables import aligned
from bksdm.evaluate.inception import FEATURES, Inception
from bksdm.evaluate.scores import Estimate, Frechet, Resampling, differences
from bksdm.evaluate.statistics import Gaussian

T = TypeVar("T")
Estimates = dict[str, dict[str, Estimate]]

# Prompts, pictures of each, features
SIZES = [(64, 1, 16), (64, 1, 256), (400, 1, 16), (400, 1, 64), (1000, 1, 64), (5000, 1, 64), (400, 4, 64)]
NAME = "frechet_distance"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "frechet_intervals.md")
    parser.add_argument("--sets", type=int, default=200, help="whose spread is the truth")
    parser.add_argument("--resampled", type=int, default=12, help="of them that are resampled")
    parser.add_argument("--resamples", type=int, default=300)
    parser.add_argument("--pictures", type=int, default=30_000, help="in the large set that is timed")
    given = parser.parse_args()
    made_by = provenance()
    widths = [
        ["pictures", "of a prompt", "features", "of what", "truth", "influence", "bootstrap", "influence/bootstrap"]
    ]
    for size in SIZES:
        widths += compared(*size, given.sets, given.resampled, given.resamples)
        print(aligned(widths[-2:]), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        lines = [*timed_few(given.resamples), *timed_many(Path(folder), given.pictures), *timed_verb(Path(folder))]
    text = [
        f"Standard errors of the Fréchet distance, of which 1.96 are half an interval: the spread of {given.sets} sets "
        f"of pictures (truth), and means over {given.resampled} of them of what a set gives by influence and by "
        f"{given.resamples} resamples.",
        "",
        markdown(widths),
        "",
        *(f"- {line}" for line in lines),
        "",
        f"One thread of {made_by['processors']} cores of {made_by['processor']}, {made_by['started'][:10]}; other work "
        f"beside it (load {os.getloadavg()[2]:.1f}), so seconds are upper bounds; peak memory "
        f"{peak_memory(torch.device('cpu')) / 2**30:.1f} GiB.",
    ]
    write_text(given.out, "\n".join(text) + "\n")
    print("\n".join(text))


def markdown(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


class World:
    """Features of two models' pictures: what prompts ask of both, and what is each picture's own.

    Variances of the features fall as 1 / number, as those of a network's nearly do, and pictures differ in how far from
    the mean they are, so that the features are not Gaussian.
    """

    def __init__(self, width: int) -> None:
        variances = 1 / torch.arange(1, width + 1, dtype=torch.float64)
        self.scales = (variances * width / variances.sum()).sqrt()
        self.real = Gaussian(torch.zeros(width, dtype=torch.float64), self.scales.square().diag())
        self.random = torch.Generator().manual_seed(0)

    def draw(self, prompts: int, repeats: int) -> dict[str, Tensor]:
        asked = self._normal(prompts).repeat_interleave(repeats, dim=0)
        own = {name: asked + 0.7 * self._normal(len(asked)) for name in ("a", "b")}
        return {"a": own["a"] + 0.15, "b": 1.1 * own["b"] + 0.15}

    def _normal(self, count: int) -> Tensor:
        shape = count, len(self.scales)
        radii = 1 + 0.3 * torch.randn(count, 1, generator=self.random, dtype=torch.float64)
        return radii * self.scales * torch.randn(shape, generator=self.random, dtype=torch.float64)


def compared(prompts: int, repeats: int, width: int, sets: int, resampled: int, resamples: int) -> list[list[str]]:
    """Two rows: of one model's distance, and of the difference of two."""
    world, units = World(width), [number for number in range(prompts) for _ in range(repeats)]
    values, influence, bootstrap = [], [], []
    for number in range(sets):
        scores = {
            name: Frechet(rows, Gaussian.of(rows), world.real) for name, rows in world.draw(prompts, repeats).items()
        }
        own = Resampling.of(units, resamples if number < resampled else 0, seed=number)
        found = {name: {NAME: own.by_influence(score)} for name, score in scores.items()}
        values.append((found["a"][NAME].value, differences(found)[0].difference))
        if number < resampled:
            influence.append(deviations(found))
            bootstrap.append(deviations({name: {NAME: own.estimate(score)} for name, score in scores.items()}))
    rows = zip(np.std(values, axis=0, ddof=1), np.mean(influence, axis=0), np.mean(bootstrap, axis=0), strict=True)
    return [
        [
            f"{prompts * repeats}",
            f"{repeats}",
            f"{width}",
            what,
            *(f"{value:.4g}" for value in row),
            f"{row[1] / row[2]:.2f}",
        ]
        for what, row in zip(("distance", "difference"), rows, strict=True)
    ]


def deviations(models: Estimates) -> tuple[float, float]:
    return models["a"][NAME].deviation, differences(models)[0].deviation


def timed_few(resamples: int) -> list[str]:
    """Of 64 pictures, with 2,048 features."""
    world = World(FEATURES)
    rows = world.draw(64, 1)["a"]
    own, statistics = timed(lambda: Gaussian.of(rows))
    score, resampling = Frechet(rows, own, world.real), Resampling.of(range(64), resamples, seed=0)
    _, value = timed(lambda: score(torch.ones(1, 64)))
    influence, both = timed(lambda: resampling.by_influence(score))
    bootstrap, again = timed(lambda: resampling.estimate(score))
    _, root = timed(lambda: world.real.root)
    _, whole = timed(lambda: own.distance(world.real))
    return [
        f"64 pictures, {FEATURES} features: statistics {statistics:.2f} s, value {value:.2f} s; with its interval by "
        f"influence {both:.2f} s (± {1.96 * influence.deviation:.3g}), by {resamples} resamples {again:.1f} s "
        f"(± {1.96 * bootstrap.deviation:.3g}).",
        f"The same value from covariances: root of the reference {root:.1f} s, then {whole:.1f} s for each.",
    ]


def timed_many(folder: Path, count: int) -> list[str]:
    """Of many pictures, whose features lie in a file."""
    world, path = World(FEATURES), folder / "rows.npy"
    mapped = np.lib.format.open_memmap(path, "w+", np.float32, (count, FEATURES))
    for start in range(0, count, 1000):
        block = mapped[start : start + 1000]
        block[:] = world.draw(len(block), 1)["a"].float().numpy()
    rows = np.load(path, mmap_mode="r")
    own, statistics = timed(lambda: Gaussian.of(rows))
    _, root = timed(lambda: world.real.root)
    _, distance = timed(lambda: own.distance(world.real))
    resampling = Resampling.of(range(count), 0, seed=0)
    found, both = timed(lambda: resampling.by_influence(Frechet(rows, own, world.real)))
    value, interval = statistics + root + distance, both - distance
    return [
        f"{count} pictures, {FEATURES} features: statistics {statistics:.1f} s, root of the reference {root:.1f} s, "
        f"distance {distance:.1f} s; with its interval by influence {both:.1f} s ({found.value:.4g} ± "
        f"{1.96 * found.deviation:.2g}). So the interval costs {interval:.1f} s, {interval / value:.2f} of the "
        f"{value:.1f} s of the value."
    ]


def timed_verb(folder: Path) -> list[str]:
    """`bksdm evaluate` of 64 finished pictures, the least of three."""
    pictures, weights, real = folder / "pictures", folder / "inception.safetensors", folder / "real.npz"
    pictures.mkdir()
    random = np.random.default_rng(0)
    for number in range(64):
        coarse = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        coarse.resize((256, 256)).save(pictures / f"{number}.png")
    save_file(Inception.random().state_dict(), weights)
    World(FEATURES).real.save(real)
    words = ["-m", "bksdm", "evaluate", pictures, "--reference", real, "--inception_weights", weights, "--scores", NAME]
    first = min(spent([*words, "--out", folder / f"{number}"]) for number in range(3))
    again = min(spent([*words, "--out", folder / "0"]) for _ in range(3))
    imports = min(spent(["-c", "import bksdm.evaluate.run"]) for _ in range(3))
    return [
        f"`bksdm evaluate` of 64 finished pictures (Fréchet distance, Inception, reference an .npz): {first:.1f} s; "
        f"{again:.1f} s where their features lie there already, of which {imports:.1f} s import the libraries."
    ]


def spent(words: list[object]) -> float:
    """Seconds of the processor that a Python takes."""
    command = [sys.executable, *map(str, words)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0, command
    return usage.ru_utime + usage.ru_stime


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """What the work gives, and how many seconds of the processor it takes."""
    began = time.process_time()
    return work(), time.process_time() - began


if __name__ == "__main__":
    main()
