"""What the documentation site computes when it is built: the page of all options, and equations as MathML.

mkdocs calls `on_files`, `on_page_content` and `on_post_build`. Nothing that is made here is kept in the repository.
"""

import dataclasses
import html
import os
import re
import shutil
import types
from functools import partial
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from docstring_parser import parse
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from bksdm.cli import VERBS, options_of

OPTIONS_PAGE = "reference/options.md"
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
    """Add the page of the options to those in `docs`."""
    files.append(File.generated(config, OPTIONS_PAGE, content=options_page()))
    return files


def on_page_content(content: str, **_: Any) -> str:
    """Equations as MathML, which browsers show without a script."""
    for display, pattern in _EQUATIONS.items():
        content = pattern.sub(partial(_mathml, display), content)
    return content


def on_post_build(config: MkDocsConfig) -> None:
    """Put a page that draws into the site, in `live/`: the folder of `bksdm export --to web` that BKSDM_WEB names."""
    if "BKSDM_WEB" in os.environ:
        left_out = shutil.ignore_patterns("config.yaml", "provenance.json", "export.json")
        shutil.copytree(os.environ["BKSDM_WEB"], Path(config.site_dir) / "live", ignore=left_out, dirs_exist_ok=True)


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
