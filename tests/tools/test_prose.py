"""The measure of prose counts text for people, and no code."""

from __future__ import annotations

from tests.tools.prose import measure, prose_of, prose_of_markdown, rates

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


def test_descriptions_of_fields_are_counted() -> None:
    assert list(prose_of('x: int = Field(1, description="What it is.")')) == ["", "What it is."]


def test_code_in_a_page_is_not_counted() -> None:
    assert measure(prose_of_markdown("Runs `that`; see [it](which.md).\n```\nwhat; who\n```\n")) == {
        "words": 3,
        "clauses": 0,
        "semicolons": 1,
    }
