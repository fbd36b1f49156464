"""What the Markdown pages say, taken apart."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
TROUBLESHOOTING = ROOT / "docs/troubleshooting.md"
# In a list, a block is indented.
_BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)


def blocks(page: Path | str, language: str) -> list[str]:
    """The blocks of code in this language, in order, of a page or of a part of one."""
    text = page.read_text() if isinstance(page, Path) else page
    return [dedent(block) for _, kind, block in _BLOCK.findall(text) if kind == language]


def sections(page: Path) -> list[str]:
    """A page's parts, each from its heading of the second level to the next."""
    return re.split(r"^## ", page.read_text(), flags=re.MULTILINE)[1:]


def commands(page: Path | str) -> Iterator[list[str]]:
    """The words of every `ibq-scale` command in the bash blocks of a page or a part of one, without its name."""
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words and words[0].rpartition("/")[2] == "ibq-scale":
                yield words[1 : words.index(">")] if ">" in words else words[1:]


def flat(text: str) -> str:
    """The same on one line: a phrase may be broken anywhere."""
    return " ".join(text.split())


def section(symptom: str, said: str) -> str:
    """The one section of the troubleshooting page with `symptom`, words that the program printed."""
    assert symptom in said
    (found,) = [text for text in sections(TROUBLESHOOTING) if symptom in flat(text)]
    return found


def setting(key: str, found: str) -> str:
    """``key=value``, as the section gives it."""
    match = re.search(rf"`({re.escape(key)}=[^`\s]+)`", found)
    assert match, key
    return match[1]
