"""What a family says of single files with the original names: where tensors lie in them, and what they do not tell.

The names are those that a model's authors gave its tensors; diffusers and transformers have others.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

FileShapes = Mapping[str, tuple[int, ...]]  # of the tensors of a file, by their names in it


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in a file.

    Attributes:
        name: Of the tensor there.
        third: Which third of its rows, where query, key and value are one tensor; None for all of them.
        spatial: Whether a matrix (A, B) is a convolution (A, B, 1, 1) there.
        turned: Whether a matrix (A, B) is (B, A) there.
    """

    name: str
    third: int | None = None
    spatial: bool = False
    turned: bool = False


@dataclass(frozen=True)
class Part:
    """A network in a file.

    Attributes:
        prefix: What the names of its tensors there begin with.
        places: Where tensors with these names in diffusers or transformers lie; `InputError` where one has no place.
        config: Its config, from names and shapes alone; `InputError` where the file does not hold it whole.
    """

    prefix: str
    places: Callable[[Iterable[str]], dict[str, Place]]
    config: Callable[[FileShapes], dict[str, Any]]


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer of a file that holds none.

    Attributes:
        hub_id: Where it is on the Hub.
        settings: What is said when it is loaded.
    """

    hub_id: str
    settings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Layout:
    """How a pipeline lies in a file.

    Attributes:
        parts: Its networks, by their names in a pipeline, the denoiser first.
        scheduler: Config of the scheduler, with its class, where a file tells of none.
        vocabularies: Of its tokenizers, in their order, where a file tells of none.
    """

    parts: Mapping[str, Part]
    scheduler: Mapping[str, Any]
    vocabularies: tuple[Vocabulary, ...]
