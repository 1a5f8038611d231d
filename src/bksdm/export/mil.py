"""Core ML programs computed by torch, for machines without Core ML.

A model package holds a program in MIL, Apple's intermediate language: operations one after the other, each with the
number format of what it gives. Here every operation is computed in float32, and what it gives is rounded to half
precision where the program says so; Apple's hardware may add up in half precision as well. Operations are those that
Stable Diffusion's networks become; any other is refused by name. Their meaning: coremltools' MIL reference.
"""

import contextlib
import functools
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# Arguments are tensors, or Python values where they are constants without dimensions.
Given = Mapping[str, Any]
Result = Tensor | Sequence[Tensor]


@dataclass(frozen=True)
class _Step:
    """An operation: its function, its arguments (values or names of what came before) and what it gives."""

    compute: Callable[[Given], Result]
    arguments: Mapping[str, Any]
    outputs: tuple[str, ...]
    half: tuple[bool, ...]
    last: tuple[str, ...]  # names that no later step asks for


@dataclass(frozen=True)
class _Name:
    """An argument that an earlier step gives."""

    name: str


class Program:
    """The program of a `.mlpackage`.

    Arguments:
        package: Its folder.

    Raises:
        NotImplementedError: An operation that is not known here, by name.
    """

    def __init__(self, package: Path) -> None:
        function = _load(package).functions["main"]
        self.inputs = {name: tuple(map(int, variable.shape)) for name, variable in function.inputs.items()}
        self._half_inputs = {name for name, variable in function.inputs.items() if _is_half(variable)}
        self.outputs = tuple(variable.name for variable in function.outputs)
        self._steps = _steps(function, self.outputs)

    @torch.inference_mode()
    def __call__(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs by name of inputs by name, which have the shapes in `inputs`."""
        for name, shape in self.inputs.items():
            if tuple(given[name].shape) != shape:
                raise ValueError(f"input {name} has shape {tuple(given[name].shape)}; the program takes {shape}")
        values = {name: _rounded(given[name], name in self._half_inputs) for name in self.inputs}
        for step in self._steps:
            found = step.compute({key: _filled(argument, values) for key, argument in step.arguments.items()})
            results = [found] if isinstance(found, Tensor) else found
            for name, half, result in zip(step.outputs, step.half, results, strict=True):
                values[name] = _rounded(result, half)
            for name in step.last:
                values.pop(name, None)
        return {name: values[name] for name in self.outputs}


@contextlib.contextmanager
def quiet_coremltools() -> Iterator[Any]:
    """coremltools, without its bars and its notices about versions and libraries that only a Mac has."""
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        import coremltools  # noqa: PLC0415

        yield coremltools


def _load(package: Path) -> Any:
    with quiet_coremltools() as coremltools:
        from coremltools.converters.mil.frontend.milproto.load import load  # noqa: PLC0415

        model = coremltools.models.MLModel(str(package), skip_model_load=True)
        spec = model.get_spec()
        return load(spec, specification_version=spec.specificationVersion, file_weights_dir=model.weights_dir)


def _steps(function: Any, outputs: Sequence[str]) -> list[_Step]:
    constants: dict[str, Any] = {}
    found: list[tuple[Any, dict[str, Any]]] = []
    for operation in function.operations:
        kind = operation.op_type
        if kind == "const":
            constants[operation.outputs[0].name] = _value(operation.outputs[0].val)
        elif kind.startswith("constexpr_"):
            constants[operation.outputs[0].name] = _value(operation.materialized_val_inference())
        elif kind in OPERATIONS:
            found.append((operation, {key: _argument(value, constants) for key, value in operation.inputs.items()}))
        else:
            raise NotImplementedError(f"operation {kind} of {operation.name} is not known here")
    return _with_lifetimes(found, set(outputs))


def _with_lifetimes(found: Sequence[tuple[Any, dict[str, Any]]], kept: set[str]) -> list[_Step]:
    seen = set(kept)
    steps = []
    for operation, arguments in reversed(found):
        asked = {name for argument in arguments.values() for name in _names(argument)}
        outputs = tuple(variable.name for variable in operation.outputs)
        last = tuple((asked | set(outputs)) - seen)
        seen |= asked
        half = tuple(_is_half(variable) for variable in operation.outputs)
        compute = functools.partial(OPERATIONS[operation.op_type], operation) if operation.op_type in _SHAPED else None
        steps.append(_Step(compute or OPERATIONS[operation.op_type], arguments, outputs, half, last))
    return steps[::-1]


def _is_half(variable: Any) -> bool:
    from coremltools.converters.mil.mil import types  # noqa: PLC0415

    return bool(variable.dtype == types.fp16)


def _value(value: Any) -> Any:
    """A constant as a tensor, or as a Python value where it has no dimensions."""
    if isinstance(value, str | bool | int | float):
        return value
    array = np.asarray(value)
    if array.dtype.kind in "US" or array.ndim == 0:
        return array.item()
    kind = {"f": np.float32, "i": np.int64, "u": np.int64, "b": np.bool_}[array.dtype.kind]
    return torch.from_numpy(np.array(array, dtype=kind))


def _argument(value: Any, constants: Mapping[str, Any]) -> Any:
    if value is None:
        return None
    if isinstance(value, list | tuple):
        return [_argument(part, constants) for part in value]
    return constants[value.name] if value.name in constants else _Name(value.name)


def _names(argument: Any) -> Iterator[str]:
    if isinstance(argument, _Name):
        yield argument.name
    elif isinstance(argument, list):
        for part in argument:
            yield from _names(part)


def _filled(argument: Any, values: Mapping[str, Tensor]) -> Any:
    if isinstance(argument, _Name):
        return values[argument.name]
    return [_filled(part, values) for part in argument] if isinstance(argument, list) else argument


def _rounded(tensor: Tensor, half: bool) -> Tensor:
    return tensor.half().float() if half else tensor


def _numbers(value: Any) -> list[int]:
    return [int(number) for number in (value.flatten().tolist() if isinstance(value, Tensor) else [value])]


# Operations; `x` is the first argument of most.


def _linear(given: Given) -> Tensor:
    return F.linear(given["x"], given["weight"], given.get("bias"))


def _conv(given: Given) -> Tensor:
    top, bottom, left, right = _numbers(given["pad"]) if given["pad_type"] == "custom" else (0, 0, 0, 0)
    assert given["pad_type"] in ("custom", "valid")
    x = F.pad(given["x"], (left, right, top, bottom))
    stride, dilation = _numbers(given["strides"]), _numbers(given["dilations"])
    return F.conv2d(x, given["weight"], given.get("bias"), stride, 0, dilation, int(given["groups"]))


def _matmul(given: Given) -> Tensor:
    x: Tensor = given["x"]
    y: Tensor = given["y"]
    return (x.mT if given.get("transpose_x") else x) @ (y.mT if given.get("transpose_y") else y)


def _einsum(given: Given) -> Tensor:
    return torch.einsum(given["equation"], *given["values"])


def _layer_norm(given: Given) -> Tensor:
    shape = [given["x"].shape[axis] for axis in _numbers(given["axes"])]
    return F.layer_norm(given["x"], shape, given.get("gamma"), given.get("beta"), given["epsilon"])


def _batch_norm(given: Given) -> Tensor:
    known = (given["mean"], given["variance"], given.get("gamma"), given.get("beta"))
    return F.batch_norm(given["x"], *known, training=False, eps=given["epsilon"])


def _gelu(given: Given) -> Tensor:
    return F.gelu(given["x"], approximate="none" if given["mode"] == "EXACT" else "tanh")


def _reduce_mean(given: Given) -> Tensor:
    x: Tensor = given["x"]
    return x.mean(_numbers(given["axes"]), keepdim=bool(given["keep_dims"]))


def _reduce_argmax(given: Given) -> Tensor:
    # Of equal values torch promises none in particular; Core ML takes the first.
    x: Tensor = given["x"]
    axis = int(given["axis"])
    return (x == x.amax(axis, keepdim=True)).int().argmax(axis, keepdim=bool(given["keep_dims"]))


def _split(given: Given) -> Sequence[Tensor]:
    x: Tensor = given["x"]
    axis = int(given["axis"])
    if given.get("split_sizes") is not None:
        return torch.split_with_sizes(x, _numbers(given["split_sizes"]), axis)
    return x.chunk(int(given["num_splits"]), axis)


def _gather(given: Given) -> Tensor:
    indices, axis = torch.as_tensor(given["indices"]), int(given["axis"])
    found: Tensor = given["x"].index_select(axis, indices.flatten())
    return found.reshape(*given["x"].shape[:axis], *indices.shape, *given["x"].shape[axis + 1 :])


def _gather_nd(given: Given) -> Tensor:
    assert not given.get("batch_dims")
    x: Tensor = given["x"]
    return x[tuple(given["indices"].unbind(-1))]


def _slice_by_index(given: Given) -> Tensor:
    x: Tensor = given["x"]
    begin, end = _numbers(given["begin"]), _numbers(given["end"])
    strides, from_start, to_end, single = (
        _numbers(given[name]) if given.get(name) is not None else [default] * x.ndim
        for name, default in (("stride", 1), ("begin_mask", 0), ("end_mask", 0), ("squeeze_mask", 0))
    )
    return x[
        tuple(
            begin[i]
            if single[i]
            else slice(None if from_start[i] else begin[i], None if to_end[i] else end[i], strides[i])
            for i in range(x.ndim)
        )
    ]


def _avg_pool(given: Given) -> Tensor:
    assert given["pad_type"] in ("custom", "valid")
    top, bottom, left, right = _numbers(given["pad"]) if given["pad_type"] == "custom" else (0, 0, 0, 0)
    assert (top, left) == (bottom, right)
    kernel, strides = _numbers(given["kernel_sizes"]), _numbers(given["strides"])
    counted = not given["exclude_padding_from_average"]
    return F.avg_pool2d(given["x"], kernel, strides, (top, left), bool(given.get("ceil_mode")), counted)


def _pad(given: Given) -> Tensor:
    assert given["mode"] == "constant"
    pairs = _numbers(given["pad"])
    backwards = [pairs[i + side] for i in range(len(pairs) - 2, -1, -2) for side in (0, 1)]
    return F.pad(given["x"], backwards, value=given["constant_val"])


def _upsample(given: Given) -> Tensor:
    factors = (float(given["scale_factor_height"]), float(given["scale_factor_width"]))
    return F.interpolate(given["x"], scale_factor=factors, mode="nearest")


def _cast(given: Given) -> Tensor:
    x: Tensor = given["x"]
    kind = given["dtype"]
    if kind == "bool":
        return x.bool()
    return x.float() if kind.startswith("fp") else x.long()


def _shaped(operation: Any, given: Given) -> Tensor:
    """Operations that only name the dimensions anew."""
    x: Tensor = given["x"]
    return x.reshape(tuple(map(int, operation.outputs[0].shape)))


_SHAPED = ("expand_dims", "squeeze", "reshape")

OPERATIONS: dict[str, Callable[..., Result]] = {
    **dict.fromkeys(_SHAPED, _shaped),
    "add": lambda given: given["x"] + given["y"],
    "avg_pool": _avg_pool,
    "batch_norm": _batch_norm,
    "cast": _cast,
    "concat": lambda given: torch.cat(given["values"], int(given["axis"])),
    "conv": _conv,
    "cos": lambda given: given["x"].cos(),
    "einsum": _einsum,
    "equal": lambda given: given["x"] == given["y"],
    "gather": _gather,
    "gather_nd": _gather_nd,
    "gelu": _gelu,
    "layer_norm": _layer_norm,
    "linear": _linear,
    "matmul": _matmul,
    "mul": lambda given: given["x"] * given["y"],
    "pad": _pad,
    "real_div": lambda given: given["x"] / given["y"],
    "reduce_argmax": _reduce_argmax,
    "reduce_mean": _reduce_mean,
    "rsqrt": lambda given: given["x"].rsqrt(),
    "sigmoid": lambda given: given["x"].sigmoid(),
    "silu": lambda given: F.silu(given["x"]),
    "sin": lambda given: given["x"].sin(),
    "slice_by_index": _slice_by_index,
    "softmax": lambda given: given["x"].softmax(int(given["axis"])),
    "split": _split,
    "sqrt": lambda given: given["x"].sqrt(),
    "square": lambda given: given["x"].square(),
    "stack": lambda given: torch.stack([torch.as_tensor(value) for value in given["values"]], int(given["axis"])),
    "sub": lambda given: given["x"] - given["y"],
    "transpose": lambda given: given["x"].permute(_numbers(given["perm"])),
    "upsample_nearest_neighbor": _upsample,
}
