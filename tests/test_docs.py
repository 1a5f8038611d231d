"""The documentation site has every verb, every option and every public name."""

import dataclasses
import importlib.util
import re
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files

from bksdm import api
from bksdm.cli import VERBS, options_of
from bksdm.common.errors import InputError

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def sections(hooks: ModuleType) -> dict[str, str]:
    """What the page of the options has of each verb."""
    _, *parts = re.split(r"^## (.*)$", hooks.options_page(), flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def test_every_verb_has_a_section(sections: dict[str, str]) -> None:
    assert list(sections) == list(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_has_a_row_that_says_what_it_is(sections: dict[str, str], verb: str) -> None:
    kind = options_of(verb)
    assert (kind.__doc__ or "").splitlines()[0] in sections[verb]
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in sections[verb].splitlines() if line.startswith("| `--")]
    assert [row[0].strip() for row in rows] == [f"`--{field.name}`" for field in dataclasses.fields(kind)]
    assert all(len(row) == 4 and row[1].strip() and row[3].strip() for row in rows)


def test_types_and_defaults_are_those_of_the_options(sections: dict[str, str]) -> None:
    rows = {line.split("`")[1]: line for line in sections["distill"].splitlines() if line.startswith("| `--")}
    assert "| `str` | to be given |" in rows["--teacher"]
    assert "| `int` | `50000` |" in rows["--steps"]
    assert "| `float` |  |" in rows["--guided_output"]
    assert "| `auto`, `fp32`, `bf16`, `fp16` | `auto` |" in rows["--precision"]
    assert "| list of `int` | `1` `4` |" in sections["benchmark"]
    assert "| `bool` | `false` |" in rows["--json"]


def test_equations_need_no_script(hooks: ModuleType) -> None:
    page = hooks.on_page_content('<span class="arithmatex">\\(a &lt; b\\)</span><div class="arithmatex">\\[c\\]</div>')
    assert "arithmatex" not in page
    assert page.count("<math") == 2
    assert page.count('display="block"') == 1


def led(hooks: ModuleType) -> tuple[Files, str]:
    """The files that are added to the site, and what stands at the end of the page that tells of `live/`."""
    config = MkDocsConfig()
    config.load_dict({"site_name": "bksdm", "use_directory_urls": False})
    config.validate()
    config.plugins._current_plugin = "hooks"  # as when mkdocs calls them
    files = hooks.on_files(Files([]), config)
    page = SimpleNamespace(file=SimpleNamespace(src_uri=hooks.LIVE_PAGE))
    return files, hooks.on_page_markdown("", page=page, files=files)


def test_the_site_has_a_folder_that_draws(hooks: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("index.html", "config.yaml"):
        (tmp_path / name).write_text("")
    monkeypatch.setenv("BKSDM_WEB", str(tmp_path))
    files, end = led(hooks)
    assert {name for name in files.src_uris if name.startswith("live/")} == {"live/index.html"}
    assert "(live/index.html)" in end


def test_a_folder_that_cannot_be_made_is_left_out_in_a_line(
    hooks: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(_: Path) -> None:
        raise InputError("npm is not here")

    monkeypatch.delenv("BKSDM_WEB", raising=False)
    monkeypatch.setenv("BKSDM_CACHE", str(tmp_path))
    monkeypatch.setattr(hooks, "_export", refuse)
    with caplog.at_level("INFO", "mkdocs.hooks"):
        files, end = led(hooks)
    assert files.src_uris.keys() == {hooks.OPTIONS_PAGE}
    assert "has left it out" in end
    assert [record.getMessage() for record in caplog.records][1:] == [
        "The page that draws is left out: npm is not here"
    ]
    assert all(record.levelname == "INFO" for record in caplog.records)  # a strict build ends at a warning


def test_every_public_name_is_on_the_page_of_the_library() -> None:
    named = re.findall(r"^::: bksdm\.api\.(\w+)$", (DOCS / "reference" / "api.md").read_text(), re.MULTILINE)
    assert sorted(named) == sorted(api.__all__)


PACKAGE = Path(api.__file__).parent
NAMED = re.findall(r"`((?:[a-z_]+[./])+[\w.*]+)`", (DOCS / "method.md").read_text().split("## Paper to code")[1])


@pytest.mark.parametrize("name", [name for name in dict.fromkeys(NAMED) if name != "src/bksdm"])
def test_the_table_from_paper_to_code_names_what_is_there(name: str) -> None:
    if "/" in name:
        assert list(PACKAGE.glob(name))
        return
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        folder = PACKAGE.joinpath(*parts[:length])
        file = next((file for file in (folder.with_suffix(".py"), folder / "__init__.py") if file.is_file()), None)
        if file is not None:
            break
    assert all(re.search(rf"\b(class|def) {part}\b", file.read_text()) for part in parts[length:])
