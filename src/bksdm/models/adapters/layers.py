r"""What a file's tensors do to the weight of one layer.

Whatever the layout, an adapter changes a weight $W$ by some $\Delta$, which `change` gives:

| layout | $\Delta$ | source |
|---|---|---|
| LoRA, LoCon | $\frac{\alpha}{r} B A$, Tucker's with a core between | arXiv 2106.09685; LyCORIS, arXiv 2309.14859 |
| LoHa | $\frac{\alpha}{r} (B_1 A_1) \odot (B_2 A_2)$ | FedPara, arXiv 2108.06098 |
| LoKr | $\frac{\alpha}{r} W_1 \otimes W_2$ | LyCORIS |
| whole difference, of norms too | what the file says | LyCORIS |
| (IA)^3 | $W$ times a vector, over inputs or outputs | arXiv 2205.05638 |
| any of them with DoRA | $m \frac{W + \Delta}{\|W + \Delta\|} - W$, norms by output or by input | arXiv 2402.09353 |

Names are those of LyCORIS, whose own functions multiply factors.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bksdm.common.errors import InputError

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """A way to write a change.

    Attributes:
        name: For people.
        needs: Tensors without which it is not whole: one of each tuple.
        also: Tensors that may be there.
        delta: From them and the layer's weight to the change.
    """

    name: str
    needs: tuple[tuple[str, ...], ...]
    also: tuple[str, ...]
    delta: Callable[[Tensors, Tensor], Tensor]

    @property
    def known_by(self) -> set[str]:
        return {name for need in self.needs for name in need}


def check_lycoris() -> None:
    """Say what to install where lycoris-lora is missing.

    Raises:
        InputError: Naming the command.
    """
    try:
        import lycoris.functional  # noqa: F401, PLC0415
    except ImportError as error:
        raise InputError("this layout needs lycoris-lora; run pip install 'bksdm[lora]'") from error


def _lora(own: Tensors, weight: Tensor) -> Tensor:  # noqa: ARG001
    down, up = own["lora_down.weight"], own["lora_up.weight"]
    scale = scale_of(own)
    if "lora_mid.weight" not in own:
        return scale * (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])
    check_lycoris()
    from lycoris.functional.locon import diff_weight  # noqa: PLC0415

    return diff_weight(down, up, own["lora_mid.weight"], gamma=scale)  # type: ignore[no-any-return]


def _loha(own: Tensors, weight: Tensor) -> Tensor:
    check_lycoris()
    from lycoris.functional.loha import diff_weight  # noqa: PLC0415

    factors = [own.get(f"hada_{name}") for name in ("w1_b", "w1_a", "w2_b", "w2_a", "t1", "t2")]
    return diff_weight(*factors, gamma=torch.tensor(scale_of(own), dtype=weight.dtype))  # type: ignore[no-any-return]


def _lokr(own: Tensors, weight: Tensor) -> Tensor:  # noqa: ARG001
    check_lycoris()
    from lycoris.functional.lokr import kron_weight  # noqa: PLC0415

    names = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
    return kron_weight(*(own.get(f"lokr_{name}") for name in names), scale=scale_of(own))  # type: ignore[no-any-return]


def _ia3(own: Tensors, weight: Tensor) -> Tensor:
    axis = 1 if own["on_input"].item() else 0
    return weight * own["weight"].reshape(_along(axis, weight))


def _pefts_ia3(own: Tensors, weight: Tensor) -> Tensor:
    return _ia3({"weight": own["ia3_l"] - 1, "on_input": own["on_input"]}, weight)


_MORE = ("alpha", "dora_scale", "diff_b")
# A layer is of the first of them that has a tensor which it needs.
LAYOUTS = (
    Layout("LoRA", (("lora_down.weight",), ("lora_up.weight",)), ("lora_mid.weight", *_MORE), _lora),
    Layout(
        "LoHa",
        (("hada_w1_a",), ("hada_w1_b",), ("hada_w2_a",), ("hada_w2_b",)),
        ("hada_t1", "hada_t2", *_MORE),
        _loha,
    ),
    Layout(
        "LoKr",
        (("lokr_w1", "lokr_w1_a"), ("lokr_w1", "lokr_w1_b"), ("lokr_w2", "lokr_w2_a"), ("lokr_w2", "lokr_w2_b")),
        ("lokr_t2", *_MORE),
        _lokr,
    ),
    Layout("whole difference", (("diff",),), ("diff_b",), lambda own, weight: own["diff"]),
    Layout("difference of a norm", (("w_norm",),), ("b_norm",), lambda own, weight: own["w_norm"]),
    Layout("peft's (IA)^3", (("ia3_l",), ("on_input",)), (), _pefts_ia3),
    Layout("(IA)^3", (("weight",), ("on_input",)), (), _ia3),
    Layout("difference of a bias", (("diff_b",),), (), lambda own, weight: torch.zeros_like(weight)),
)


def layout_of(own: Tensors) -> Layout:
    """The layout that a layer's tensors are in.

    Raises:
        ValueError: In none, not whole, or with a tensor that has no meaning there.
    """
    marks = set(own) - {"on_input"}  # both kinds of (IA)^3 have it
    layout = next((layout for layout in LAYOUTS if marks & layout.known_by), None)
    if layout is None:
        raise ValueError(f"has {', '.join(sorted(own))}, which is no layout that is known")
    for need in layout.needs:
        if not set(own) & set(need):
            raise ValueError(f"is a {layout.name} and has no {' or '.join(need)}")
    strange = sorted(set(own) - layout.known_by - set(layout.also))
    if strange:
        raise ValueError(f"is a {layout.name} and has {strange[0]} besides, which has no meaning there")
    return layout


def change(own: Tensors, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What a layer's tensors add to its weight, and to its bias where they do.

    Arguments:
        own: The tensors, of the type and on the device of `weight`.
        weight, bias: The layer's.

    Returns:
        Changes with the shapes of `weight` and `bias`.

    Raises:
        ValueError: The tensors do not belong together, or not to this layer; the message goes after the layer's name.
    """
    layout = layout_of(own)
    try:
        delta = layout.delta(own, weight)
    except (RuntimeError, IndexError, ValueError, TypeError) as error:
        raise ValueError(
            f"has tensors whose shapes do not go together ({' '.join(str(error).split())[:120]})"
        ) from error
    flat = delta.ndim == 2 and delta.shape == weight.flatten(1).shape  # as products of a convolution's factors are
    if not flat and _kernel(delta.shape) != _kernel(weight.shape):
        raise ValueError(f"is {_shown(delta.shape)}, and the model's {_shown(weight.shape)}")
    delta = delta.reshape(weight.shape)
    if "dora_scale" in own:
        delta = _decomposed(weight, weight + delta, own["dora_scale"]) - weight
    moved = own.get("diff_b", own.get("b_norm"))
    if layout.name == "peft's (IA)^3" and bias is not None and not own["on_input"].item():
        moved = bias * (own["ia3_l"].flatten() - 1)
    if moved is not None and (bias is None or moved.numel() != bias.numel()):
        raise ValueError(f"moves a bias of {moved.numel()}, and the model's has {0 if bias is None else bias.numel()}")
    return delta, None if moved is None or bias is None else moved.reshape(bias.shape)


def rank_of(own: Tensors) -> int:
    """The rank of a layer's matrices; 0 where there are none."""
    inner = ("lora_down.weight", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")
    return next((own[name].shape[0] for name in inner if name in own), 0)


def scale_of(own: Tensors) -> float:
    r"""$\alpha / r$; 1 where alpha is not given, or 0, as kohya's scripts and LyCORIS have it, or there is no rank."""
    alpha, rank = float(own["alpha"]) if "alpha" in own else 0.0, rank_of(own)
    return alpha / rank if alpha and rank else 1.0


def _decomposed(weight: Tensor, changed: Tensor, magnitude: Tensor) -> Tensor:
    """DoRA: `changed` with the norms `magnitude`, by output, or by input where the magnitudes have that shape."""
    by_input = magnitude.ndim > 1 and magnitude.shape[0] == 1 and magnitude.shape[1] == weight.shape[1]
    axis = 1 if by_input else 0
    if magnitude.numel() != weight.shape[axis]:
        raise ValueError(f"has {magnitude.numel()} magnitudes, and the model's {weight.shape[axis]} outputs")
    norms = changed.transpose(0, axis).flatten(1).norm(dim=1)
    share: Tensor = magnitude.flatten() / norms
    return changed * share.reshape(_along(axis, weight))


def _along(axis: int, weight: Tensor) -> list[int]:
    """A shape with which a vector varies along one axis of a weight."""
    return [-1 if number == axis else 1 for number in range(weight.ndim)]


def _kernel(shape: torch.Size) -> tuple[int, ...]:
    """A shape in which a convolution of one point is a matrix."""
    return tuple(shape[:2]) if tuple(shape[2:]) == (1, 1) else tuple(shape)


def _shown(shape: torch.Size) -> str:
    if len(shape) == 1:
        return str(shape[0])
    return f"{shape[1]} to {shape[0]}" + (f", {shape[2]} x {shape[3]}" if len(shape) == 4 else "")
