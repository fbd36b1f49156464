"""The measure of prose counts text for people, and no code."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, ROOT
from tests.tools.prose import measure, measure_file, prose_of, prose_of_markdown, rates

MOST_CLAUSES, MOST_SEMICOLONS = 12, 3
ROOMS = sorted(path.parent for path in (ROOT / "ibq_scale").glob("*/__init__.py"))

SOURCE = '''"""A module that says which; twice."""

def run(what: str) -> str:
    """Does it."""
    # Whoever calls this; nobody else.
    return "that; which"  # noqa: X
'''


def test_docstrings_and_comments_alone_are_counted() -> None:
    counts = measure("\n".join(prose_of(SOURCE)))
    assert counts == {"words": 13, "clauses": 3, "semicolons": 2}
    assert rates(counts) == (3000 / 13, 2000 / 13)


@pytest.mark.parametrize("path", [*ROOMS, *PAGES], ids=lambda path: path.name)
def test_the_prose_stays_plain(path: Path) -> None:
    files = path.glob("*.py") if path.is_dir() else [path]
    clauses, semicolons = rates(sum(map(measure_file, files), Counter()))
    assert clauses <= MOST_CLAUSES
    assert semicolons <= MOST_SEMICOLONS


def test_descriptions_of_fields_are_counted() -> None:
    assert list(prose_of('x: int = Field(1, description="What it is.")')) == ["", "What it is."]


def test_code_in_a_page_is_not_counted() -> None:
    assert measure(prose_of_markdown("Runs `that`; see [it](which.md).\n```\nwhat; who\n```\n")) == {
        "words": 3,
        "clauses": 0,
        "semicolons": 1,
    }
