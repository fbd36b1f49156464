"""Text fields keep the text as typed. YAML alone would make a number, a date or a boolean of it.

Examples: ``wandb.mode=off``, ``name=20241201``, ``out=/runs/lr #2``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from omegaconf import OmegaConf
from pydantic import BaseModel

from ibq_scale.documents import parse_yaml

_QUOTED = re.compile(r"(['\"]).*\1", re.DOTALL)
NULL = ("", "~", "null")


def as_typed(values: Mapping[str, Any], written: Any, schema: type[BaseModel]) -> dict[str, Any]:
    """YAML's values with text fields as written. `written`: the same document with every scalar as text."""
    out = dict(values)
    said = written if isinstance(written, Mapping) else {}
    for key, value in values.items():
        field = schema.model_fields.get(key)
        if field is None:
            continue
        section = section_of(field.annotation)
        if section is not None and isinstance(value, Mapping):
            out[key] = as_typed(value, said.get(key), section)
        elif section is not None and isinstance(value, list) and isinstance(said.get(key), list):
            pairs = zip(value, said[key], strict=False)
            out[key] = [as_typed(v, s, section) if isinstance(v, Mapping) else v for v, s in pairs]
        elif section is None:
            out[key] = _text(value, said.get(key), field.annotation)
    return out


def as_written(text: str) -> Any:
    """A YAML document with every scalar as text. DocumentError if it is damaged."""
    return parse_yaml(text, texts=True)


def override(item: str, schema: type[BaseModel]) -> dict[str, Any]:
    """The nested values of ``key=value``. OmegaConf's and YAML's errors for text without a meaning."""
    key, _, text = item.partition("=")
    annotation = _annotation(schema, key.split("."))
    if annotation is None or not _is_text(annotation, text):
        values = OmegaConf.to_container(OmegaConf.from_dotlist([item]))
        assert isinstance(values, dict)
        return {str(k): v for k, v in values.items()}
    value: Any = text
    if text in NULL and NoneType in _leaves(annotation):
        value = None
    elif _QUOTED.fullmatch(text) or (text.startswith("[") and _holds_several(annotation)):
        value = as_written(text)
    for part in reversed(key.split(".")):
        value = {part: value}
    return dict(value)


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section class in a field's type, None for a plain value."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def fixed_section_of(annotation: Any) -> type[BaseModel] | None:
    """As `section_of`, but None for a section that may be null: a dump then has one value in its place."""
    return section_of(annotation) if isinstance(annotation, type) else None


def _text(value: Any, said: Any, annotation: Any) -> Any:
    if isinstance(value, list) and isinstance(said, Sequence) and len(value) == len(said) and not isinstance(said, str):
        return [_text(inner, text, annotation) for inner, text in zip(value, said, strict=True)]
    if value is None or isinstance(value, (str, Mapping, list)):
        return value
    if not isinstance(said, str) or "${" in said:
        return str(value) if _is_text(annotation, str(value)) else value
    return said if _is_text(annotation, said) else value


def _is_text(annotation: Any, text: str) -> bool:
    """Whether a field takes this text as it is: the field is text, or the text is one of its literals."""
    leaves = _leaves(annotation)
    return text in leaves or all(leaf in (str, NoneType) or isinstance(leaf, str) for leaf in leaves)


def _leaves(annotation: Any) -> tuple[Any, ...]:
    """The possible types of a value, at any depth. For a Literal its values."""
    if annotation in (str, NoneType, None):
        return (annotation or NoneType,)
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return inner
    if origin is None:
        return (annotation,)
    if origin is dict:
        return (dict,)
    # Annotated's first argument is the type.
    inner = inner[:1] if hasattr(annotation, "__metadata__") else inner
    return tuple(leaf for candidate in inner if candidate is not Ellipsis for leaf in _leaves(candidate))


def _holds_several(annotation: Any) -> bool:
    return any(get_origin(candidate) in (tuple, list) for candidate in (annotation, *get_args(annotation)))


def _annotation(schema: type[BaseModel], parts: Sequence[str]) -> Any:
    """The type of a dotted key's field. None for an unknown key or a section."""
    field = schema.model_fields.get(parts[0])
    if field is None:
        return None
    section = section_of(field.annotation)
    if len(parts) > 1:
        return _annotation(section, parts[1:]) if section else None
    return None if section else field.annotation
