"""Captions that the embedded art has no pictures of, and no picture that the teacher learnt from: two subjects in one.

    python examples/emoji/unseen.py

Every subject has a picture in every style, in training or held out, so that a caption of one subject is never new.
Writes `art/unseen.txt` of the package's `emoji` assets.
"""

from bksdm.common.assets import asset
from bksdm.common.randomness import permutation
from bksdm.common.runs import write_text
from bksdm.data.prompts import read_prompts

COUNT = 16


def captions() -> list[str]:
    """Of pairs of subjects, each of which is in one pair at most, in all styles in turn."""
    known = [caption.rsplit(", ", 1) for split in ("train", "heldout") for caption in read_prompts(f"emoji/{split}")]
    subjects, styles = (sorted({parts[place] for parts in known}) for place in (0, 1))
    order = [subjects[number] for number in permutation(len(subjects), 0, 0)]
    pairs = zip(order[: 2 * COUNT : 2], order[1 : 2 * COUNT : 2], strict=True)
    return [f"{one} and {other}, {styles[number % len(styles)]}" for number, (one, other) in enumerate(pairs)]


if __name__ == "__main__":
    write_text(asset("emoji", "art", "unseen.txt"), "".join(f"{caption}\n" for caption in captions()))
