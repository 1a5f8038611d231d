"""The real pictures: their features, or no more than the mean and covariance of these."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from bksdm.common.errors import InputError
from bksdm.common.runs import files_digest
from bksdm.evaluate.blocks import BlockRows, Blocks
from bksdm.evaluate.networks import FEATURES, IMAGE, TEXT, Networks
from bksdm.evaluate.sources import Finished
from bksdm.evaluate.statistics import Gaussian


@dataclass(frozen=True)
class Statistics:
    """A reference that is a file of pytorch-fid's, with mean and covariance of features."""

    path: Path
    gaussian: Gaussian
    digest: str

    @classmethod
    def load(cls, path: Path) -> "Statistics":
        """Read the file.

        Raises:
            InputError: It is not there, or no such file.
        """
        return cls(path, Gaussian.load(path), files_digest([path]))

    def check(self, size: int) -> None:
        """Refuse features of another length.

        Raises:
            InputError: Naming both lengths.
        """
        found = len(self.gaussian.mean)
        if found != size:
            raise InputError(
                f"reference {self.path} has statistics of {found} features, and the pictures get {size}; "
                f"give statistics of the same network, or a folder of pictures"
            )


def open_reference(reference: str) -> Statistics | Finished:
    """What `--reference` names: an `.npz` file of statistics, or pictures.

    Raises:
        InputError: It is neither.
    """
    path = Path(reference)
    return Statistics.load(path) if path.suffix == ".npz" else Finished.of(reference, real=True)


@dataclass(frozen=True)
class RealFeatures:
    """Features of the real pictures, as far as there are any.

    Attributes:
        count: How many pictures there are; 0 where there are no more than statistics.
        gaussian: Their mean and covariance.
        rows: The features themselves.
        images: In the space of the encoder.
        texts: Those of the captions.
        captions: One a picture.
    """

    count: int = 0
    gaussian: Gaussian | None = None
    rows: BlockRows | None = None
    images: BlockRows | None = None
    texts: BlockRows | None = None
    captions: Sequence[str] = ()

    @classmethod
    def of(
        cls, source: Finished, networks: Networks, preparation: str, folder: Path, *, gaussian: bool
    ) -> "RealFeatures":
        """Look at the pictures, or read what was seen of them before."""
        blocks = Blocks(folder / "features", len(source))
        captions = source.captions

        def look(numbers: range) -> Mapping[str, Tensor]:
            pictures = source.pictures(numbers, preparation)
            return networks.look(pictures, captions and captions[numbers.start : numbers.stop])

        blocks.fill(look, "real pictures")
        rows = blocks.rows(FEATURES)
        return cls(
            count=len(source),
            gaussian=Gaussian.of(rows) if gaussian and rows else None,
            rows=rows,
            images=blocks.rows(IMAGE),
            texts=blocks.rows(TEXT),
            captions=captions or (),
        )
