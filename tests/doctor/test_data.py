"""A data set that can be read, and those that cannot."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ibq_scale.doctor.data import store
from ibq_scale.doctor.tools import Subject
from ibq_scale.errors import UserError
from ibq_scale.findings import Finding
from tests.faults import FaultProxy


def _look(url: object) -> Finding:
    (line,) = store(Subject(data=str(url)))
    return line


def test_a_local_data_set(dataset: str, tmp_path: Path) -> None:
    line = _look(dataset)
    assert line.level == "ok"
    assert "24 images in" in line.text
    assert "not significant" in line.text
    shutil.copytree(dataset, tmp_path, dirs_exist_ok=True)
    for shard in tmp_path.glob("*.tar"):
        shard.unlink()
    line = _look(tmp_path)
    assert line.level == "FAIL"
    assert line.text.endswith(".tar is missing")


def test_what_is_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no manifest\.json"):
        _look(tmp_path)
    with pytest.raises(UserError, match="unknown scheme 'gs'"):
        _look("gs://bucket/x")


@pytest.mark.slow
def test_object_storage(dataset: str, new_prefix: Callable[[], str], proxy: FaultProxy) -> None:
    from ibq_scale.data.store import open_store

    url = new_prefix()
    for path in Path(dataset).iterdir():
        open_store(url).upload(path, path.name)
    line = _look(url)
    assert line.level == "ok"
    assert f"{url} at {proxy.url}: 24 images" in line.text


def test_a_slow_store(dataset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ibq_scale.doctor.data.TELLING", 0)
    monkeypatch.setattr("ibq_scale.doctor.data.SLOW", 1e18)
    assert _look(dataset).level == "warn"


def test_an_endpoint_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    with pytest.raises(UserError, match=r"127\.0\.0\.1:1"):
        _look("s3://bucket/x")
