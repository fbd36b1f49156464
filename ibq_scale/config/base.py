"""The base of every config section, integers that a config may leave open as ``auto``, and layers of values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, WithJsonSchema

AUTO = "auto"
# What an integer field holds for ``auto``. Files and the command line have the word.
OPEN = -1


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values, those of `above` over those of `below`."""
    out = dict(below)
    for key, value in above.items():
        old = out.get(key)
        out[key] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return out


class Section(BaseModel):
    """One block of the config. Instances are immutable, so a run's config stays its record."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, protected_namespaces=(), allow_inf_nan=False
    )


def auto_int(least: int) -> Any:
    """The type of an integer that is at least `least`, or ``auto``, which is `OPEN` until `scaling.auto` settles it."""

    def check(value: Any) -> Any:
        # The second is the default itself.
        if value in (AUTO, OPEN):
            return OPEN
        if isinstance(value, int) and value < least:
            raise ValueError(f"an integer of at least {least}, or auto")
        return value

    return Annotated[
        int,
        BeforeValidator(check),
        PlainSerializer(lambda value: AUTO if value == OPEN else value, return_type=int | str),
        WithJsonSchema({"anyOf": [{"type": "integer", "minimum": least}, {"const": AUTO}]}),
        Field(json_schema_extra={"default": AUTO}),
    ]
