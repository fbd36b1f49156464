"""Pictures before preparation, and the interface of all sources of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from ibq_scale.data.index import Reject
from ibq_scale.data.labels import Found, Group, Tally


class Unit(NamedTuple):
    """A file, or a part of one, read by one process."""

    file: str
    part: int
    """The row group in parquet, else 0."""
    bytes: int


@dataclass(frozen=True)
class Sample:
    """A picture's encoded bytes, its label, if any, and the columns for conditions."""

    name: str
    picture: bytes
    label: Found
    columns: Mapping[str, Any]


@dataclass
class Look:
    """The contents of units by names and labels, without opening pictures. Looks at several units add up."""

    tally: Tally = field(default_factory=Tally)
    samples: int = 0
    left_out: dict[str, Group] = field(default_factory=dict)
    notes: dict[str, Group] = field(default_factory=dict)
    folders: Counter[str] = field(default_factory=Counter)
    """Folders of the keys of samples without a label."""
    scattered: bool = False
    """Whether members of one sample lie apart."""
    partial: bool = False
    """Whether there are more samples."""

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
    """A set of pictures. It is pickled to every process, so it holds no list of them."""

    @property
    def form(self) -> str:
        """The kind of source, for messages."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """`classes[label]` is a label's name. Empty if the source has no names."""
        ...

    def units(self, files: Mapping[str, int]) -> list[Unit]:
        """All units of these files (bytes by path), sorted."""
        ...

    def look(self, unit: Unit, most: int | None = None) -> Look:
        """The contents of a unit, or of its first `most` samples."""
        ...

    def read(self, unit: Unit, start: int) -> Iterator[tuple[int, Sample | Reject]]:
        """The unit's samples from position `start` on, each with its position. A Reject replaces an unreadable sample.

        Positions grow from 0.
        """
        ...
