"""How long do the scores of evaluation take at full size, and what do resamples of a score say?

    python benchmarks/scores.py time --pictures 30000     # on the CPU, or --device cuda
    python benchmarks/scores.py spread

`time` scores random features that lie in a file. `spread` draws many sets of pictures from one Gaussian, whose
Fréchet distance is known, and resamples the first: the spread of the resamples should be that of the sets.
Processor seconds stand beside seconds, since they depend less on what else runs.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from bksdm.evaluate.inception import CLASSES, FEATURES
from bksdm.evaluate.statistics import (
    Gaussian,
    Rows,
    bootstrap_weights,
    frechet_distances,
    inception_scores,
    kernel_distances,
    precision_and_recall,
)

T = TypeVar("T")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("time", "spread"))
    parser.add_argument("--pictures", type=int, default=30_000)
    parser.add_argument("--resamples", type=int, default=100)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    if given.what == "spread":
        for count in (1_000, 5_000, 30_000):
            spread(count)
        return
    with tempfile.TemporaryDirectory() as folder:
        time_scores(Path(folder), given.pictures, given.resamples, given.device)


def time_scores(folder: Path, count: int, resamples: int, device: str) -> None:
    """Print a line a score, over `count` pictures against as many real ones."""
    rows, reference = (random_rows(folder / f"{name}.npy", count) for name in ("rows", "reference"))
    weights = bootstrap_weights(range(count), resamples, seed=0).to(device)
    real = timed("statistics of the real pictures", lambda: Gaussian.of(reference))
    timed("root of their covariance", lambda: real.root)
    timed("Frechet distance, one resample", lambda: frechet_distances(rows, real, weights[:1]))
    timed(f"kernel distance, {resamples} resamples", lambda: kernel_distances(rows, reference, weights))
    timed(f"Inception Score, {resamples} resamples", lambda: inception_scores(Logits(rows), weights))
    timed("precision and recall", lambda: precision_and_recall(rows, reference, device=device))


class Logits:
    """The first columns of features, as many as there are classes."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, where: slice) -> NDArray[np.float32]:
        block: NDArray[np.float32] = self.rows[where][:, :CLASSES]
        return block


def random_rows(path: Path, count: int) -> Rows:
    """Features in a file, mapped and not read."""
    rng = np.random.default_rng(0)
    mapped = np.lib.format.open_memmap(path, "w+", np.float32, (count, FEATURES))
    for start in range(0, count, 1000):
        block = mapped[start : start + 1000]
        block[:] = np.abs(rng.standard_normal(block.shape, dtype=np.float32))
    rows: Rows = np.load(path, mmap_mode="r")
    return rows


def timed(what: str, work: Callable[[], T]) -> T:
    seconds, processor = time.perf_counter(), time.process_time()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds, processor = time.perf_counter() - seconds, time.process_time() - processor
    print(f"{what}: {seconds:.1f} s, {processor:.1f} s of the processor", flush=True)
    return result


def spread(count: int, sets: int = 60, width: int = 64) -> None:
    """Print the Fréchet distance of many sets of `count` pictures, and of resamples of one."""
    rng = np.random.default_rng(0)
    shift, scale = 0.5, 1.3
    real = Gaussian(torch.zeros(width, dtype=torch.float64), torch.eye(width, dtype=torch.float64))

    def pictures() -> NDArray[np.float64]:
        return scale * rng.standard_normal((count, width)) + shift

    ones = torch.ones(1, count, dtype=torch.float64)
    others = torch.cat([frechet_distances(pictures(), real, ones) for _ in range(sets)])
    first, *again = frechet_distances(pictures(), real, torch.cat([ones, bootstrap_weights(range(count), sets, 0)]))
    resampled = torch.stack(again)
    print(
        f"{count} pictures: {width * (shift**2 + (scale - 1) ** 2):.2f} in truth; other sets {others.mean():.2f} +- "
        f"{others.std():.2f}; one set {first:.2f}, its resamples {resampled.mean():.2f} +- {resampled.std():.2f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
