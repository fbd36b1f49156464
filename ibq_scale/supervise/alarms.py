"""What to look at in a run's metrics before it is too late: rules over the lines as they are logged."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

# Lines that a rule remembers, and those it wants before it says anything.
WINDOW, LEAST = 50, 10


class Rule(Protocol):
    """A condition on one metric."""

    @property
    def metric(self) -> str:
        """The metric that it looks at."""
        ...

    def broken(self, value: float, before: Sequence[float]) -> str | None:
        """What is wrong with `value`, given up to `WINDOW` values logged before it; None where nothing is."""
        ...


@dataclass(frozen=True)
class Spike:
    """Far above what it was: more than `deviations` times the median deviation above the median, and by a half."""

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
    """Below `share` of the most that it was."""

    metric: str
    share: float = 0.7

    def broken(self, value: float, before: Sequence[float]) -> str | None:
        most = max(before)
        if value >= self.share * most:
            return None
        return f"{self.metric} fell to {value:.4g} from {most:.4g}"


@dataclass(frozen=True)
class Above:
    """Above `limit` for as long as is remembered."""

    metric: str
    limit: float
    meaning: str

    def broken(self, value: float, before: Sequence[float]) -> str | None:
        if min(value, *before) <= self.limit:
            return None
        return f"{self.metric} has been above {self.limit:g} for {len(before) + 1} lines: {self.meaning}"


class Alarms:
    """Applies rules to line after line. A broken rule is told once, and again only after it held in between."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self._rules = rules
        self._before: dict[Rule, deque[float]] = {rule: deque(maxlen=WINDOW) for rule in rules}
        self._ringing: set[Rule] = set()

    def check(self, values: Mapping[str, float]) -> list[str]:
        """One line of metrics; returns the alarms that it sets off."""
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
