"""Imports inside the package point to the same floor or down."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import bksdm

FLOORS = {
    5: "cli __main__ api",
    4: "quickstart.* personalize.* generate.demo export.push",
    3: "generate.run generate.runtimes data.prepare models.adapters.run evaluate.* pruning.run pruning.repair.* "
    "pruning.sensitivity.* export.*",
    2: "distill.*",
    1: "data.* models.* pruning.* generate.*",
    0: "families families.* options options.* common.* runtime.*",
}
PACKAGE = Path(bksdm.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path != PACKAGE / "__init__.py"
}


def floor(module: str) -> int | None:
    """The floor of a module, such as "data.folder", or None where the table has none."""
    for number, entries in FLOORS.items():
        for entry in entries.split():
            if module == entry.removesuffix(".*") or (entry.endswith(".*") and module.startswith(entry[:-1])):
                return number
    return None


def imported(path: Path) -> Iterator[str]:
    """Modules of the package that a file imports anywhere, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            found = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (module for name in found if name.startswith("bksdm.") and (module := module_of(name)))


def module_of(name: str) -> str | None:
    """The module that a dotted name, such as "bksdm.families.recipe.Recipe", lies in."""
    parts = name.split(".")[1:]
    return next((found for n in range(len(parts), 0, -1) if (found := ".".join(parts[:n])) in MODULES), None)


def test_the_package_itself_imports_nothing() -> None:
    assert not list(imported(PACKAGE / "__init__.py"))


@pytest.mark.parametrize("module", MODULES)
def test_every_module_has_a_floor(module: str) -> None:
    assert floor(module) is not None, f"bksdm.{module} is on no floor; add it to FLOORS"


@pytest.mark.parametrize("module", [module for module in MODULES if floor(module) is not None])
def test_imports_point_down(module: str) -> None:
    own = floor(module)
    up = [other for other in imported(MODULES[module]) if (floor(other) or 0) > own]
    assert not up, f"bksdm.{module} on floor {own} imports {', '.join(up)} from above"


def test_the_parser_sees_what_is_imported() -> None:
    assert set(imported(MODULES["distill.objective"])) >= {
        "families.noise",
        "distill.losses",
        "families.recipe",
        "pruning.taps",
    }
    assert module_of("bksdm.families.unet.structure") == "families.unet.structure"
    assert module_of("bksdm.families.derive") == "families"


def test_the_floors_hold_no_module_that_is_gone() -> None:
    for entry in " ".join(FLOORS.values()).split():
        assert any(module == entry.removesuffix(".*") or module.startswith(entry[:-1]) for module in MODULES), entry


@pytest.mark.parametrize("package", ["datasets", "matplotlib", "pandas", "pyarrow"])
def test_what_few_need_is_imported_where_it_is_used(package: str) -> None:
    at_once = [node for path in MODULES.values() for node in ast.parse(path.read_text(encoding="utf-8")).body]
    names = {alias.name for node in at_once if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in at_once if isinstance(node, ast.ImportFrom)}
    assert package not in {name.partition(".")[0] for name in names}


OWN = ("families.sd", "families.sdxl", "families.unet")
# What only a family knows: classes of pipelines, names of what one family alone has, and families themselves.
ASKING = re.compile(
    r"StableDiffusion\w*Pipeline|text_encoder_2|tokenizer_2|addition_embed_type|added_cond_kwargs|sdxl", re.IGNORECASE
)


def words(path: Path) -> Iterator[str]:
    """Names and strings of a file, but no comments and no docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    said = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in said:
            yield from [] if " " in node.value else [node.value]  # a sentence asks nothing
        names = (getattr(node, name, None) for name in ("id", "attr", "arg", "name"))
        yield from (name for name in names if isinstance(name, str))


# The runtime without torch cannot ask `families`; what it knows of kinds of model is one module.
@pytest.mark.parametrize(
    "module", [name for name in MODULES if not name.startswith("families") and name != "runtime.conditions"]
)
def test_only_families_know_which_family_it_is(module: str) -> None:
    path = MODULES[module]
    asked = [other for other in imported(path) if other.startswith(OWN)] + [w for w in words(path) if ASKING.search(w)]
    assert not asked, f"bksdm.{module} asks which family it is: {', '.join(asked)}; ask the family instead"
