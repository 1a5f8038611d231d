"""Pictures of the embedded model for the README, and how many of them are recognised.

    python examples/emoji/grid.py --out docs/images/emoji.png

Makes one picture for each of 100 training captions of different subjects, scores them with the dual
encoder, and writes the first 64 as a grid of 8 x 8.
"""

import argparse
import tempfile
from pathlib import Path

from PIL import Image

from bksdm.data.folder import data_folder, read_captions
from bksdm.data.pictures import open_picture
from bksdm.data.prompts import read_prompts
from bksdm.evaluate.encoder import DualEncoder
from bksdm.evaluate.scores import clip_score, retrieval_r1
from bksdm.generate.run import generate
from bksdm.generate.sampling import side_by_side
from bksdm.models.pipelines import quiet_libraries
from bksdm.options.generate import GenerateOptions

PICTURES, SIDE = 100, 8


def captions() -> list[str]:
    """One caption a subject, of all styles in turn, spread over the alphabet."""
    by_subject: dict[str, list[str]] = {}
    for entry in read_captions(data_folder("emoji/train")):
        by_subject.setdefault(entry.text.split(",")[0], []).append(entry.text)
    every = sorted(by_subject.values())
    chosen = [every[number * len(every) // PICTURES] for number in range(PICTURES)]
    return [texts[number % len(texts)] for number, texts in enumerate(chosen)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--guidance", type=float, help="the model's own by default")
    arguments = parser.parse_args()
    quiet_libraries()
    texts = captions()
    with tempfile.TemporaryDirectory() as folder:
        options = GenerateOptions(
            arguments.model, out=str(Path(folder, "grid")), prompt=texts, batch_size=20, guidance=arguments.guidance
        )
        paths = generate(options)
        drawn = [open_picture(path) for path in paths]
    pictures = drawn[: SIDE * SIDE]
    rows = [pictures[row * SIDE : (row + 1) * SIDE] for row in range(SIDE)]
    sheet = side_by_side(rows)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    sheet.resize((sheet.width * 3 // 2, sheet.height * 3 // 2), Image.Resampling.LANCZOS).save(
        arguments.out, optimize=True
    )
    encoder = DualEncoder.load("emoji")
    real = read_captions(data_folder("emoji/heldout"))
    known = list(dict.fromkeys([*texts, *(entry.text for entry in real), *read_prompts("emoji/train")]))
    pool = dict(zip(known, encoder.text_features(known), strict=True))
    for name, shown, captions_of in (
        ("own samples", drawn, texts),
        ("real held-out art", [entry.open() for entry in real], [entry.text for entry in real]),
    ):
        images = encoder.image_features(shown)
        hits = retrieval_r1(images, captions_of, pool, among=PICTURES)
        score = clip_score(images, encoder.text_features(captions_of))
        print(f"{name}: R@1 among {PICTURES} captions {hits:.1%}, CLIP score {score:.3f}")


if __name__ == "__main__":
    main()
