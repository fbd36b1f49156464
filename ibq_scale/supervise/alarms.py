"""Alarms: rules over the logged lines of metrics."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

# Lines in a rule's memory, and the lines before its first alarm.
WINDOW, LEAST = 50, 10


class Rule(Protocol):
    """A condition on one metric."""

    @property
    def metric(self) -> str:
        """Its name in metrics.jsonl."""

    def broken(self, value: float, before: Sequence[float]) -> str | None:
        """The alarm for `value`, given up to `WINDOW` earlier values. None: no alarm."""


@dataclass(frozen=True)
class Spike:
    """More than `deviations` median deviations above the median, and more than half of the median."""

    metric: str
    deviations: float = 10.0

    def broken(self, value: float, before: Sequence[float]) -> str | None:
        middle = statistics.median(before)
        spread = statistics.median(abs(v - middle) for v in before)
        if value - middle <= max(self.deviations * spread, 0.5 * abs(middle)):
            return None
        return f"{self.metric} jumped to {value:.4g}, its median over {len(before)} lines is {middle:.4g}"


@dataclass(frozen=True)
class Drop:
    """Below `share` of the largest value in memory."""

    metric: str
    share: float = 0.7

    def broken(self, value: float, before: Sequence[float]) -> str | None:
        most = max(before)
        if value >= self.share * most:
            return None
        return f"{self.metric} fell to {value:.4g} from {most:.4g}"


@dataclass(frozen=True)
class Above:
    """Above `limit` for all lines in memory."""

    metric: str
    limit: float
    meaning: str

    def broken(self, value: float, before: Sequence[float]) -> str | None:
        if min(value, *before) <= self.limit:
            return None
        return f"{self.metric} has been above {self.limit:g} for {len(before) + 1} lines: {self.meaning}"


class Alarms:
    """Applies the rules to each line. A broken rule is reported once, and again after it has held in between."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self._rules = rules
        self._before: dict[Rule, deque[float]] = {rule: deque(maxlen=WINDOW) for rule in rules}
        self._ringing: set[Rule] = set()

    def check(self, values: Mapping[str, float]) -> list[str]:
        told = []
        for rule in self._rules:
            if rule.metric not in values:
                continue
            value, before = values[rule.metric], self._before[rule]
            fault = rule.broken(value, before) if len(before) >= LEAST else None
            if fault is None:
                self._ringing.discard(rule)
            elif rule not in self._ringing:
                self._ringing.add(rule)
                told.append(fault)
            before.append(value)
        return told
