"""The layers that ARCHITECTURE.md draws are those of the imports."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tests.docs.pages import ROOT, blocks

PACKAGE = ROOT / "ibq_scale"
# Beside the rooms: what the package and its command offer, which lead into all rooms.
DOORS = {"__init__.py", "__main__.py"}
FOUNDATION = "errors"


def _layers() -> list[list[str]]:
    """The rooms of each line, from the top down."""
    text = next(block for block in blocks(ROOT / "ARCHITECTURE.md", "") if block.startswith("cli"))
    return [re.split(r", ", re.split(r"  +", line)[0]) for line in text.splitlines()]


def _imports(path: Path) -> Iterator[tuple[str, int]]:
    """The room of each import from this package, and its line."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == PACKAGE.name and len(parts) > 1:
                yield parts[1] if (PACKAGE / parts[1]).is_dir() else FOUNDATION, node.lineno


def test_the_page_names_every_room_once() -> None:
    named = [room for layer in _layers() for room in layer]
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert sorted(named) == sorted({*rooms, FOUNDATION})


def test_a_room_imports_from_rooms_further_down_only() -> None:
    height = {room: -number for number, layer in enumerate(_layers()) for room in layer}
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        place = path.relative_to(PACKAGE)
        if str(place) in DOORS:
            continue
        room = place.parts[0] if len(place.parts) > 1 else FOUNDATION
        wrong += [
            f"{place}:{line} ({room}) imports {other}"
            for other, line in _imports(path)
            if other != room and height[other] >= height[room]
        ]
    assert wrong == []


def _roots(path: Path) -> set[str]:
    """The top-level packages that a module imports, inside of functions too."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    return {name.split(".")[0] for name in names}


def test_deepspeed_is_imported_by_zero_alone() -> None:
    importing = {path.relative_to(PACKAGE).parts[0] for path in PACKAGE.rglob("*.py") if "deepspeed" in _roots(path)}
    # The doctor imports it to see if it can be imported.
    assert importing == {"zero", "doctor"}


def test_the_room_of_slurm_and_the_guards_import_no_training_code() -> None:
    for room in ("cluster", "supervise", "zero"):
        for path in (PACKAGE / room).glob("*.py"):
            assert "train" not in {other for other, _ in _imports(path)}, path
