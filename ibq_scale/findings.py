"""The result of a check, one line of ``doctor`` and of ``submit``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warn", "FAIL"]


@dataclass(frozen=True)
class Finding:
    """`name`: the subject of the check. `text`: its state. `todo`: the remedy, unless `text` has it."""

    level: Level
    name: str
    text: str
    todo: str = ""

    def lines(self, width: int) -> str:
        """For a terminal. `width`: of the names."""
        text = f"{self.level:<4}  {self.name:<{width}}  {self.text}"
        return f"{text}\n{'':<{width + 8}}→ {self.todo}" if self.todo else text


def ok(name: str, text: str) -> Finding:
    return Finding("ok", name, text)


def warn(name: str, text: str, todo: str = "") -> Finding:
    return Finding("warn", name, text, todo)


def fail(name: str, text: str, todo: str = "") -> Finding:
    return Finding("FAIL", name, text, todo)
