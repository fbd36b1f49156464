"""How a package's prose reads: ``python -m tests.tools.prose [PATH …]`` (default: ibq_scale, the pages in docs/).

Counts subordinate clauses and semicolons per 1,000 words of docstrings, comments and config descriptions, and of
Markdown text, by folder and in all. The files with the most clauses come last. Other trainers have about 8 clauses and
0 to 3 semicolons (torchtitan, OLMo-core, nanochat).
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
    """Docstrings, comments and the descriptions of pydantic fields of a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield ast.get_docstring(node) or ""
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Field":
            for option in node.keywords:
                if option.arg == "description" and isinstance(option.value, ast.Constant):
                    yield str(option.value.value)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not token.string.startswith(("# type:", "# noqa", "# fmt")):
            yield token.string.removeprefix("#")


def prose_of_markdown(text: str) -> str:
    """A page without code blocks, inline code and addresses of links."""
    return re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)", " ", text, flags=re.DOTALL)


def measure(text: str) -> Counter[str]:
    """Words, clauses and semicolons."""
    found = {"words": len(WORD.findall(text)), "clauses": len(CLAUSE.findall(text)), "semicolons": text.count(";")}
    return Counter(found)


def rates(counts: Counter[str]) -> tuple[float, float]:
    """Clauses and semicolons per 1,000 words."""
    words = max(counts["words"], 1)
    return 1000 * counts["clauses"] / words, 1000 * counts["semicolons"] / words


def measure_file(path: Path) -> Counter[str]:
    """`measure` of a module or a page."""
    text = path.read_text(encoding="utf-8")
    return measure(prose_of_markdown(text) if path.suffix == ".md" else "\n".join(prose_of(text)))


def main(paths: list[Path]) -> None:
    rooms: defaultdict[str, Counter[str]] = defaultdict(Counter)
    files: dict[Path, Counter[str]] = {}
    for given in paths:
        for path in sorted([*given.rglob("*.py"), *given.glob("*.md")] if given.is_dir() else [given]):
            files[path] = measure_file(path)
            # The package by folder, pages one by one.
            rooms[path.name if path.suffix == ".md" else path.parent.name] += files[path]
            rooms["all"] += files[path]
    print(f"{'':22}{'words':>8}{'clauses':>9}{'semicolons':>12}")
    for room, counts in rooms.items():
        clauses, semicolons = rates(counts)
        print(f"{room:22}{counts['words']:8,}{clauses:9.1f}{semicolons:12.1f}")
    for place in sorted(files, key=lambda place: -files[place]["clauses"])[:WORST]:
        print(f"{place}: {files[place]['clauses']} clauses, {files[place]['semicolons']} semicolons")


if __name__ == "__main__":
    main(
        [Path(path) for path in sys.argv[1:]]
        or [Path(p) for p in ("ibq_scale", "docs", "README.md", "CONTRIBUTING.md")]
    )
