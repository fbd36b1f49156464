"""Layers of a config: preset → file → ``key=value``, with the origin of each key's value."""

from __future__ import annotations

import difflib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, cast

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc
from pydantic import BaseModel, ValidationError

from ibq_scale.config.base import merged
from ibq_scale.config.run import AnyRun, ARRun, TokenizerRun
from ibq_scale.config.secrets import refuse_credentials
from ibq_scale.config.text import as_typed, as_written, fixed_section_of, override
from ibq_scale.documents import DocumentError, parse_yaml, read_text, require_modest
from ibq_scale.errors import UserError
from ibq_scale.names import expand_home

Task = Literal["tokenizer", "ar"]
PRESETS = Path(__file__).parent / "presets"
SCHEMAS: dict[str, type[TokenizerRun] | type[ARRun]] = {"tokenizer": TokenizerRun, "ar": ARRun}
MISSING = "???"
R = TypeVar("R", bound=AnyRun)


@dataclass(frozen=True)
class Resolved:
    """A validated config, and by dotted key the name of the layer with its value (defaults have none)."""

    config: AnyRun
    origins: dict[str, str]


def preset_names() -> list[str]:
    """Names for the command line: ``tokenizer/ibq-16384``, ``ar/xl``."""
    return sorted(f"{p.parent.name}/{p.stem}" for p in PRESETS.glob("*/*.yaml"))


def resolve(source: str, overrides: Sequence[str] = (), task: Task | None = None) -> Resolved:
    """Builds a run's config from a preset's name or a YAML file, and ``key=value`` overrides.

    With `task`, ``ibq-16384`` is short for ``tokenizer/ibq-16384``. Raises UserError for an unknown preset, unreadable
    YAML, a misspelt key (naming the nearest right one), a wrong value, or a config of another task than `task`.
    """
    files = _file_layers(source, task)
    tasks = [layer.values["task"] for layer in files if "task" in layer.values]
    tasks += [item.partition("=")[2] for item in overrides if item.startswith("task=")]
    kind = (tasks and tasks[-1]) or task
    if not isinstance(kind, str) or kind not in SCHEMAS:
        raise UserError(f"{source}: 'task' must be one of {', '.join(SCHEMAS)}, got {kind!r:.100}")
    schema = SCHEMAS[kind]
    layers = [(layer.label, as_typed(layer.values, layer.written, schema)) for layer in files]
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for label, layer in [*layers, ("command line", _overrides(overrides, schema))]:
        _forget_other_length(values, origins, layer)
        values = merged(values, layer)
        origins.update(dict.fromkeys(flatten(layer), label))
    if task is not None and kind != task:
        raise UserError(f"{source} is a config of task '{kind}', this command trains '{task}'")
    return Resolved(validate(schema, values, source), origins)


def validate(schema: type[TokenizerRun] | type[ARRun], values: Mapping[str, Any], source: str) -> AnyRun:
    """Checks plain values against a schema. UserError with one line for each fault."""
    for value in _texts(values):
        refuse_credentials(value)
    try:
        return schema.model_validate(_at_home(values))
    except ValidationError as e:
        raise UserError("\n".join(explain(err, schema, source) for err in e.errors())) from None


def _at_home(value: Any) -> Any:
    """Nested values with ``~/`` expanded. A shell expands it neither in a file nor after ``=``."""
    if isinstance(value, str):
        return str(expand_home(value)) if value == "~" or value.startswith("~/") else value
    if isinstance(value, Mapping):
        return {key: _at_home(inner) for key, inner in value.items()}
    return [_at_home(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, Sequence):
        for inner in value:
            yield from _texts(inner)


def require_complete(config: AnyRun) -> None:
    """UserError for keys that a preset leaves to the user, such as `data.train`."""
    missing = [key for key, value in flatten(config.model_dump()).items() if value == MISSING]
    if missing:
        given = " ".join(f"{key}=…" for key in missing)
        raise UserError(f"the config leaves {', '.join(missing)} open: add {given} on the command line or in the file")


def load_resolved(path: Path) -> AnyRun:
    """Reads a run's own ``config.yaml``. It is complete, so it has no layers.

    OmegaConf takes ten times as long as YAML and is used only for a text with interpolations.
    """
    values = _read_yaml(path, lambda text: _interpolated(text) if "${" in text else parse_yaml(text))
    kind = values.get("task")
    if not isinstance(kind, str) or kind not in SCHEMAS:
        raise UserError(f"{path}: no config of a run ('task' is {kind!r})")
    return validate(SCHEMAS[str(kind)], values, str(path))


def to_yaml(config: BaseModel) -> str:
    """The config as YAML for `load_resolved`."""
    text: str = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    return text


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def with_values(run: R, settings: Mapping[str, Any]) -> R:
    """The run with some of its dotted keys set anew, all of them one or two deep."""
    values = run.model_dump()
    known = flatten(values)
    for key, value in settings.items():
        assert key in known, key
        section, _, name = key.rpartition(".")
        (values[section] if section else values)[name] = value
    return cast(R, type(run).model_validate(values))


class _File(NamedTuple):
    """A file's values, and the same document with every scalar as text."""

    label: str
    values: dict[str, Any]
    written: Any


def _file_layers(source: str, task: Task | None, above: tuple[Path, ...] = ()) -> list[_File]:
    """A file's layer over the preset named in it. `above`: the files that named this one, against circles."""
    path = _find(source, task)
    if path in above:
        raise UserError(f"{path} is its own preset: {' → '.join(map(str, [*above, path]))}")
    written: list[Any] = []

    def load(text: str) -> Any:
        values = _interpolated(text)
        written.append(as_written(text))
        return values

    values = _read_yaml(path, load)
    base = values.pop("preset", None)
    label = f"{path.parent.name}/{path.stem}" if path.is_relative_to(PRESETS) else str(path)
    below = _file_layers(str(base), task, (*above, path)) if base is not None else []
    return [*below, _File(label, values, written[0])]


def _find(source: str, task: Task | None) -> Path:
    names = preset_names()
    candidates = [source] if task is None else [source, f"{task}/{source}"]
    for name in candidates:
        if name in names:
            return PRESETS / f"{name}.yaml"
    if source.endswith((".yaml", ".yml")):
        if not Path(source).is_file():
            raise UserError(f"config file {source} not found")
        return Path(source)
    near = difflib.get_close_matches(candidates[-1], names, n=1, cutoff=0.3)
    hint = f"did you mean '{near[0]}'? " if near else ""
    raise UserError(f"no preset named '{source}': {hint}Presets: {', '.join(names)}; or give a .yaml file")


def _interpolated(text: str) -> Any:
    with without_environment():
        return OmegaConf.to_container(load_omegaconf(text), resolve=True)


def load_omegaconf(text: str) -> Any:
    """OmegaConf's form of a YAML text, before interpolation. DocumentError, yaml.YAMLError."""
    require_modest(text)
    try:
        return OmegaConf.load(io.StringIO(text))
    except (KeyError, AttributeError, TypeError, AssertionError) as e:
        # Tagged values ("!!bool x") and bare scalars raise errors of many types.
        raise DocumentError(f"no keys and values: {e}") from None


@contextmanager
def without_environment() -> Iterator[None]:
    """Refuses environment variables in interpolations. A secret would be written to RUN/config.yaml and shown."""
    # The new name is of OmegaConf 2.4.
    register = getattr(OmegaConf, "register_resolver", OmegaConf.register_new_resolver)
    register("oc.env", _refuse_environment, replace=True)
    try:
        yield
    finally:
        register("oc.env", oc.env, replace=True)


def _refuse_environment(*_: str) -> str:
    raise OmegaConfBaseException("a config does not read environment variables, which may be secrets: write the value")


def _read_yaml(path: Path, load: Callable[[str], Any] = _interpolated) -> dict[str, Any]:
    try:
        values = load(read_text(path))
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException) as e:
        raise UserError(f"cannot read {path}: {' '.join(str(e).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected keys and values, found {type(values).__name__}")
    return {str(key): value for key, value in values.items()}


def _overrides(overrides: Sequence[str], schema: type[BaseModel]) -> dict[str, Any]:
    together: dict[str, Any] = {}
    for item in overrides:
        key, equals, _ = item.partition("=")
        if not equals or not key:
            raise UserError(f"'{item}' is no override: write key=value, for example train.global_batch=64")
        if "${" in item:
            # RUN/config.yaml would keep the text and resolve it when read back.
            raise UserError(f"'{item}': an override has no interpolation: write the value")
        try:
            layer = override(item, schema)
        except (DocumentError, yaml.YAMLError, OmegaConfBaseException) as e:
            raise UserError(f"cannot read the override '{item}': {' '.join(str(e).split())}") from None
        together = merged(together, layer)
    return together


def _forget_other_length(values: dict[str, Any], origins: dict[str, str], layer: Mapping[str, Any]) -> None:
    """train.steps in a layer replaces train.samples of lower layers, and the other way round."""
    above, below = layer.get("train"), values.get("train")
    if not isinstance(above, Mapping) or not isinstance(below, dict):
        return
    for mine, other in (("steps", "samples"), ("samples", "steps")):
        if above.get(mine) is not None and other not in above:
            below.pop(other, None)
            origins.pop(f"train.{other}", None)


def explain(error: Any, schema: type[BaseModel], source: str) -> str:
    """A pydantic error in one line, with the nearest known key for an unknown one."""
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        near = _nearest(key, schema)
        return f"{source}: unknown key '{key}'" + (f", did you mean '{near}'?" if near else "")
    message = str(error["msg"]).removeprefix("Value error, ")
    where = f"{key}: " if key else ""
    given = "" if isinstance(error.get("input"), (dict, BaseModel)) else f" (got {error.get('input')!r:.100})"
    return f"{source}: {where}{message}{given}"


def _nearest(key: str, schema: type[BaseModel]) -> str | None:
    keys = schema_keys(schema)
    keys += sorted({k.rpartition(".")[0] for k in keys} - {""})
    found = difflib.get_close_matches(key, keys, n=1, cutoff=0.6)
    if found:
        return found[0]
    # The commonest slip is a right name in the wrong section, so compare last parts alone.
    by_name = {k.rpartition(".")[2]: k for k in keys}
    found = difflib.get_close_matches(key.rpartition(".")[2], by_name, n=1, cutoff=0.6)
    return by_name[found[0]] if found else None


def schema_keys(schema: type[BaseModel], prefix: str = "") -> list[str]:
    """All dotted keys of a schema. A section that may be null is one key."""
    keys: list[str] = []
    for name, field in schema.model_fields.items():
        section = fixed_section_of(field.annotation)
        keys += schema_keys(section, f"{prefix}{name}.") if section else [f"{prefix}{name}"]
    return keys
