"""An IP-Adapter (arXiv 2308.06721) of a teacher for its student.

It has keys and values for the cross-attentions of a U-Net, each under the number of its attention among all of them:
down, up, then the middle. A student has fewer, so that those which it kept get numbers of its own.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from bksdm.common.errors import InputError
from bksdm.families.recipe import Pruning

_NUMBERED = re.compile(r"ip_adapter\.(?P<number>\d+)\.(?P<rest>.+)")


def renumbered(
    tensors: Mapping[str, Tensor], theirs: Sequence[str], ours: Sequence[str], pruning: Pruning
) -> tuple[dict[str, Tensor], dict[str, str | None]]:
    """An IP-Adapter's tensors for a student, and what became of each attention that it has something for.

    Arguments:
        tensors: Of the teacher's.
        theirs, ours: Paths of all attentions of teacher and student, in the order of diffusers' `attn_processors`.
        pruning: Which of them is which.

    Returns:
        The tensors, and the teacher's attentions with the student's or None.

    Raises:
        InputError: It has something for an attention that the teacher has not.
    """
    kept: dict[str, Tensor] = {}
    places: dict[str, str | None] = {}
    for name, tensor in tensors.items():
        match = _NUMBERED.fullmatch(name)
        if match is None:
            kept[name] = tensor
            continue
        number = int(match["number"])
        if number >= len(theirs):
            raise InputError(
                f"it has {name}, and the teacher has {len(theirs)} attentions; it is of another family, so "
                f"give one of this teacher"
            )
        path = theirs[number]
        places[path] = pruning.student_key(path)
        if (here := places[path]) is not None:
            kept[f"ip_adapter.{ours.index(here)}.{match['rest']}"] = tensor
    return kept, places


def attentions(processors: Iterable[str]) -> list[str]:
    """The paths of attentions by the names of their processors."""
    return [name.removesuffix(".processor") for name in processors]


def check_widths(tensors: Mapping[str, Tensor], theirs: Sequence[str], weights: Mapping[str, Tensor]) -> None:
    """Refuse an IP-Adapter whose keys and values are not as wide as the teacher's.

    Raises:
        InputError: Naming the first that is not.
    """
    for name, tensor in tensors.items():
        match = re.fullmatch(r"ip_adapter\.(\d+)\.to_[kv]_ip\.weight", name)
        if match and int(match[1]) < len(theirs):
            wanted = weights[f"{theirs[int(match[1])]}.to_k.weight"].shape
            if tensor.shape != wanted:
                own, there = (f"{shape[1]} to {shape[0]}" for shape in (tensor.shape, wanted))
                raise InputError(
                    f"its {name} is {own}, and the teacher's {there}; it is of another family, so give one of "
                    f"this teacher"
                )
