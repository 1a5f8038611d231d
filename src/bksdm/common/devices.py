"""Which device, which number format on it, and how much of its memory was held."""

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from bksdm.common.errors import InputError

# A VAE is convolutions all but its middle: it is faster with its channels innermost everywhere (docs/log.md).
VAE_LAYOUT = torch.channels_last
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
STORED = PRECISIONS | {"fp8": torch.float8_e4m3fn}  # what weights that do not learn can be kept in


def processors() -> int:
    """How many of the machine's processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_device(name: str = "auto") -> torch.device:
    """A device by name; `auto` takes CUDA, then MPS, then the CPU.

    Raises:
        InputError: There is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind, _, number = name.partition(":")
    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if not (number or "0").isdecimal() or int(number or 0) >= counts.get(kind, 0):
        there = ", ".join(kind for kind, count in counts.items() if count)
        raise InputError(f"device {name!r} is not available here; there is {there}")
    return torch.device(name)


def choose_precision(name: str, device: torch.device, *, training: bool) -> torch.dtype:
    """A number format by name; `auto` takes what is fast on the device.

    On a CPU that is bfloat16 for training where the processor multiplies it in hardware, and
    float32 for making pictures, so that they agree with other machines'.
    """
    if name != "auto":
        return PRECISIONS[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if device.type == "cpu" and training and _cpu_multiplies_bfloat16():
        return torch.bfloat16
    return torch.float32


def keep_in(network: Any, stored: torch.dtype, computing: torch.dtype, *, learns: bool = False) -> None:
    """Bring a network of diffusers into a number format, and keep it so.

    Of 8 bits are its linear layers and convolutions alone, which are widened to `computing` one at a time while they
    compute, by diffusers' layerwise casting; what is left is in `computing`. So are convolutions where gradients pass
    (`learns`): under gradient checkpointing their backward pass would find the narrow weights, and refuse them.
    """
    wanted = stored if stored.itemsize > 1 else computing
    if any(weight.dtype != wanted for weight in network.parameters()):  # else diffusers warns of what it need not do
        network.to(wanted)
    if stored.itemsize == 1:
        wide = (nn.Conv2d,) if learns else ()
        network.enable_layerwise_casting(storage_dtype=stored, compute_dtype=computing, skip_modules_classes=wide)


def offload(network: Any, device: torch.device) -> None:
    """Leave a network of diffusers in this machine's memory; each layer is on the device while it computes.

    On GPUs of NVIDIA the layer after it comes meanwhile. By diffusers' group offloading.
    """
    network.enable_group_offload(device, offload_type="leaf_level", use_stream=device.type == "cuda")


def plain_attention_is_faster(device: torch.device, precision: torch.dtype) -> bool:
    """Whether training is faster with attention as plain matrix products than with torch's fused kernel.

    So it is on a CPU in bfloat16, where the fused backward pass is slow; see docs/log.md.
    """
    return device.type == "cpu" and precision == torch.bfloat16


def channels_last_is_faster(device: torch.device, precision: torch.dtype) -> bool:
    """Whether a U-Net trains faster with its channels innermost: on the tensor cores of a GPU.

    On a CPU it is no faster in float32 and slower in bfloat16; see docs/log.md.
    """
    return device.type == "cuda" and precision in (torch.bfloat16, torch.float16)


def peak_memory(device: torch.device) -> int:
    """The most memory in bytes that this process has held so far: on the GPU, or in all where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource  # noqa: PLC0415 - Windows has none

    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held if sys.platform == "darwin" else held * 1024


@dataclass
class Peak:
    """The most memory in bytes that was held in a block, known when it has ended; None where nothing tells."""

    bytes: int | None = None


@contextlib.contextmanager
def peak_inside(device: torch.device) -> Iterator[Peak]:
    """The most memory held inside the block: of a GPU's tensors, or, on Linux, of the whole process.

    Apple's GPUs keep no peak; what their driver holds for the process at the end bounds it from above.
    """
    found, forget = Peak(), Path("/proc/self/clear_refs")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif device.type == "mps":
        torch.mps.empty_cache()
    elif forget.exists():
        forget.write_text("5")
    yield found
    if device.type == "cuda":
        found.bytes = torch.cuda.max_memory_allocated(device)
    elif device.type == "mps":
        found.bytes = torch.mps.driver_allocated_memory()
    elif forget.exists():
        status = Path("/proc/self/status").read_text().splitlines()
        found.bytes = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given, as a clock must."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _cpu_multiplies_bfloat16() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
