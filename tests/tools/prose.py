"""How the prose of a package reads: ``python -m tests.tools.prose [FOLDER]`` (default: ibq_scale).

Subordinate clauses and semicolons per 1,000 words of docstrings and comments, by room and in all. The text to rewrite
first is in the files at the end. Other trainers have about 8 and 0 to 3 (torchtitan, OLMo-core, nanochat).
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

CLAUSE = re.compile(r"\b(?:that|which|what|who(?:m|se)?|(?:what|who|which)ever)\b", re.IGNORECASE)
WORD = re.compile(r"[A-Za-z][A-Za-z'-]*")
WORST = 8


def prose_of(source: str) -> Iterator[str]:
    """Docstrings and comments of a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield ast.get_docstring(node) or ""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not token.string.startswith(("# type:", "# noqa", "# fmt")):
            yield token.string.removeprefix("#")


def measure(text: str) -> Counter[str]:
    """Words, clauses and semicolons."""
    found = {"words": len(WORD.findall(text)), "clauses": len(CLAUSE.findall(text)), "semicolons": text.count(";")}
    return Counter(found)


def rates(counts: Counter[str]) -> tuple[float, float]:
    """Clauses and semicolons per 1,000 words."""
    words = max(counts["words"], 1)
    return 1000 * counts["clauses"] / words, 1000 * counts["semicolons"] / words


def main(folder: Path) -> None:
    rooms: defaultdict[str, Counter[str]] = defaultdict(Counter)
    files: dict[Path, Counter[str]] = {}
    for path in sorted(folder.rglob("*.py")):
        place = path.relative_to(folder)
        files[place] = measure("\n".join(prose_of(path.read_text(encoding="utf-8"))))
        rooms[place.parts[0] if len(place.parts) > 1 else "."] += files[place]
        rooms["all"] += files[place]
    print(f"{'':14}{'words':>8}{'clauses':>9}{'semicolons':>12}")
    for room, counts in rooms.items():
        clauses, semicolons = rates(counts)
        print(f"{room:14}{counts['words']:8,}{clauses:9.1f}{semicolons:12.1f}")
    for place in sorted(files, key=lambda place: -files[place]["clauses"])[:WORST]:
        print(f"{place}: {files[place]['clauses']} clauses, {files[place]['semicolons']} semicolons")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "ibq_scale"))
