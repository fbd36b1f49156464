"""Pictures before they are prepared, and what reads them: what every kind of source shares."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from ibq_scale.data.index import Reject


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
    label: int | None
    columns: Mapping[str, Any]


class Source(Protocol):
    """A set of pictures. It travels to every process, so it holds no list of them."""

    @property
    def classes(self) -> tuple[str, ...]:
        """`classes[label]` is a label's name; empty where the source does not say."""
        ...

    def units(self, files: Mapping[str, int]) -> list[Unit]:
        """All the work in these files (bytes by path), sorted."""
        ...

    def read(self, unit: Unit, start: int) -> Iterator[tuple[int, Sample | Reject]]:
        """The unit's samples from position `start` on, each with its position; a Reject where there is none to give.

        Positions grow; the first is 0.
        """
        ...
