"""Conditions to select samples: ``width>=256``, ``aspect<=2``, ``aesthetic>=5.5``, ``language==en``."""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ibq_scale.errors import UserError

# Measured on the picture, even if a column has the same name.
PICTURE_COLUMNS = ("width", "height", "aspect")
_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}
_FORM = re.compile(rf"\s*([^\s<>=!]+)\s*({'|'.join(_OPERATORS)})\s*([^<>=!]*?)\s*")


@dataclass(frozen=True)
class Condition:
    """Compares a column with a number, or (``==`` and ``!=``) with a text. A dot selects a nested column."""

    name: str
    operator: str
    value: float | str

    @property
    def of_picture(self) -> bool:
        """Whether it concerns the picture itself, not a column beside it."""
        return self.name in PICTURE_COLUMNS

    def holds(self, columns: Mapping[str, Any]) -> bool:
        """False if the column is absent, null or no number: a sample without a score has not passed."""
        found = look_up(columns, self.name)
        if found is None:
            return False
        if isinstance(self.value, float):
            try:
                found = float(found)
            except (TypeError, ValueError):
                return False
        else:
            found = str(found)
        return bool(_OPERATORS[self.operator](found, self.value))


def parse_conditions(texts: Iterable[str]) -> tuple[Condition, ...]:
    """Reads ``NAME OPERATOR VALUE``. UserError for anything else."""
    conditions = []
    for text in texts:
        match = _FORM.fullmatch(text)
        if match is None or not match[3]:
            raise UserError(f"'{text}' is no condition: write a column, one of {' '.join(_OPERATORS)}, and a value")
        try:
            value: float | str = float(match[3])
        except ValueError:
            value = match[3].strip("'\"")
            if match[2] not in ("==", "!="):
                raise UserError(f"'{text}': {match[2]} compares numbers, '{value}' is none") from None
        if value != value:
            raise UserError(f"'{text}': nothing compares with nan")
        conditions.append(Condition(match[1], match[2], value))
    return tuple(conditions)


def check_columns(conditions: Sequence[Condition], columns: Mapping[str, Any]) -> None:
    """UserError if a condition names a column absent from the first sample, since no sample would be left."""
    for condition in conditions:
        if condition.of_picture or look_up(columns, condition.name, absent=columns) is not columns:
            continue
        names = [*PICTURE_COLUMNS, *columns]
        near = difflib.get_close_matches(condition.name, names, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(names)}"
        raise UserError(f"the samples have no column '{condition.name}': {hint}")


def all_hold(conditions: Sequence[Condition], columns: Mapping[str, Any]) -> bool:
    """Whether the conditions on columns hold. Ignores those on the picture."""
    return all(c.holds(columns) for c in conditions if not c.of_picture)


def picture_holds(conditions: Sequence[Condition], width: int, height: int) -> bool:
    """Whether the conditions on a picture of this size (pixels) hold. `aspect` is width over height."""
    columns = {"width": width, "height": height, "aspect": width / height}
    return all(c.holds(columns) for c in conditions if c.of_picture)


def look_up(columns: Mapping[str, Any], name: str, absent: Any = None) -> Any:
    """A column's value, by its whole name, or in nested columns by its dotted parts."""
    if name in columns:
        return columns[name]
    head, dot, rest = name.partition(".")
    inner = columns.get(head)
    return look_up(inner, rest, absent) if dot and isinstance(inner, Mapping) else absent
