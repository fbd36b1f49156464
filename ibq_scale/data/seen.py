"""A summary of `prepare`: the source's contents and the samples taken. At most ten lines, kept in the manifest."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pydantic import Field

from ibq_scale.config.base import Section

if TYPE_CHECKING:
    from ibq_scale.data.encode import Picture
    from ibq_scale.data.index import Reject
    from ibq_scale.data.labels import Group

NAMED_CLASSES, SHOWN_CLASSES, SHOWN_REASONS = 100, 5, 3


class Some(Section):
    """A count, and the first three names."""

    count: int
    first: tuple[str, ...] = ()

    def __str__(self) -> str:
        names = f" ({', '.join(_short(name) for name in self.first)}{', …' if self.count > len(self.first) else ''})"
        return f"{self.count:,}" + (names if self.first else "")


class Seen(Section):
    """A source, and the samples taken from it. `classes` has the counts of the first hundred classes."""

    files: int
    form: str
    pictures: int
    taken: int
    labels: str
    classes: dict[str, int]
    class_count: int
    empty_classes: Some = Some(count=0)
    left_out: dict[str, Some] = Field(default_factory=dict)
    notes: dict[str, Some] = Field(default_factory=dict)
    formats: dict[str, int] = Field(default_factory=dict)
    modes: dict[str, int] = Field(default_factory=dict)
    width: tuple[int, int] | None = None
    height: tuple[int, int] | None = None

    def lines(self) -> list[str]:
        """At most ten lines. The most serious ones are in the middle, to be noticed."""
        named = [f"{_short(name)}: {count:,}" for name, count in list(self.classes.items())[:SHOWN_CLASSES]]
        more = ", …" if self.class_count > len(named) else ""
        lines = [f"found      {self.files:,} files, {self.pictures:,} pictures ({self.form}); {self.taken:,} taken"]
        lines += [f"labels     {self.labels} → {', '.join(named)}{more}" if named else f"labels     {self.labels}"]
        if self.empty_classes.count:
            lines += [f"no picture of {self.empty_classes} of {self.class_count:,} classes"]
        for title, groups in (("left out", self.left_out), ("note", self.notes)):
            shown = list(groups.items())[:SHOWN_REASONS]
            lines += [f"{title:<10} {_short(reason, 70)}: {some}" for reason, some in shown]
            if len(groups) > len(shown):
                lines += [f"{title:<10} for {len(groups) - len(shown)} more reasons, in manifest.json"]
        if self.width and self.height:
            kinds = ", ".join(f"{count:,} {name}" for name, count in list(self.formats.items())[:4])
            modes = ", ".join(f"{count:,} {name}" for name, count in list(self.modes.items())[:4])
            sizes = f"{self.width[0]} to {self.width[1]} wide, {self.height[0]} to {self.height[1]} high"
            lines += [f"pictures   {kinds}; modes {modes}; {sizes}"]
        return lines[:10]


@dataclass
class Met:
    """Formats, modes and sizes of pictures, added up over shards."""

    formats: Counter[str] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    sides: list[int] = field(default_factory=list)
    """Least and most width, least and most height."""

    def add(self, picture: Picture) -> None:
        self.formats[picture.format] += 1
        self.modes[picture.mode] += 1
        width, height = picture.size
        least_w, most_w, least_h, most_h = self.sides or (width, width, height, height)
        self.sides = [min(least_w, width), max(most_w, width), min(least_h, height), max(most_h, height)]

    def join(self, other: Met) -> None:
        self.formats += other.formats
        self.modes += other.modes
        pairs = zip((min, max, min, max), self.sides, other.sides, strict=True) if self.sides and other.sides else None
        self.sides = [f(a, b) for f, a, b in pairs] if pairs else self.sides or other.sides


def by_reason(rejects: Iterable[Reject], into: dict[str, Group]) -> None:
    """Groups rejects by reason, regardless of numbers and quoted names in it."""
    from ibq_scale.data.labels import Group

    for reject in rejects:
        reason = re.sub(r"'[^']*'|(?<![\w-])\d[\d,.]*", "…", reject.reason.partition("(")[0]).strip()
        into.setdefault(reason, Group()).add(reject.path)


def _short(text: str, most: int = 40) -> str:
    """Shortened, and without unprintable characters, a problem for some terminals and locales."""
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= most else f"{text[: most - 3]}..."
