"""The reference of the config's keys: each has a meaning, and code reads each."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import jsonschema
import pytest

import ibq_scale
from ibq_scale.cli.main import main
from ibq_scale.config.layers import SCHEMAS, flatten, preset_names, resolve, schema_keys
from ibq_scale.config.reference import descriptions, json_schema, markdown

PACKAGE = Path(ibq_scale.__file__).parent
PAGE = PACKAGE.parent / "docs/configuration.md"


def test_the_page_in_docs_is_the_schemas() -> None:
    assert PAGE.read_text() == markdown(), "make it anew: ibq-scale config reference > docs/configuration.md"


@pytest.mark.parametrize("task", SCHEMAS)
def test_every_key_has_its_row_with_the_default_that_a_run_gets(task: str) -> None:
    rows = [line.replace(" \\| ", "\\|").split(" | ") for line in markdown().splitlines() if line.startswith("| `")]
    said: dict[str, list[str]] = {}
    for key, _, default, *_ in rows:
        said.setdefault(key.strip("|` "), []).append(default)
    bare = {"tokenizer": ["train.steps=1", "name=x", "data.train=x"], "ar": ["train.steps=1", "name=x", "data.train=x"]}
    values = flatten(SCHEMAS[task].model_validate(_nested(bare[task])).model_dump(mode="json"))
    for key in schema_keys(SCHEMAS[task]):
        if key in ("task", "name", "data.train", "train.steps"):
            continue
        assert f"`{json.dumps(values[key])}`" in said[key], key


@pytest.mark.parametrize("task", SCHEMAS)
def test_every_key_has_a_meaning_in_the_page_and_in_config_show(task: str, capsys: pytest.CaptureFixture[str]) -> None:
    meanings = descriptions(SCHEMAS[task])
    assert [key for key in schema_keys(SCHEMAS[task]) if key != "task" and not meanings[key]] == []
    preset = next(name for name in preset_names() if name.startswith(f"{task}/"))
    assert main(["config", "show", preset, "data.train=x", "--describe"]) == 0
    lines = capsys.readouterr().out.splitlines()
    after = lines[[line.split()[0] for line in lines].index("optimizer.grad_clip") + 1]
    assert after == f"  # {meanings['optimizer.grad_clip']}"
    assert main(["config", "show", preset, "data.train=x", "--describe", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["meanings"] == meanings


def _nested(overrides: list[str]) -> dict[str, object]:
    out: dict[str, object] = {}
    for item in overrides:
        key, _, value = item.partition("=")
        section, _, name = key.rpartition(".")
        where = out.setdefault(section, {}) if section else out
        assert isinstance(where, dict)
        where[name] = value
    return out


def _read_names() -> set[str]:
    """Attributes that the package's code reads, and keywords by which it takes sections apart."""
    names: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                names.add(node.attr)
    return names


@pytest.mark.parametrize("task", SCHEMAS)
def test_every_key_is_read_somewhere(task: str) -> None:
    read = _read_names()
    assert [key for key in schema_keys(SCHEMAS[task]) if key.rpartition(".")[2] not in read] == []
    assert "a_key_that_nobody_reads" not in read


@pytest.mark.parametrize("task", SCHEMAS)
def test_the_json_schema_takes_what_a_run_takes_and_refuses_what_it_refuses(task: str) -> None:
    validator = jsonschema.Draft202012Validator(json_schema(task))
    jsonschema.Draft202012Validator.check_schema(json_schema(task))
    for name in (name for name in preset_names() if name.startswith(f"{task}/")):
        values = resolve(name, ["data.train=x"]).config.model_dump(mode="json")
        assert not list(validator.iter_errors(values)), name
        # A file of a user's own says what differs, and no more.
        assert validator.is_valid({"preset": name, "train": {"micro_batch": 8}})
    assert not validator.is_valid({"train": {"micro_batchs": 8}})
    assert not validator.is_valid({"train": {"micro_batch": 0}})
    assert not validator.is_valid({"preset": 3})


def test_both_are_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "reference"]) == 0
    assert capsys.readouterr().out == PAGE.read_text()
    assert main(["config", "schema", "ar"]) == 0
    assert json.loads(capsys.readouterr().out) == json_schema("ar")
