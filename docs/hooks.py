"""What the documentation site computes when it is built: the page of all options, one that draws, equations as MathML.

mkdocs calls `on_files`, `on_page_markdown` and `on_page_content`. Nothing that is made here is kept in the repository.
"""

import dataclasses
import html
import logging
import os
import re
import shutil
import types
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, Union, get_args, get_origin

from docstring_parser import parse
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from bksdm.cli import VERBS, options_of
from bksdm.common.assets import ART, asset
from bksdm.common.errors import InputError
from bksdm.common.runs import cache_folder, files_digest
from bksdm.options.export import ExportOptions
from bksdm.runtime.defaults import SAMPLING_FILE, Defaults

OPTIONS_PAGE = "reference/options.md"
LIVE_PAGE, LIVE = "live.md", "live"
_PACKAGE = Path(__file__).parents[1] / "src" / "bksdm"
_LIVE_DEFAULTS = Defaults(steps=4, guidance=2.5)  # the fewest by which the embedded model draws what one recognizes
_LIVE_SCHEDULER = "DPMSolverMultistepScheduler"
_NOT_SHOWN = ("config.yaml", "provenance.json", "export.json")  # they name folders of the machine
_log = logging.getLogger("mkdocs.hooks")
_INTRODUCTION = """# Verbs and options

What `bksdm VERB --help` says, on one page. Besides its own options, every verb takes `--config FILE.yaml`, with flags
on top, `--print_config`, which shows the result and ends, and `--debug`, which shows where it failed.

The first option may be given without its name: `bksdm describe emoji` is `bksdm describe --model emoji`. A `bool`
alone means true (`--json`), a list is several words (`--prompt "red apple" "whale"`), and `--batch-size` is
`--batch_size`. Options without a default have to be given; where the default is empty, the description says what
happens.
"""
_EQUATIONS = {
    "inline": re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL),
    "block": re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL),
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the page of the options to those in `docs`, and in `live/` a folder that draws."""
    files.append(File.generated(config, OPTIONS_PAGE, content=options_page()))
    if folder := live_folder():
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            name = path.relative_to(folder).as_posix()
            if name not in _NOT_SHOWN:
                files.append(File.generated(config, f"{LIVE}/{name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, files: Files, **_: Any) -> str:
    """Lead from the page that tells of `live/` to what is there."""
    if page.file.src_uri != LIVE_PAGE:
        return markdown
    there = f"{LIVE}/index.html" in files.src_uris
    link = f"[Open it]({LIVE}/index.html){{ .md-button .md-button--primary }}"
    return f"{markdown}\n{link if there else 'This build of the site has left it out.'}\n"


def on_page_content(content: str, **_: Any) -> str:
    """Equations as MathML, which browsers show without a script."""
    for display, pattern in _EQUATIONS.items():
        content = pattern.sub(partial(_mathml, display), content)
    return content


def live_folder() -> Path | None:
    """What `bksdm export --to web` wrote: in the folder that BKSDM_WEB names, or of the embedded model.

    The latter is kept until a file of the package changes. None where BKSDM_WEB is empty, and where it cannot be made,
    as without npm's packages, which is said.
    """
    if "BKSDM_WEB" in os.environ:
        return Path(os.environ["BKSDM_WEB"]) if os.environ["BKSDM_WEB"] else None
    sources = [file for file in sorted(_PACKAGE.rglob("*")) if file.is_file() and file.suffix != ".pyc"]
    kept = cache_folder() / "live"
    out = kept / files_digest(sources)
    if out.exists():
        return out
    _log.info("Exporting the embedded model for the page that draws, once; this takes minutes")
    try:
        _export(out)
    except InputError as error:
        _log.info(f"The page that draws is left out: {error}")
        return None
    for earlier in kept.iterdir():
        if earlier != out:
            shutil.rmtree(earlier)
    return out


def _export(out: Path) -> None:
    """Write the embedded model for the web, with fewer steps than are its own."""
    from bksdm.export.run import export  # noqa: PLC0415

    with TemporaryDirectory() as scratch:
        model = Path(shutil.copytree(asset(ART, "model"), Path(scratch) / ART))
        (model / SAMPLING_FILE).write_text(_LIVE_DEFAULTS.text())
        export(ExportOptions(str(model), "web", str(out), scheduler=_LIVE_SCHEDULER))


def _mathml(display: str, equation: re.Match[str]) -> str:
    return str(convert(html.unescape(equation[1]).strip(), display=display))


def options_page() -> str:
    """Markdown: a section a verb, with a table of its options, from the docstrings in `bksdm.options`."""
    return "\n".join([_INTRODUCTION, *(_section(verb, options_of(verb)) for verb in VERBS)])


def _section(verb: str, kind: type[Any]) -> str:
    documentation = parse(kind.__doc__ or "")
    parts = reversed(kind.__mro__)  # what several verbs take is described once, and anew where it differs
    described = {
        param.arg_name: param.description or "" for part in parts for param in parse(part.__doc__ or "").params
    }
    rows = [
        f"| `--{field.name}` | {_type(field.type)} | {_default(field)} | {_cell(described[field.name])} |"
        for field in dataclasses.fields(kind)
    ]
    head = ["| option | type | default | |", "|---|---|---|---|"]
    return "\n".join([f"## {verb}", "", documentation.short_description or "", "", *head, *rows, ""])


def _type(kind: Any) -> str:
    """An annotation as people write it; what may be None is only optional."""
    given = get_args(kind)
    if get_origin(kind) in (Union, types.UnionType):
        return _type(next(one for one in given if one is not type(None)))
    if get_origin(kind) is Literal:
        return ", ".join(f"`{value}`" for value in given)
    if get_origin(kind) is list:
        return f"list of {_type(given[0])}"
    return f"`{kind.__name__}`"


def _default(field: "dataclasses.Field[Any]") -> str:
    if field.default_factory is not dataclasses.MISSING:
        return " ".join(f"`{value}`" for value in field.default_factory())
    if field.default is dataclasses.MISSING:
        return "to be given"
    if field.default is None:
        return ""
    return f"`{str(field.default).lower() if isinstance(field.default, bool) else field.default}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
