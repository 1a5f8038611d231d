"""Which layer of the teacher each layer of a student stands for, in the order in which data leaves them.

It stands for itself and those removed right behind it: what the next layer took in the teacher came out of the last of
these. What is removed within an attention is stood for by what stays within it.
"""

from collections.abc import Iterator, Sequence

from bksdm.families import family_of
from bksdm.families.recipe import Config, Pruning, Tap

OUTPUT = ""  # the path of the network itself, which gives the answer


def places(pruning: Pruning, teacher: Config) -> list[Tap]:
    """Every layer that stays, beside the last that it stands for, and in the end the answers of both.

    Arguments:
        pruning: What follows from the recipe.
        teacher: The config of its denoiser.
    """
    family = family_of(teacher)
    here = {pruning.teacher_key(path): path for path in family.passed(pruning.student_config)}
    return [*_stood_for(family.passed(teacher), here), Tap(OUTPUT, OUTPUT)]


def _stood_for(passed: Sequence[str], here: dict[str, str]) -> Iterator[Tap]:
    last: dict[str, str] = {}
    around = {path: next((layer for layer in passed if path.startswith(f"{layer}.")), "") for path in passed}
    now: dict[str, str] = {}  # the layer that stays by what is around it
    for path in passed:
        now[around[path]] = path if path in here else now.get(around[path], "")
        last[now[around[path]]] = path
    yield from (Tap(last[path], here[path]) for path in passed if path in here)
