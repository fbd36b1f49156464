"""Schedules, dashboards and storages from outside of the package, by name: docs/extending.md.

A name is an entry point of an installed package, or for schedules and dashboards ``module:attribute``. A training
imports those of its own config, and `data.store.open_store` the storage of a scheme. Reading a config, a checkpoint or
a manifest imports nothing.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from ibq_scale.errors import UserError

# Groups of entry points.
SCHEDULES, DASHBOARDS, STORAGES = "ibq_scale.schedules", "ibq_scale.dashboards", "ibq_scale.storages"
_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


def check_name(group: str, name: str, built_in: Sequence[str] = ()) -> str:
    """Returns a built-in name, an import path or the name of an installed entry point. Imports nothing.

    ValueError with the nearest known name for others.
    """
    if name in built_in or _PATH.fullmatch(name) or installed(group, name):
        return name
    known = [*built_in, *sorted(entry_points(group=group).names)]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean '{near[0]}'? " if near else ""
    raise ValueError(f"'{name}' is unknown: {hint}Known: {', '.join(known) or 'none'}; or give module:attribute")


def installed(group: str, name: str) -> bool:
    """Whether an installed package has an entry point of this name."""
    return bool(entry_points(group=group, name=name))


@cache
def load(group: str, name: str) -> Any:
    """Imports the object of an import path or an entry point. UserError in one line if that fails."""
    found = [EntryPoint(name, name, group)] if _PATH.fullmatch(name) else list(entry_points(group=group, name=name))
    if not found:
        raise UserError(f"no installed package has '{name}' in its entry points {group}")
    try:
        return found[0].load()
    except Exception as e:  # a module may raise anything when it is imported
        said = " ".join(f"{type(e).__name__}: {e}".split())
        raise UserError(f"'{found[0].value}' of {group} cannot be imported: {said}") from None
