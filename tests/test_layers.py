"""Imports run one way, from the command line down to the bytes, and never in a circle; no file is exempt."""

from __future__ import annotations

import ast
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "loratune"
ORDER = (
    ("errors", "__init__"),
    ("diffusion",),
    ("formats",),
    ("families",),
    ("lora", "data"),
    ("training",),
    ("runs",),
    ("evaluation",),
    ("recipe",),
    ("planning",),
    ("cli",),
    ("__main__",),
)
LEVELS = {folder: level for level, folders in enumerate(ORDER) for folder in folders}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py" or path.parent == PACKAGE)


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


MODULES = {module_of(path) for path in FILES}


def folder_of(module: str) -> str:
    return module.split(".")[0]


@cache
def imported(path: Path) -> frozenset[str]:
    """The modules of the package that a file imports, those imported within functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    names = {name.removeprefix("loratune.") for name in found if name.startswith("loratune.")}
    own = {"__init__"} if "loratune" in found else set()
    return frozenset(names & MODULES | own)


def test_every_folder_has_its_place_in_the_order() -> None:
    assert {folder_of(module) for module in MODULES} == set(LEVELS)


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_a_file_imports_its_own_folder_or_lower_ones(path: Path) -> None:
    own = folder_of(module_of(path))
    wrong = {other for other in imported(path) if folder_of(other) != own and LEVELS[folder_of(other)] >= LEVELS[own]}
    assert not wrong, f"{module_of(path)} imports {sorted(wrong)}, which are not below it"


def test_no_circle() -> None:
    graph = {module_of(path): imported(path) - {module_of(path)} for path in FILES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"imports run in a circle: {' -> '.join(error.args[1])}")


def test_datasets_hides_no_library() -> None:
    assert not (PACKAGE.parent / "datasets" / "__init__.py").exists()
