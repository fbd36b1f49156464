"""`train.deterministic` sets every switch that decides in which order a GPU adds, and none where it is off."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
import torch.utils.deterministic

from ibq_scale.config.layers import resolve
from ibq_scale.train.determinism import fix_the_order_of_sums


@pytest.fixture(autouse=True)
def _switches(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    fills, cudnn = torch.utils.deterministic.fill_uninitialized_memory, torch.backends.cudnn
    found = cudnn.deterministic, cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fills
    cudnn.deterministic, cudnn.benchmark = found
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def _set(value: str) -> tuple[bool, bool, str | None]:
    fix_the_order_of_sums(resolve("ar/tiny", ["data.train=none", f"train.deterministic={value}"]).config)
    switches = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic
    return *switches, os.environ.get("CUBLAS_WORKSPACE_CONFIG")


def test_the_switches_follow_the_setting() -> None:
    assert _set("false") == (False, False, None)
    assert _set("true") == (True, True, ":4096:8")
    assert not torch.utils.deterministic.fill_uninitialized_memory


def test_what_the_user_set_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    assert _set("true")[2] == ":16:8"
