"""The processes that do one verb together, as `accelerate launch` or `torchrun` started them.

A process that is alone needs none of this: everything here then does at once what it says, and imports no torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from bksdm.common.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, distributed, nn

T = TypeVar("T")

_PATIENCE = timedelta(days=1)  # others may wait while one draws pictures or writes a checkpoint


@dataclass(frozen=True)
class Processes:
    """This process among `count`, of which number 0 is the one that writes and speaks."""

    rank: int = 0
    count: int = 1

    @property
    def main(self) -> bool:
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Every `count`-th of `items`, this process's own."""
        return items[self.rank :: self.count]

    def wait(self) -> None:
        """Return when all processes have come here."""
        self.highest(0)

    def highest(self, number: int) -> int:
        """The largest of the numbers that the processes give; does not wait for the device."""
        if self.count == 1:
            return number
        import torch
        from torch import distributed

        held = torch.tensor(number)
        distributed.all_reduce(held, distributed.ReduceOp.MAX, group=_host_group())
        return int(held)

    def mean(self, values: Tensor) -> Tensor:
        """The mean of the tensors that the processes give, on the device of the run."""
        return self._reduced(values, "SUM") / self.count

    def largest(self, values: Tensor) -> Tensor:
        """The largest of the tensors that the processes give, number by number, on the device of the run."""
        return self._reduced(values, "MAX")

    def _reduced(self, values: Tensor, how: str) -> Tensor:
        held = values.clone()
        if self.count > 1:
            from torch import distributed

            distributed.all_reduce(held, getattr(distributed.ReduceOp, how))
        return held


def processes() -> Processes:
    """The processes of this run; one, if they have not been joined."""
    if not _joined():
        return Processes()
    from torch import distributed

    return Processes(distributed.get_rank(), distributed.get_world_size())


def _joined() -> bool:
    """Whether torch has met others; without its library it has not."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def join() -> None:
    """Meet the other processes, if there are any. Each takes the device that the launcher meant for it."""
    if int(os.environ.get("WORLD_SIZE") or 1) == 1 or _joined():
        return
    from accelerate import PartialState  # slow to import, and one process does not need it

    PartialState(timeout=_PATIENCE)
    _host_group()


def shard(network: nn.Module, device: torch.device) -> None:
    """Spread the weights of a network over the processes; each block is gathered when it computes (FSDP).

    Every process must then call the network at the same time. Its modules stay where they are, so hooks work on.
    """
    if processes().count == 1:
        raise InputError("shard_teacher is for several processes; start them with accelerate launch, or leave it out")
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (processes().count,))
    for child in network.children():
        for block in child if isinstance(child, nn.ModuleList) else [child]:
            fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)


_groups: list[distributed.ProcessGroup] = []


def _host_group() -> distributed.ProcessGroup:
    """For numbers in host memory, whatever carries those of the device."""
    from torch import distributed

    if not _groups:
        _groups.append(distributed.new_group(backend="gloo", timeout=_PATIENCE))
    return _groups[0]
