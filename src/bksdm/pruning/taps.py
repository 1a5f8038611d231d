"""Reading features inside a U-Net while it runs.

Hooks sit on the U-Net itself, never on a wrapper around it, and record only inside `recording`:
gradient checkpointing runs blocks a second time in the backward pass, and that is not recorded.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class Features:
    """Outputs of the modules of `model` at `paths`.

    Of a module that returns a tuple (a down block), the first element is read: the hidden states.

    Raises:
        AttributeError: A path names no module.
    """

    def __init__(self, model: nn.Module, paths: Sequence[str]) -> None:
        self._target: dict[str, Tensor] | None = None
        self._handles = [
            model.get_submodule(path).register_forward_hook(self._hook_for(path)) for path in dict.fromkeys(paths)
        ]

    def _hook_for(self, path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001
            if self._target is not None:
                self._target[path] = output[0] if isinstance(output, tuple) else output

        return hook

    @contextmanager
    def recording(self) -> Iterator[dict[str, Tensor]]:
        """A dictionary path -> output that is filled by a forward pass inside the block."""
        self._target = {}
        try:
            yield self._target
        finally:
            self._target = None

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
