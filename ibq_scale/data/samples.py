"""Pictures before they are prepared, and what reads them: what every kind of source shares."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from ibq_scale.data.index import Reject
from ibq_scale.data.labels import Found, Group, Tally


class Unit(NamedTuple):
    """A file, or a part of one, that one process reads."""

    file: str
    part: int
    """Which row group, in parquet; else 0."""
    bytes: int


@dataclass(frozen=True)
class Sample:
    """A picture's bytes, not yet decoded, its label where there is one, and the columns that conditions may ask for."""

    name: str
    picture: bytes
    label: Found
    columns: Mapping[str, Any]


@dataclass
class Look:
    """What is in units by their names and labels, no picture opened. Looks at several units add up."""

    tally: Tally = field(default_factory=Tally)
    samples: int = 0
    left_out: dict[str, Group] = field(default_factory=dict)
    notes: dict[str, Group] = field(default_factory=dict)
    folders: Counter[str] = field(default_factory=Counter)
    """Of samples without a label: the folders of their keys."""
    scattered: bool = False
    """Whether members of one sample lie apart from each other."""
    partial: bool = False
    """Whether there are more samples than these."""

    def leave_out(self, reason: str, name: str) -> None:
        self.left_out.setdefault(reason, Group()).add(name)

    def note(self, what: str, name: str) -> None:
        self.notes.setdefault(what, Group()).add(name)

    def __iadd__(self, other: Look) -> Look:
        self.tally += other.tally
        self.samples += other.samples
        for mine, others in ((self.left_out, other.left_out), (self.notes, other.notes)):
            for reason, group in others.items():
                mine.setdefault(reason, Group()).join(group)
        self.folders += other.folders
        self.scattered |= other.scattered
        self.partial |= other.partial
        return self


class Source(Protocol):
    """A set of pictures. It travels to every process, so it holds no list of them."""

    @property
    def form(self) -> str:
        """What kind of source it is, for a person."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """`classes[label]` is a label's name; empty where the source does not say."""
        ...

    def units(self, files: Mapping[str, int]) -> list[Unit]:
        """All the work in these files (bytes by path), sorted."""
        ...

    def look(self, unit: Unit, most: int | None = None) -> Look:
        """What is in a unit, or in its first `most` samples."""
        ...

    def read(self, unit: Unit, start: int) -> Iterator[tuple[int, Sample | Reject]]:
        """The unit's samples from position `start` on, each with its position; a Reject where there is none to give.

        Positions grow; the first is 0.
        """
        ...
