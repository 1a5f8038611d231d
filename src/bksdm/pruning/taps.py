"""Reading features inside a denoiser while it runs.

Hooks sit on the denoiser itself, never on a wrapper around it, and record only inside `recording`:
gradient checkpointing runs blocks a second time in the backward pass, and that is not recorded.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from bksdm.families.family import first

Given = Mapping[str, Any]  # what modules return, by their paths
Read = Callable[[nn.Module, Any], Tensor]  # a feature, of a module and what it returns


def _like(given: Any, own: Any) -> Any:
    """Tensors in the number formats of a module's own output, and as many of them."""
    if isinstance(own, tuple):
        return tuple(_like(one, other) for one, other in zip(given, own, strict=True))
    return given.to(own.dtype)


def _first(module: nn.Module, output: Any) -> Tensor:  # noqa: ARG001
    return first(output)


class Features:
    """Outputs of the modules of `model` at `paths`.

    Arguments:
        model: The network.
        paths: Of its modules.

    Raises:
        AttributeError: A path names no module.
    """

    def __init__(self, model: nn.Module, paths: Sequence[str]) -> None:
        self._read: Read = _first
        self._instead: Given = {}
        self._target: dict[str, Tensor] | None = None
        self._handles = [
            model.get_submodule(path).register_forward_hook(self._hook_for(path)) for path in dict.fromkeys(paths)
        ]

    def _hook_for(self, path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:  # noqa: ARG001
            if self._target is None:
                return None
            self._target[path] = self._read(module, output)
            return _like(self._instead[path], output) if path in self._instead else None

        return hook

    @contextmanager
    def recording(self, read: Read = _first, instead: Given | None = None) -> Iterator[dict[str, Tensor]]:
        """A dictionary path -> output that is filled by a forward pass inside the block.

        Arguments:
            read: What is taken of a module and of what it returns.
            instead: What modules give on in the place of their own output, once that is read.
        """
        self._target, self._read, self._instead = {}, read, instead or {}
        try:
            yield self._target
        finally:
            self._target, self._instead = None, {}

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
