"""Views of a subject that the embedded model has never seen, for personalisation.

    python examples/emoji/personal.py --out runs/personal/images

The icon is one of Noto Emoji that the other three sets lack, so that neither the model, nor its VAE, nor the encoder
that scores it has met it in training (`art.py` takes what all four sets share). Each view is turned, scaled and put on
a background a little differently.
"""

import argparse
from pathlib import Path

from art import SIZE, STYLES, draw, fetch
from PIL import Image

from bksdm.common.runs import replace_folder

SUBJECT = "pinata"
VIEWS = ((0, 1.0, "white"), (-12, 0.9, "white"), (10, 0.8, "#fff4d6"), (-5, 0.75, "#e3f0ff"), (6, 0.95, "#e8f7e4"))


def unseen(cache: Path) -> list[str]:
    """Icons of Noto Emoji that not all sets have."""
    sets = {style: set(fetch(package, cache)["icons"]) for style, package in STYLES.items()}
    return sorted(sets["noto"] - set.intersection(*sets.values()))


def view(icon: Image.Image, degrees: float, scale: float, background: str) -> Image.Image:
    """The icon on a background, turned and scaled; its own white goes."""
    side = round(SIZE * scale)
    shape = icon.convert("L").point(lambda value: 255 if value < 250 else 0)
    turned = [
        picture.resize((side, side), Image.Resampling.LANCZOS).rotate(degrees, Image.Resampling.BICUBIC, fillcolor=fill)
        for picture, fill in ((icon, "white"), (shape, 0))
    ]
    canvas = Image.new("RGB", (SIZE, SIZE), background)
    corner = (SIZE - side) // 2
    canvas.paste(turned[0], (corner, corner), turned[1])
    return canvas


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subject", default=SUBJECT)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=here / "work" / "npm")
    given = parser.parse_args()
    names = unseen(given.cache)
    if given.subject not in names:
        parser.error(f"{given.subject} is not among the unseen icons: {', '.join(names)}")
    icon = draw(fetch(STYLES["noto"], given.cache), given.subject)
    with replace_folder(given.out) as folder:
        for number, how in enumerate(VIEWS):
            view(icon, *how).save(folder / f"{number}.png")
    print(f"{len(VIEWS)} views of {given.subject} in {given.out}")


if __name__ == "__main__":
    main()
