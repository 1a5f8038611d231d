"""Self-contained HTML pages: templates, pictures inside the page, and curves as SVG."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from bksdm.common.assets import asset
from bksdm.common.runs import write_bytes, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GRID_ROWS = 16
_COLUMNS = 4
_WIDTH, _HEIGHT = 10.4, 2.5  # inches, of a row of panels
_POINTS = 1000  # of a curve; more are not seen
_THUMBNAIL = 420

Lines = Sequence[Mapping[str, float]]


def write_page(path: Path, template: str, **values: Any) -> None:
    """Render a template of the package into a file that needs no other."""
    environment = Environment(loader=FileSystemLoader(asset()), undefined=StrictUndefined, autoescape=True)
    environment.filters |= {"inline": _inline, "thumbnail": _thumbnail}
    write_text(path, environment.get_template(template).render(**values))


def curves(lines: Lines, panels: Mapping[str, Sequence[str]], linear: Sequence[str] = ()) -> str:
    """Values over the steps, as SVG.

    Arguments:
        lines: Records, each with `step`.
        panels: Title -> names of the values in it; what no record has is left out.
        linear: Titles of the panels that are not logarithmic.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415 - half a second, and a run draws once if at all
    from matplotlib.ticker import LogFormatter  # noqa: PLC0415

    shown = lines[:: max(1, math.ceil(len(lines) / _POINTS))]
    columns = min(_COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    with style():
        height = _HEIGHT * rows
        figure = Figure(figsize=(_WIDTH, height))  # margins in inches: a layout engine would draw everything twice
        figure.subplots_adjust(0.05, 0.5 / height, 0.995, 1 - 0.3 / height, wspace=0.3, hspace=0.55)
        grid = figure.subplots(rows, columns, squeeze=False).flatten()
        for axes, (title, names) in zip(grid, panels.items(), strict=False):
            values = []
            for name in names:
                points = [(line["step"], line[name]) for line in shown if name in line]
                axes.plot(*zip(*points, strict=True), label=name.removeprefix("tap/"), linewidth=1.2)
                values += [value for _, value in points]
            logarithmic = title not in linear and any(value > 0 for value in values)
            axes.set(title=title, xlabel="step", yscale="log" if logarithmic else "linear")
            if logarithmic:  # 0.01 in the place of a power of ten, whose typesetting takes most of the time
                axes.yaxis.set_major_formatter(LogFormatter())
                axes.yaxis.set_minor_formatter(LogFormatter())
            axes.grid(alpha=0.3, which="both")
            if len(names) > 1:
                axes.legend(fontsize=7)
        for axes in grid[len(panels) :]:
            axes.set_visible(False)
        return svg(figure)


def shown(count: int) -> range:
    """Numbers of the pictures that a page shows, of `count`: spread over all."""
    return range(0, count, max(1, count // GRID_ROWS))[:GRID_ROWS]


def style() -> AbstractContextManager[None]:
    """How figures are drawn and saved here; the same values give the same SVG."""
    import matplotlib as mpl  # noqa: PLC0415

    return mpl.rc_context({"svg.hashsalt": "bksdm", "font.size": 9})


def svg(figure: Figure) -> str:
    """A figure as an element of a page."""
    text = io.StringIO()
    with style():
        figure.savefig(text, format="svg", metadata={"Date": None})
    whole = text.getvalue()
    return whole[whole.index("<svg") :]


def write_png(path: Path, figure: Figure, dpi: int = 150) -> None:
    """Write a figure as a picture, the same bytes for the same figure."""
    held = io.BytesIO()
    with style():
        figure.savefig(held, format="png", dpi=dpi, metadata={"Software": None})
    write_bytes(path, held.getvalue())


def _inline(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def _thumbnail(source: Path | Image.Image) -> str:
    """A smaller copy, where a picture is wide: a page with many of them stays light."""
    if isinstance(source, Path):
        with Image.open(source) as picture:
            return _embedded(picture) if picture.width > _THUMBNAIL else _inline(source)
    return _embedded(source)


def _embedded(picture: Image.Image) -> str:
    kind, held = "JPEG" if picture.width > _THUMBNAIL else "PNG", io.BytesIO()
    small = picture.convert("RGB")
    small.thumbnail((_THUMBNAIL, 10 * _THUMBNAIL))
    small.save(held, kind, quality=88)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(held.getvalue()).decode()
