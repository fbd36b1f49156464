"""What a config may say, from the schema itself: Markdown for people, JSON Schema for editors."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from ibq_scale.config.deepspeed import config_names
from ibq_scale.config.layers import MISSING, SCHEMAS, preset_names
from ibq_scale.config.run import DeepSpeedConfig, RunConfig
from ibq_scale.config.text import section_of

HEAD = """# Configuration reference

Every key of a run's config, its type and its default, where no preset says otherwise. This page is made from the
schema by `ibq-scale config reference`. `ibq-scale config show PRESET [key=value …]` prints what a run would get, and
which layer said so; `ibq-scale config schema tokenizer` a JSON Schema, with which editors complete and check YAML:

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
SAID_OF_KEY = re.compile(r"`(\w+)`")
OPEN = "(yours to say)"
RANGES = (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))


def json_schema(task: str) -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a config file: all keys are optional, since a preset may give the others."""
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
    """The words that a dotted key may be, where they can be counted: of a Literal, a boolean, deepspeed_configs/."""
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
    if of.get("type") == "boolean":
        return ["true", "false"]
    return [str(word) for option in (of, *of.get("anyOf", ())) for word in option.get("enum", ())]


def markdown() -> str:
    """The whole reference: sections that both stages share first, then each stage's own."""
    stages = {task: dict(_sections(schema)) for task, schema in SCHEMAS.items()}
    first, *others = stages.values()
    shared = [name for name in first if all(other.get(name) == first[name] for other in others)]
    parts = [HEAD, "## Both stages\n", *(_chapter(name, *first[name]) for name in shared)]
    for task, schema in SCHEMAS.items():
        parts.append(f"## {STAGES[task]}\n\n{_text(RunConfig)}\n{_text(schema)}\n\n{_table(schema, None, '')}")
        parts += [_chapter(name, *own) for name, own in stages[task].items() if name not in shared]
    return "\n".join(parts)


def _sections(schema: type[RunConfig]) -> Iterator[tuple[str, tuple[type[BaseModel], BaseModel | None]]]:
    """Names of a run's sections, what they are, and the section that a run has by default."""
    for name, field in schema.model_fields.items():
        section = section_of(field.annotation)
        if section is not None:
            yield name, (section, field.default if isinstance(field.default, BaseModel) else None)


def _chapter(name: str, section: type[BaseModel], default: BaseModel | None) -> str:
    return f"### `{name}`\n\n{_text(section)}\n\n{_table(section, default, f'{name}.')}"


def _text(section: type[BaseModel]) -> str:
    """A docstring in Markdown: ``literals`` become `literals`, and what is said of a key an item of a list."""
    lines = inspect.cleandoc(section.__doc__ or "").replace("``", "`").splitlines()
    out: list[str] = []
    listed = False
    for line in lines:
        said_of = SAID_OF_KEY.match(line)
        begins = said_of is not None and said_of[1] in section.model_fields
        if begins and not listed and out and out[-1]:
            out.append("")
        listed = begins or (listed and bool(line))
        out.append(f"- {line}" if begins else f"  {line}" if listed else line)
    return "\n".join(out)


def _table(section: type[BaseModel], default: BaseModel | None, prefix: str) -> str:
    schema = section.model_json_schema()
    given = {} if default is None else default.model_dump(mode="json")
    lines = ["| key | type | default |", "|---|---|---|"]
    for name, field in section.model_fields.items():
        if section_of(field.annotation) is not None or name == "task":
            continue
        of = {**schema["properties"][name], **({"default": given[name]} if name in given else {})}
        lines.append(f"| `{prefix}{name}` | {_type(of).replace('|', chr(92) + '|')} | {_default(of)} |")
    return "\n".join(lines) + "\n"


def _default(of: Mapping[str, Any]) -> str:
    if "default" not in of or of["default"] == MISSING:
        return OPEN
    return f"`{json.dumps(of['default'], ensure_ascii=False)}`"


def _type(of: Mapping[str, Any]) -> str:
    """A property's type in words: ``integer ≥ 1``, ``"a" | "b"``, ``list of …``."""
    if "anyOf" in of:
        return " | ".join(_type(option) for option in of["anyOf"])
    if "enum" in of:
        return " | ".join(f"`{value}`" for value in of["enum"])
    if "const" in of:
        return f"`{of['const']}`"
    kind = str(of.get("type", "any"))
    if kind == "array":
        items = of.get("items") or of["prefixItems"][0]
        return f"list of {_type(items)}" if "items" in of else f"{len(of['prefixItems'])} of {_type(items)}"
    bounds = [f"{sign} {of[key]:g}" for key, sign in RANGES if key in of]
    return " ".join([kind, ", ".join(bounds)]).strip()
