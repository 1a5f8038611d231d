"""A denoiser that computes layer by layer, each for all samples before the next.

Layers behind are not computed again: they give what they gave. Of that only what is needed stays in memory, which is
what the last layer gave and what a U-Net keeps for its way up; the rest are zeros that take none.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bksdm.distill.conditions import as_type
from bksdm.evaluate.output_error import Probe

_Hook = Callable[[nn.Module, Any, Any], Any]


class _Reached(Exception):  # noqa: N818 - no error
    """Ends a pass with what a layer gave."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


class Walk:
    """A network, and where it stands.

    Arguments:
        network: Its weights may change ahead of where it stands.
        probes: What it is asked about, in batches.
        passed: Paths of its layers, each of which takes what the one before gives; one may be within a later one.
        kept: Those of them whose outputs are needed farther on.
    """

    def __init__(self, network: Any, probes: Sequence[Probe], passed: Sequence[str], kept: Collection[str]) -> None:
        self.network = network
        self._dtype = network.dtype  # which diffusers looks for in every module
        self._probes = probes
        self._ahead = list(passed)
        self._behind: dict[str, list[Any]] = {}
        self._kept = kept

    def run(self, batch: int, path: str) -> Any:
        """What the layer at `path` gives for a batch, or what the network answers."""
        probe = self._probes[batch]
        with self._recalled(batch), _hooked(self.network, {path: _stop} if path else {}):
            try:
                return probe.family.answer(
                    self.network,
                    probe.latents.to(self._dtype),
                    probe.timesteps,
                    as_type(probe.told, self._dtype),
                )
            except _Reached as reached:
                return reached.output

    @torch.no_grad()
    def advance(self, path: str) -> Iterator[Any]:
        """Go on to behind the layer at `path`; gives what it gave for each batch in turn, and is there at the end."""
        until = self._ahead.index(path) + 1 if path else 0
        now, self._ahead = self._ahead[:until], self._ahead[until:]
        found: dict[str, list[Any]] = {layer: [] for layer in now}

        def remember(layer: str, module: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001
            found[layer].append(output if layer == path or layer in self._kept else _empty(output))

        for batch in range(len(self._probes)):
            with _hooked(self.network, {layer: partial(remember, layer) for layer in now}):
                yield self.run(batch, path)
        self._forget(path)
        self._behind |= found

    def _forget(self, path: str) -> None:
        """Let go of what is no more needed behind this layer; what comes before a layer around it is."""
        around = next((f"{layer}." for layer in self._ahead if path.startswith(f"{layer}.")), "")
        for layer, outputs in self._behind.items():
            if layer.startswith(around) and layer not in self._kept:
                self._behind[layer] = [_empty(output) for output in outputs]

    @contextmanager
    def _recalled(self, batch: int) -> Iterator[None]:
        """Layers behind give what they gave for a batch."""
        modules = {path: self.network.get_submodule(path) for path in self._behind}
        try:
            for path, module in modules.items():
                module.forward = partial(_give, self._behind[path][batch])
            yield
        finally:
            for module in modules.values():
                vars(module).pop("forward", None)


def _give(output: Any, *args: Any, **named: Any) -> Any:  # noqa: ARG001
    return output


def _stop(module: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001
    raise _Reached(output)


def _empty(output: Any) -> Any:
    """Zeros in the place of tensors, which take no memory."""
    if isinstance(output, tuple):
        return tuple(map(_empty, output))
    return output.new_zeros(()).expand(output.shape) if isinstance(output, Tensor) else output


@contextmanager
def _hooked(network: nn.Module, hooks: Mapping[str, _Hook]) -> Iterator[None]:
    """Hooks on what modules give, by their paths."""
    handles = [network.get_submodule(path).register_forward_hook(hook) for path, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
