"""Imports run one way: cli -> training -> (data, adapters, families, report) -> (diffusion, formats)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "loratune"
LEVELS = {"diffusion": 0, "formats": 0, "data": 1, "adapters": 1, "families": 1, "report": 1, "training": 2, "tools": 3}
TOP = 3
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")


def level(parts: tuple[str, ...]) -> int:
    if parts == ("errors",):
        return -1
    return LEVELS.get(parts[0], TOP) if len(parts) > 1 or parts[0] in LEVELS else TOP


def imported(path: Path) -> set[tuple[str, ...]]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found |= {tuple(name.split(".")[1:]) for name in names if name and name.startswith("loratune.")}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_its_own_folder_or_lower_levels(path: Path) -> None:
    own = (*path.relative_to(PACKAGE).parts[:-1], path.stem)
    for other in imported(path):
        assert other[0] == own[0] or level(other) < level(own) or level(own) == TOP, f"{own} imports {other}"


def test_datasets_hides_no_library() -> None:
    assert not (PACKAGE.parent / "datasets" / "__init__.py").exists()
