"""The measure of prose counts what people read, and no code."""

from __future__ import annotations

from tests.tools.prose import measure, prose_of, rates

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
