"""Render open emoji art into a captioned image folder.

Four icon sets, published on npm as one JSON file of SVG bodies each, are drawn on white at 64 px.
A caption names the subject and the style ("red apple, twemoji style"). There are three splits:
`train` and `heldout` hold the subjects of `subjects.txt`, and one pair of (subject, style) in
twelve is in `heldout`, which no training of ours ever reads; `extra` holds everything else that the
four sets share, for the VAE and the dual encoder alone.
"""

import argparse
import io
import json
import subprocess
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import resvg_py
from PIL import Image

from bksdm.common.runs import replace_folder

Icons = dict[str, Any]

STYLES = {
    "noto": "@iconify-json/noto@1.2.9",
    "fluent": "@iconify-json/fluent-emoji@1.2.7",
    "flat": "@iconify-json/fluent-emoji-flat@1.2.6",
    "twemoji": "@iconify-json/twemoji@1.2.5",
}
SIZE = 64
MARGIN = 2
SUPERSAMPLING = 4


def fetch(package: str, cache: Path) -> Icons:
    """The `icons.json` of an npm package, downloaded once into `cache`."""
    target = cache / f"{package.strip('@').replace('/', '-').replace('@', '-')}.tgz"
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        packed = subprocess.run(
            ["npm", "pack", "--silent", package], cwd=cache, check=True, capture_output=True, text=True
        ).stdout.strip()
        (cache / packed).rename(target)
    with tarfile.open(target) as archive:
        member = archive.extractfile("package/icons.json")
        assert member is not None
        icons: Icons = json.load(member)
    return icons


def draw(icons: Icons, name: str) -> Image.Image:
    """One icon on white, RGB, `SIZE` x `SIZE` pixels; drawn larger and reduced, so that thin lines survive."""
    icon = icons["icons"][icons.get("aliases", {}).get(name, {}).get("parent", name)]
    width, height = (icon.get(side, icons[side]) for side in ("width", "height"))
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
    )
    inner = (SIZE - 2 * MARGIN) * SUPERSAMPLING
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=inner, height=inner))
    drawn = Image.open(io.BytesIO(png)).convert("RGBA")
    canvas = Image.new("RGBA", (SIZE * SUPERSAMPLING, SIZE * SUPERSAMPLING), "white")
    canvas.alpha_composite(drawn, (MARGIN * SUPERSAMPLING, MARGIN * SUPERSAMPLING))
    return canvas.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BOX)


def held_out(subject: str, style: str) -> bool:
    """Every third subject, by checksum, loses one of its four styles."""
    checksum = zlib.crc32(subject.encode())
    return checksum % 3 == 0 and list(STYLES)[checksum // 3 % len(STYLES)] == style


def subjects(path: Path) -> Iterator[str]:
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            yield from line.split()


def render(names: list[str], out: Path, cache: Path) -> None:
    """Write `out/{train,heldout,extra}/*.png`, each folder with its `metadata.jsonl`."""
    sets = {style: fetch(package, cache) for style, package in STYLES.items()}
    shared = set.intersection(*(set(icons["icons"]) for icons in sets.values()))
    splits: dict[str, list[tuple[str, str]]] = {
        "train": [(n, s) for n in names for s in STYLES if not held_out(n, s)],
        "heldout": [(n, s) for n in names for s in STYLES if held_out(n, s)],
        "extra": [(n, s) for n in sorted(shared - set(names)) for s in STYLES],
    }
    for split, pairs in splits.items():
        with replace_folder(out / split) as folder:
            rows = []
            for name, style in pairs:
                file_name = f"{name}.{style}.png"
                draw(sets[style], name).save(folder / file_name)
                rows.append(json.dumps({"file_name": file_name, "text": f"{name.replace('-', ' ')}, {style} style"}))
            (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
        print(f"{split}: {len(pairs)} pictures", flush=True)


if __name__ == "__main__":
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=here / "work" / "art")
    parser.add_argument("--cache", type=Path, default=here / "work" / "npm")
    arguments = parser.parse_args()
    render(list(subjects(here / "subjects.txt")), arguments.out, arguments.cache)
