"""The reference of all config keys, from the schema: Markdown for people, JSON Schema for editors."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from ibq_scale.config.deepspeed import config_names
from ibq_scale.config.layers import MISSING, SCHEMAS, preset_names
from ibq_scale.config.run import DeepSpeedConfig, RunConfig
from ibq_scale.config.text import fixed_section_of, section_of

HEAD = """# Configuration reference

Every key of a run's config with its type, default and meaning. A preset may set other defaults. `ibq-scale config
reference` makes this page from the schema. `ibq-scale config show PRESET [key=value …]` prints the config of a run and
the origin of each value, and with `--describe` each key's meaning. `ibq-scale config schema tokenizer` prints a JSON
Schema, for completion and checks in an editor:

```bash
ibq-scale config schema tokenizer > tokenizer.schema.json
```

```yaml
# yaml-language-server: $schema=tokenizer.schema.json
preset: tokenizer/ibq-16384
data: {train: s3://bucket/imagenet}
```
"""
STAGES = {"tokenizer": "Stage 1: `train tokenizer`", "ar": "Stage 2: `train ar`"}
OPEN = "(required)"
RANGES = (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))


def json_schema(task: str) -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a config file. All keys are optional, since a preset may set them."""
    schema = SCHEMAS[task].model_json_schema()
    for part in (schema, *schema.get("$defs", {}).values()):
        part.pop("required", None)
        if "description" in part:
            part["description"] = inspect.cleandoc(part["description"])
    presets = [name for name in preset_names() if name.startswith(f"{task}/")]
    named = {"type": "string", "description": "The preset (or another file) under this one.", "examples": presets}
    schema["properties"] = {"preset": named} | schema["properties"]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | schema


def choices(schema: type[BaseModel], key: str) -> list[str]:
    """The possible values of a dotted key, if it has a list: a Literal, a boolean, deepspeed_configs/."""
    name, _, below = key.partition(".")
    field = schema.model_fields.get(name)
    if field is None:
        return []
    section = section_of(field.annotation)
    if below:
        return choices(section, below) if section is not None else []
    if (schema, name) == (DeepSpeedConfig, "config"):
        return config_names()
    of = schema.model_json_schema()["properties"][name]
    options = (of, *of.get("anyOf", ()))
    words = ["true", "false"] if any(option.get("type") == "boolean" for option in options) else []
    return words + [str(word) for option in options for word in option.get("enum", ())]


def markdown() -> str:
    """The whole reference: shared sections first, then each stage's own."""
    stages = {task: dict(_sections(schema)) for task, schema in SCHEMAS.items()}
    first, *others = stages.values()
    shared = [name for name in first if all(other.get(name) == first[name] for other in others)]
    parts = [HEAD, "## Both stages\n", *(_chapter(name, *first[name]) for name in shared)]
    for task, schema in SCHEMAS.items():
        parts.append(f"## {STAGES[task]}\n\n{_text(schema)}\n\n{_table(schema, None, '')}")
        parts += [_chapter(name, *own) for name, own in stages[task].items() if name not in shared]
    return "\n".join(parts)


def _sections(schema: type[RunConfig]) -> Iterator[tuple[str, tuple[type[BaseModel], BaseModel | None]]]:
    """Each section's name, its class and its default instance."""
    for name, field in schema.model_fields.items():
        section = section_of(field.annotation)
        if section is not None:
            yield name, (section, field.default if isinstance(field.default, BaseModel) else None)


def _chapter(name: str, section: type[BaseModel], default: BaseModel | None) -> str:
    return f"### `{name}`\n\n{_text(section)}\n\n{_table(section, default, f'{name}.')}"


def descriptions(schema: type[BaseModel], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for name, field in schema.model_fields.items():
        section = fixed_section_of(field.annotation)
        found |= descriptions(section, f"{prefix}{name}.") if section else {f"{prefix}{name}": field.description or ""}
    return found


def _text(section: type[BaseModel]) -> str:
    return inspect.cleandoc(section.__doc__ or "").replace("``", "`")


def _table(section: type[BaseModel], default: BaseModel | None, prefix: str) -> str:
    schema = section.model_json_schema()
    given = {} if default is None else default.model_dump(mode="json")
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, field in section.model_fields.items():
        if fixed_section_of(field.annotation) is not None or name == "task":
            continue
        of = {**schema["properties"][name], **({"default": given[name]} if name in given else {})}
        required = "default" not in of or of["default"] == MISSING
        value = OPEN if required else f"`{json.dumps(of['default'], ensure_ascii=False)}`"
        cells = [f"`{prefix}{name}`", _type(of), value, field.description or ""]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _type(of: Mapping[str, Any]) -> str:
    """A property's type in words: ``integer ≥ 1``, ``"a" | "b"``, ``list of …``."""
    if "anyOf" in of:
        return " | ".join(_type(option) for option in of["anyOf"])
    if "enum" in of:
        return " | ".join(f"`{value}`" for value in of["enum"])
    if "const" in of:
        return f"`{of['const']}`"
    kind = "section" if "$ref" in of else str(of.get("type", "any"))
    if kind == "array":
        items = of.get("items") or of["prefixItems"][0]
        return f"list of {_type(items)}" if "items" in of else f"{len(of['prefixItems'])} of {_type(items)}"
    bounds = [f"{sign} {of[key]:g}" for key, sign in RANGES if key in of]
    return " ".join([kind, ", ".join(bounds)]).strip()
