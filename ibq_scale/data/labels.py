"""Parses labels in their usual forms, and decides a data set's classes.

A label is a number or a name. All samples are read before the first is prepared: class numbers follow the sorted names,
and one sample does not show the form of the others.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ibq_scale.data.encode import UnusableError
from ibq_scale.errors import UserError

UNLABELLED = "unlabelled"
# More labels than this are identifiers, not classes. The manifest names every class.
MOST_CLASSES = 1 << 20
# Up to this share of the samples is left out for lack of a label. A larger one is a mixture, and is refused.
FEW = 0.1
LONGEST = 200
_NUMBER = re.compile(r"[+-]?\d+(?:\.0*)?", re.ASCII)
_NUMBERS = re.compile(r"[\d\s,;.eE+-]*\d[\d\s,;.eE+-]*", re.ASCII)

Label = int | str
"""A class by its number, or by its name."""


@dataclass(frozen=True)
class Odd:
    """A label field's content if it is not one class."""

    text: str


Found = Label | Odd | None
"""None: the sample has no label. Negative numbers mean the same, as in test splits of the Hub."""


def label_of_text(text: str | bytes) -> Found:
    """Parses a label in a file's or a column's text: ``3``, ``3.0``, ``cat``."""
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8-sig")
        except UnicodeDecodeError:
            return Odd(repr(text[:20]))
    text = text.strip()
    if not text:
        return None
    if _NUMBER.fullmatch(text):
        return _number(int(text.partition(".")[0])) if len(text) < 20 else Odd(text[:40])
    # Several numbers, or one with a fraction, or several lines.
    odd = _NUMBERS.fullmatch(text) or "\n" in text or "\0" in text or len(text) > LONGEST
    return Odd(text[:40]) if odd else text


def label_of_value(value: Any) -> Found:
    """Parses a label in a value of JSON or parquet: a number, a text, a list of one, or a one-hot list."""
    if value is None or isinstance(value, (str, bytes)):
        return value if value is None else label_of_text(value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        if math.isnan(value):
            return None
        return _number(int(value)) if value.is_integer() else Odd(str(value))
    if isinstance(value, int):
        return _number(value)
    if isinstance(value, list) and len(value) == 1:
        return label_of_value(value[0]) if not isinstance(value[0], list) else Odd(str(value)[:40])
    if isinstance(value, list) and value and all(v in (0, 1) for v in value) and sum(value) == 1:
        return value.index(1)
    return Odd(str(value)[:40])


def _number(value: int) -> Found:
    return None if value < 0 else value


@dataclass(frozen=True)
class Labels:
    """Maps labels to class numbers: `values[number]` is the label, `names[number]` the class's name.

    No values: all samples are of one class.
    """

    values: tuple[Label, ...] = ()
    names: tuple[str, ...] = ()
    form: str = ""
    """Description of the labels' origin."""
    unlooked: bool = False
    """Whether only some samples were read, and none had a label."""

    @cached_property
    def numbers(self) -> Mapping[Label, int]:
        return {value: number for number, value in enumerate(self.values)}

    @property
    def class_names(self) -> tuple[str, ...]:
        """`classes[label]` for the manifest."""
        return self.names or (UNLABELLED,)

    def number_of(self, found: Found) -> int:
        """A sample's class number. UnusableError if its label is missing, not one class, or unlike the others."""
        if not self.values:
            if self.unlooked and found is not None:
                raise UnusableError("has a label, unlike those looked at first: '--label KEY' looks at all")
            return 0
        if found is None:
            raise UnusableError("has no label, unlike the others")
        if isinstance(found, Odd):
            raise UnusableError(f"label '{found.text}' is not one class")
        number = self.numbers.get(found)
        if number is None:
            raise UnusableError(f"label {found} is not one of {len(self.values)} classes")
        return number


def printable(name: str) -> str:
    """A file's name as text, with bytes invalid in UTF-8 escaped."""
    return name.encode("utf-8", "backslashreplace").decode()


@dataclass
class Group:
    """A count of things, and the names of the first three."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, name: str, count: int = 1) -> None:
        self.count += count
        if len(self.first) < 3:
            self.first.append(printable(name))

    def join(self, other: Group) -> None:
        self.count += other.count
        self.first = [*self.first, *other.first][:3]

    def __str__(self) -> str:
        return f"{self.count:,} ({', '.join(self.first)}{', …' if self.count > len(self.first) else ''})"


@dataclass
class Tally:
    """The labels of all samples, counted."""

    counts: Counter[Label] = field(default_factory=Counter)
    forms: Counter[str] = field(default_factory=Counter)
    numbers: Group = field(default_factory=Group)
    words: Group = field(default_factory=Group)
    none: Group = field(default_factory=Group)
    odd: Group = field(default_factory=Group)
    titles: dict[int, set[str]] = field(default_factory=dict)
    """Names found beside a number."""

    def add(self, sample: str, found: Found, form: str = "", title: str | None = None) -> None:
        if found is None:
            self.none.add(sample)
        elif isinstance(found, Odd):
            self.odd.add(f"{sample}: {found.text}")
        else:
            (self.words if isinstance(found, str) else self.numbers).add(f"{sample}: {found}")
            self.counts[found] += 1
            self.forms[form] += 1
            if isinstance(found, int) and title:
                self.titles.setdefault(found, set()).add(title)
            if len(self.counts) > MOST_CLASSES:
                raise _too_many()

    def __iadd__(self, other: Tally) -> Tally:
        self.counts += other.counts
        self.forms += other.forms
        for name in ("numbers", "words", "none", "odd"):
            getattr(self, name).join(getattr(other, name))
        for number, titles in other.titles.items():
            self.titles.setdefault(number, set()).update(titles)
        if len(self.counts) > MOST_CLASSES:
            raise _too_many()
        return self

    @property
    def labelled(self) -> int:
        return self.numbers.count + self.words.count

    @property
    def form(self) -> str:
        """The labels' form. If there are several, each with its number of samples."""
        if len(self.forms) < 2:
            return next(iter(self.forms), "")
        return ", ".join(f"{form} ({count:,})" for form, count in self.forms.most_common())


def _too_many() -> UserError:
    return UserError(
        f"there are more than {MOST_CLASSES:,} different labels: these are identifiers and no classes; "
        "'--label KEY' takes another key, '--label none' takes no labels"
    )


def decide_labels(tally: Tally, *, names: Sequence[str] = (), given: Sequence[str] = ()) -> Labels:
    """Decides a source's classes. `names`: in the source's own numbering. `given`: another set's, a superset of these.

    UserError if more than `FEW` of the samples would be left out, if numbers and names are mixed, if no label is one
    class, or if one is not among `given`.
    """
    if not tally.labelled and not given:
        if tally.odd.count:
            raise UserError(f"no label is one class: {tally.odd}: '--label KEY' takes another key, '--label none' none")
        return Labels()
    _refuse_mixture(tally)
    if given:
        return _of_other_set(tally, given, names)
    if tally.words.count:
        words = sorted(str(label) for label in tally.counts)
        return Labels(tuple(words), tuple(words), tally.form)
    if names:
        return Labels(tuple(range(len(names))), tuple(names), tally.form)
    values = _class_numbers(tally.counts)
    titles = {number: next(iter(found)) for number, found in tally.titles.items() if len(found) == 1}
    # Titles are used only if every number has one, and all are different.
    named = titles.keys() >= tally.counts.keys() and len(set(titles.values())) == len(titles)
    return Labels(values, tuple((titles.get(v) if named else None) or str(v) for v in values), tally.form)


def _refuse_mixture(tally: Tally) -> None:
    how = "'--label none' takes all as one class, '--label KEY' the labels of one key or column"
    if tally.words.count and tally.numbers.count:
        raise UserError(f"some labels are numbers, {tally.numbers}, and some are names, {tally.words}: {how}")
    left = tally.none.count + tally.odd.count
    if left > FEW * (left + tally.labelled):
        halves = [f"{tally.labelled:,} have a label ({', '.join((tally.words.first or tally.numbers.first)[:3])})"]
        halves += [f"{tally.none.count:,} have none ({', '.join(tally.none.first)})"] if tally.none.count else []
        if tally.odd.count:
            halves.append(f"{tally.odd.count:,} are not of one class ({', '.join(tally.odd.first)})")
        raise UserError(f"of the samples, {', '.join(halves)}: take one half away; {how}")


def _class_numbers(found: Iterable[Label]) -> tuple[int, ...]:
    """All from 0 (or a smallest of 1) to the largest, if at least half of these occur. Else those in use."""
    numbers = sorted(int(label) for label in found)
    first = 1 if numbers[0] == 1 else 0
    dense = range(first, numbers[-1] + 1)
    return tuple(dense if len(numbers) * 2 >= len(dense) else numbers)


def _of_other_set(tally: Tally, given: Sequence[str], names: Sequence[str]) -> Labels:
    """Labels by the class names of another set, in its order."""

    def name_of(label: Label) -> str:
        return names[label] if isinstance(label, int) and label < len(names) else str(label)

    unknown = [name_of(label) for label in tally.counts if name_of(label) not in set(given)]
    if unknown or not tally.labelled:
        what = f"class '{unknown[0]}' is none of its {len(given):,} classes" if unknown else "no sample has a label"
        raise UserError(f"--classes: {what} ({', '.join(given[:3])}, …)")
    if tally.words.count:
        return Labels(tuple(given), tuple(given), tally.form)
    by_name = {name_of(label): label for label in tally.counts}
    # A class without samples here gets its name as label: all labels here are numbers, so no sample has it.
    return Labels(tuple(by_name.get(name, name) for name in given), tuple(given), tally.form)
