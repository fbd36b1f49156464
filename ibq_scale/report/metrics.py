"""The numbers of a metrics.jsonl as columns. Each line is parsed once, and a number takes eight bytes."""

from __future__ import annotations

import errno
import json
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

# Axes of every line. A line without one, or with a value of `MOST` or more, is damaged.
AXES = ("step", "samples", "time")
# A double represents smaller integers exactly.
MOST = 2.0**53


class Curve(NamedTuple):
    """One metric's logged values (R,) fp64 in the order of their lines, with their axes."""

    steps: NDArray[np.int64]
    samples: NDArray[np.int64]
    seconds: NDArray[np.float64]
    values: NDArray[np.float64]


class _Block(NamedTuple):
    """Lines with the same keys: their numbers in sequence, and their line numbers in the file."""

    lines: array[int]
    numbers: array[float]


@dataclass
class Metrics:
    """The content of a metrics file. `alarms`: step and text of each."""

    alarms: list[tuple[int, str]] = field(default_factory=list)
    _blocks: dict[tuple[str, ...], _Block] = field(default_factory=dict)

    def curve(self, name: str) -> Curve:
        """The values of a key, `AXES` included. Empty if never logged."""
        found = [block for keys in self._blocks if name in keys for block in [self._columns(keys, name)]]
        line_R = np.concatenate([lines for lines, _ in found] or [np.empty(0, np.int64)])
        table_4R = np.concatenate([columns for _, columns in found] or [np.empty((4, 0))], axis=1)
        # Lines with other keys may lie between the lines of a block.
        kept_R = np.argsort(line_R)
        kept_R = kept_R[(np.abs(table_4R[:3, kept_R]) < MOST).all(axis=0)]
        step_R, samples_R, seconds_R, value_R = table_4R[:, kept_R]
        return Curve(step_R.astype(np.int64), samples_R.astype(np.int64), seconds_R, value_R)

    def add(self, number: int, line: dict[str, Any]) -> None:
        """One line of the file. Alarms are kept, other values without a number are dropped."""
        keys = tuple(line)
        block = self._blocks.get(keys) or _Block(array("q"), array("d"))
        before = len(block.numbers)
        try:
            block.numbers.extend(line.values())
        except (TypeError, OverflowError):
            del block.numbers[before:]
            rest = {key: value for key, value in line.items() if _is_number(value)}
            if rest.keys() >= set(AXES):
                alarms = line.get("alarms")
                texts = alarms if isinstance(alarms, list) else ()
                self.alarms += [(int(rest["step"]), str(text)) for text in texts if abs(rest["step"]) < MOST]
                self.add(number, rest)
            return
        if before or set(keys) >= set(AXES):
            self._blocks[keys] = block
            block.lines.append(number)

    def _columns(self, keys: tuple[str, ...], name: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Of one block: the lines (R,), and the axes and the key (4, R)."""
        lines, numbers = self._blocks[keys]
        table_RK = np.frombuffer(numbers).reshape(len(lines), len(keys))
        return np.frombuffer(lines, np.int64), table_RK[:, [keys.index(key) for key in (*AXES, name)]].T


def read_metrics(path: Path) -> Metrics:
    """Reads the file line by line, without damaged lines (a cut line, a missing axis). OSError."""
    metrics = Metrics()
    if not path.is_file() and path.exists():
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, text in enumerate(file):
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                continue
            if isinstance(line, dict):
                metrics.add(number, line)
    return metrics


def _is_number(value: Any) -> bool:
    """Whether the number fits a double."""
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < MOST)
