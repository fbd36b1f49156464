"""YAML and JSON from other people end and hold up no program."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ibq_scale.config.layers import load_resolved, resolve
from ibq_scale.documents import DocumentError, parse_json, parse_yaml, read_json_lines
from ibq_scale.errors import UserError
from ibq_scale.report.runs import load_run

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
HOSTILE = [
    "[" * 100_000,
    "- " * 100_000,
    "{a: " * 100_000,
    LAUGHS,
    "a: &a [*a]",
    "!!bool x",
    "x" * (2 << 20),
    "a: [",
    "\0",
]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: text[:12])
def test_yaml_that_is_too_deep_or_too_much_is_refused_in_a_line(tmp_path: Path, text: str) -> None:
    """`jobs` and `report` read the config of each run: one of them ended both."""
    with pytest.raises(DocumentError) as told:
        parse_yaml(text)
    assert len(str(told.value).splitlines()) == 1
    path = tmp_path / "config.yaml"
    path.write_text(text)
    (tmp_path / "metrics.jsonl").touch()
    for read in (load_resolved, load_run, lambda path: resolve(str(path), [])):
        with pytest.raises(UserError):
            read(tmp_path if read is load_run else path)
    path.write_text("x: ${y}\n" + text)
    with pytest.raises(UserError):
        load_resolved(path)


def test_plain_yaml_is_read() -> None:
    assert parse_yaml("a: &x [1, 2.5, null]\nb: *x\nc: {d: text}") == {
        "a": [1, 2.5, None],
        "b": [1, 2.5, None],
        "c": {"d": "text"},
    }
    assert parse_yaml("") is None


@pytest.mark.parametrize("text", ["[" * 100_000, "[" * 70 + "]" * 70, "{", "", "\ud800", '{"a": 1}}'])
def test_json_that_is_damaged_or_too_deep_is_refused(text: str) -> None:
    with pytest.raises(DocumentError):
        parse_json(text)


def test_damaged_lines_of_a_log_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    lines = [
        b'{"step": 1}',
        b'{"st\xffep": 2}',
        b"[1]",
        b"5",
        b"[" * 100_000,
        b'{"a": "' + b"x" * (3 << 20) + b'"}',
        b'{"step": 3}',
        b'{"st',
    ]
    path.write_bytes(b"\n".join(lines))
    assert [values for _, values in read_json_lines(path)] == [{"step": 1}, {"step": 3}]
    assert [json.loads(text) for text, _ in read_json_lines(path)] == [{"step": 1}, {"step": 3}]


def test_a_preset_that_names_itself_is_told(tmp_path: Path) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text(f"preset: {second}\n")
    second.write_text(f"preset: {first}\n")
    with pytest.raises(UserError, match="is its own preset"):
        resolve(str(first), [])


@pytest.mark.parametrize("task", ["[ar]", "{}", "3", "null"])
def test_a_task_that_is_none_is_told(tmp_path: Path, task: str) -> None:
    (tmp_path / "config.yaml").write_text(f"task: {task}\n")
    with pytest.raises(UserError, match="no config of a run"):
        load_resolved(tmp_path / "config.yaml")
