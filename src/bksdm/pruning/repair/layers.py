"""Layer after layer of a student, in the order of the data, is brought to what its teacher has there.

What a layer takes is what those before it give after they were corrected, so that it meets the errors that are left.
Its last operations are changed by least squares; the derivative of what the layer gives by what they give is asked of
autograd, so that sums, gates and norms that follow are not known here.
"""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bksdm.common.errors import InputError
from bksdm.common.randomness import generator
from bksdm.evaluate.output_error import Probe
from bksdm.families.recipe import Pruning, Tap
from bksdm.pruning.repair.least_squares import Change, NormalEquations, Scales
from bksdm.pruning.repair.places import OUTPUT, places
from bksdm.pruning.repair.record import Residual
from bksdm.pruning.repair.walk import Walk


class Repair:
    """Corrects a student.

    Arguments:
        teacher, student: Denoisers on one device, in float32. Weights of the student change, and take no gradients
            from then on; the teacher stays as it is.
        pruning: What the student follows from.
        probes: Noisy latents with captions, in batches.
        ridge: See `NormalEquations.changes`.
        seed: Of the signs by which squares of derivatives are estimated.

    Attributes:
        places: What is corrected, in order.
        changed: Names of the student's tensors that differ from the teacher's so far.
        output: Mean squared difference of the answers, just pruned and, in the end, repaired.
    """

    def __init__(
        self, teacher: Any, student: Any, pruning: Pruning, probes: Sequence[Probe], ridge: float, seed: int = 0
    ) -> None:
        self._family = probes[0].family
        self._probes = probes
        self._ridge = ridge
        self._seed = seed
        self.places = places(pruning, teacher.config)
        self._teacher, self._student = self._walk(teacher), self._walk(student.requires_grad_(False))
        self.changed: list[str] = []
        self._pruned = [probe.output(student) for probe in probes]
        self.output = (math.nan, math.nan)

    def _walk(self, network: Any) -> Walk:
        passed, kept = self._family.passed(network.config), self._family.skip_connections(network.config)
        return Walk(network, self._probes, passed, _among(kept, passed))

    def residuals(self) -> Iterator[Residual]:
        """Correct one layer after the other; gives what became of each."""
        for place in self.places:
            yield self._corrected(place)

    def _corrected(self, place: Tap) -> Residual:
        wanted = [self._feature(output, batch) for batch, output in enumerate(self._teacher.advance(place.teacher))]
        size = sum(map(_square, wanted)) or 1.0
        groups = self._family.adding(self._student.network, place.student)
        before = [self._fit(place.student, names, wanted) for names in groups]
        outputs = enumerate(self._student.advance(place.student))
        after = sum(_square(wanted[batch] - self._feature(output, batch)) for batch, output in outputs)
        if place.student == OUTPUT:
            pruned = sum(_square(one - own) for one, own in zip(wanted, self._pruned, strict=True))
            count = sum(map(Tensor.numel, wanted))
            self.output = pruned / count, after / count
        return Residual(place.student or "output", place.teacher or "output", before[0] / size, after / size)

    def _fit(self, layer: str, names: Sequence[str], wanted: Sequence[Tensor]) -> float:
        """Change the operations of a layer with these names in it; gives the square of its residual before that."""
        paths = [f"{layer}.{name}".removeprefix(".") for name in names]
        operations = [self._student.network.get_submodule(path) for path in paths]
        equations, residuals = _equations(paths, operations), []
        for batch, target in enumerate(wanted):
            taken, given, output = _opened(operations, lambda batch=batch: self._student.run(batch, layer))  # type: ignore[misc]
            output = self._feature(output, batch)
            residuals.append(target - output.detach())
            (gradient,) = torch.autograd.grad(output, given, residuals[-1], retain_graph=True)
            (gains,) = torch.autograd.grad(output, given, self._signs(layer, batch, output))
            equations.add(taken, gradient, gains.square())
        changes = equations.changes(self._ridge)
        _add(operations, changes)
        before = sum(map(_square, residuals))
        if not equations.exact:
            length = self._length(layer, residuals, wanted)
            _add(operations, changes, length - 1)
            if self._residual(layer, wanted) > before:  # what follows is no sum, and the step too long
                _add(operations, changes, -length)
        self.changed += [f"{path}.{name}" for path, change in zip(paths, changes, strict=True) for name in change]
        return before

    def _length(self, layer: str, residuals: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
        """How much of a change, which is made already, brings a layer closest, if that moves with it in proportion."""
        along = square = 0.0
        for batch, (residual, target) in enumerate(zip(residuals, wanted, strict=True)):
            moved = self._given(layer, batch) - (target - residual)
            along += float((residual.double() * moved).sum())
            square += _square(moved)
        return along / square if square else 0.0

    def _residual(self, layer: str, wanted: Sequence[Tensor]) -> float:
        return sum(_square(target - self._given(layer, batch)) for batch, target in enumerate(wanted))

    def _given(self, layer: str, batch: int) -> Tensor:
        with torch.no_grad():
            return self._feature(self._student.run(batch, layer), batch)

    def _signs(self, layer: str, batch: int, like: Tensor) -> Tensor:
        signs = torch.randint(2, like.shape, generator=generator(self._seed, f"signs {layer}", batch))
        return (2 * signs - 1).to(like)

    def _feature(self, output: Any, batch: int) -> Tensor:
        latents = self._probes[batch].latents
        if isinstance(output, Tensor) and output.shape == latents.shape:
            return output
        return self._family.feature(self._student.network, output, latents, captions=True)


def _among(kept: Collection[str], passed: Sequence[str]) -> set[str]:
    """Layers that data passes of those whose outputs are kept, which may be named by a list of one."""
    return {path for path in passed if path in kept or path.removesuffix(".0") in kept}


def _equations(paths: Sequence[str], operations: Sequence[nn.Module]) -> NormalEquations | Scales:
    if all(map(_is_linear, operations)):
        return NormalEquations(operations)  # type: ignore[arg-type]
    kinds = {type(operation).__name__ for operation in operations}
    if len(operations) == 1 and kinds <= {"RMSNorm"}:
        return Scales(operations)
    raise InputError(f"{paths[0]} is a {kinds.pop()}, for which no least squares are known; leave out --repair")


def _is_linear(operation: nn.Module) -> bool:
    if isinstance(operation, nn.Conv2d):
        plain = operation.groups == 1 and operation.padding_mode == "zeros" and operation.dilation == (1, 1)
        return plain and not isinstance(operation.padding, str)
    return isinstance(operation, nn.Linear)


def _opened(operations: Sequence[nn.Module], run: Callable[[], Any]) -> tuple[list[Tensor], Tensor, Any]:
    """What operations take, what the last of them gives, and what `run` gives, which is a function of the latter."""
    found: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        found[module] = args[0], output.detach().requires_grad_()
        return found[module][1]

    handles = [operation.register_forward_hook(hook) for operation in operations]
    try:
        output = run()
    finally:
        for handle in handles:
            handle.remove()
    pairs = [found[operation] for operation in operations]
    return [taken for taken, _ in pairs], pairs[-1][1], output


def _add(operations: Sequence[nn.Module], changes: Sequence[Change], share: float = 1.0) -> None:
    for operation, change in zip(operations, changes, strict=True):
        for name, difference in change.items():
            parameter: Tensor = getattr(operation, name)
            parameter.data += share * difference


def _square(values: Tensor) -> float:
    return float(values.double().square().sum())
