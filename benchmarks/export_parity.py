"""How near is every export to torch? The whole picture, by model, format and precision.

    python benchmarks/export_parity.py                            # all that runs here; goes on where it stopped
    python benchmarks/export_parity.py --formats onnx openvino

Models: the embedded teacher and its three students, retrained for 100 steps as the quickstart does, and pipelines in
the shape of Stable Diffusion 1.x and 2.x with random weights, whole and by the recipe tiny. For each export, `bksdm
export` compares the 8-bit picture of fixed latents, four steps under guidance, with torch's.
"""

import argparse
import dataclasses
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from bksdm.common.errors import InputError
from bksdm.common.runs import provenance, read_lines, write_text
from bksdm.distill.run import distill
from bksdm.export.formats import Format, format_named
from bksdm.export.run import export
from bksdm.models.pipelines import quiet_libraries, save_pipeline
from bksdm.options.distill import DistillOptions
from bksdm.options.export import ExportOptions
from bksdm.options.pruning import PruneOptions
from bksdm.pruning.run import prune

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "export_parity.md"
RECIPES = ("base", "small", "tiny")
FORMATS = ("ldm", "openvino", "onnx", "coreml")
RETRAINING = DistillOptions(
    "emoji", "", "emoji", "", 100, batch_size=32, accumulation=1, lr=1e-3, ema_decay=0.97, flip=False, sample_every=0
)


def models(folder: Path) -> dict[str, str]:
    """Models by name, made where they are missing."""
    found = {"emoji": "emoji"}
    for recipe in RECIPES:
        prune(PruneOptions("emoji", recipe, str(folder / recipe)))
        run = folder / f"{recipe}-kd"
        options = dataclasses.replace(RETRAINING, student=str(folder / recipe), out=str(run))
        found[f"emoji {recipe}"] = str(distill(options))
    return found | random_models(folder)


def random_models(folder: Path) -> dict[str, str]:
    sys.path.insert(0, str(ROOT / "tests"))
    shapes = importlib.import_module("tiny_models")
    found: dict[str, str] = {}
    for name, unet in (("v1", shapes.V1_UNET), ("v2", shapes.V2_UNET)):
        whole, student = folder / name, folder / f"{name}-tiny"
        if not whole.exists():
            save_pipeline(shapes.build_pipeline(unet), whole)
        prune(PruneOptions(str(whole), "tiny", str(student)))
        found |= {f"{name}, random": str(whole), f"{name} tiny, random": str(student)}
    return found


def choices(kind: Format, model: str) -> Iterator[tuple[str, str]]:
    """Precisions, and forms of attention where a format has them; for random weights those alone that lose least."""
    largest = [precision for precision in kind.precisions if precision in ("fp32", "fp16")]
    for precision in largest if "random" in model else kind.precisions:
        yield precision, "original"
    if kind.name == "coreml":
        yield "fp16", "split_einsum"


def measure(folder: Path, formats: list[str]) -> list[dict[str, object]]:
    """One line an export, from `parity.jsonl` where it is there already."""
    ledger = folder / "parity.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    made = models(folder)
    lines = read_lines(ledger)
    for name in formats:
        kind = format_named(name)
        for title, model in made.items():
            for precision, attention in choices(kind, title):
                key = {"model": title, "format": name, "precision": precision, "attention": attention}
                if not any(key.items() <= line.items() for line in lines):
                    lines.append(key | _line(model, kind, precision, attention, folder))
                    write_text(ledger, "".join(json.dumps(line) + "\n" for line in lines))
    return lines


def export_path(folder: Path, kind: Format, precision: str, model: str, attention: str = "original") -> Path:
    """Where this script writes an export."""
    name = f"{kind.name}-{precision}-{Path(model).parent.name}-{Path(model).name}-{attention}"
    return folder / "export" / f"{name}{kind.suffix}"


def _line(model: str, kind: Format, precision: str, attention: str, folder: Path) -> dict[str, object]:
    out = export_path(folder, kind, precision, model, attention)
    out.unlink(missing_ok=True) if kind.suffix else None
    try:
        options = ExportOptions(model, kind.name, str(out), precision=precision, attention=attention)  # type: ignore[arg-type]
        return export(options).to_dict()
    except (InputError, RuntimeError) as error:
        return {"refused": str(error)}


def table(lines: list[dict[str, object]]) -> str:
    """A row a format and precision, a column a model; `max of 255 / dB`."""
    titles = list(dict.fromkeys(str(line["model"]) for line in lines))
    rows: dict[str, dict[str, str]] = {}
    for line in lines:
        note = f", {line['attention']}" if line["attention"] != "original" else ""
        rows.setdefault(f"{line['format']} {line['precision']}{note}", {})[str(line["model"])] = _cell(line)
    text = [f"| | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
    text += [f"| {name} | {' | '.join(cells.get(title, '') for title in titles)} |" for name, cells in rows.items()]
    return "\n".join(text)


def _cell(line: dict[str, object]) -> str:
    parity = line.get("parity")
    if isinstance(parity, dict):
        return f"{parity['largest']} / {'equal' if parity['psnr'] is None else format(parity['psnr'], '.1f')}"
    return "refused" if "refused" in line else "written"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="*", default=list(FORMATS))
    parser.add_argument("--out", type=Path, default=Path("runs/export_parity"))
    given = parser.parse_args()
    quiet_libraries()
    lines = measure(given.out, given.formats)
    said: Callable[[str], str] = lambda name: str(provenance()["versions"].get(name))  # noqa: E731
    machine = f"{provenance()['processor']}, {provenance()['started'][:10]}; torch {said('torch')}"
    refused = sorted({f"- {line['model']}, {line['format']}: {line['refused']}" for line in lines if "refused" in line})
    text = f"Largest difference of 255 / PSNR in dB\n\n{table(lines)}\n\n{machine}.\n\n" + "\n".join(refused)
    print(text)
    write_text(RESULT, f"# Exports against torch\n\n`python benchmarks/export_parity.py`\n\n{text.rstrip()}\n")


if __name__ == "__main__":
    main()
