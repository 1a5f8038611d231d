"""The most memory that a model takes while it makes pictures, measured in a process of its own.

The peak of a process cannot be divided among the models in it, and memory that one has left is there for the
next, so every model gets a fresh process (`python -m bksdm.evaluate.peak`), which makes one batch of each size, the
smallest first.
"""

import dataclasses
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import psutil
import torch

from bksdm.common.devices import peak_inside, peak_memory
from bksdm.common.errors import InputError
from bksdm.generate.exported import is_exported, open_exported, sample_exported
from bksdm.generate.requests import Request
from bksdm.generate.sampling import sample
from bksdm.models.decoder import load_model
from bksdm.models.pipelines import quiet_libraries

_STEPS = 2  # a third holds no more than a second, but for a few latents
_TOO_LITTLE_MEMORY = 3  # exit code


@dataclass(frozen=True)
class Work:
    """What a process is to do; plain values, which travel as JSON.

    Attributes:
        model: The MODEL, or an exported folder.
        batch_sizes: Pictures at a time, rising.
        guidance: Guidance scale; 1 or less for none.
        height, width: In pixels.
        device: Where to compute.
        dtype: Name of the weights' type in torch.
        threads: Of the CPU.
        decoder: Small decoder in the place of the model's own.
    """

    model: str
    batch_sizes: tuple[int, ...]
    guidance: float
    height: int
    width: int
    device: str
    dtype: str
    threads: int
    decoder: str | None = None


def peaks(work: Work) -> dict[int, int]:
    """Bytes that the model took at most, by batch size.

    On a GPU these are the tensors there. On a CPU it is the resident memory of the process less what the libraries
    held before the model was loaded: while the batch is made, on Linux; elsewhere since the process started, so that
    loading counts too.

    Raises:
        InputError: There is not enough memory for one of the batches.
    """
    command = [sys.executable, "-m", "bksdm.evaluate.peak"]
    given = json.dumps(dataclasses.asdict(work))
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=False)
    found = {int(size): int(held) for size, held in map(json.loads, done.stdout.splitlines())}
    if done.returncode in (_TOO_LITTLE_MEMORY, -signal.SIGKILL):
        size = next(size for size in work.batch_sizes if size not in found)
        raise InputError(
            f"model {work.model} at batch size {size} and {work.height}x{work.width} pixels takes more memory than "
            f"{work.device} has; give less of either"
        )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise RuntimeError(f"the memory of {work.model} could not be measured: {reason}")
    return found


def _measured(work: Work) -> Iterator[tuple[int, int]]:
    """Batch sizes and bytes, in this process."""
    torch.set_num_threads(work.threads)
    device = torch.device(work.device)
    libraries = psutil.Process().memory_info().rss if device.type == "cpu" else 0
    draw = _drawing(work, device)
    for size in work.batch_sizes:
        requests = [Request("red apple", seed) for seed in range(size)]
        batches = draw(
            requests,
            steps=_STEPS,
            guidance=work.guidance,
            batch_size=size,
            height=work.height,
            width=work.width,
        )
        with peak_inside(device) as peak, torch.inference_mode():
            list(batches)
        held = peak_memory(device) if peak.bytes is None else peak.bytes
        yield size, held - libraries


def _drawing(work: Work, device: torch.device) -> Callable[..., Iterator[object]]:
    if is_exported(work.model):
        return partial(sample_exported, open_exported(work.model))
    return partial(sample, load_model(work.model, getattr(torch, work.dtype), work.decoder).to(device))


def _main() -> None:
    quiet_libraries()
    given = json.load(sys.stdin)
    try:
        for found in _measured(Work(**given)):
            print(json.dumps(found), flush=True)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if "memory" not in str(error) and not isinstance(error, MemoryError):
            raise
        sys.exit(_TOO_LITTLE_MEMORY)


if __name__ == "__main__":
    _main()
