"""Fixtures of the data's tests: a proxy that fails on demand, and a store without patience."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from ibq_scale.data import store as store_module
from tests.faults import FaultProxy, fault_proxy


@pytest.fixture
def proxy(s3_server: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """In front of the S3 endpoint of the tests; stores opened from here on go through it, and retry without pauses."""
    with fault_proxy(os.environ["AWS_ENDPOINT_URL"]) as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.url)
        monkeypatch.setattr(store_module, "PAUSE_SECONDS", 0.01)
        monkeypatch.setattr(store_module, "DEADLINE_SECONDS", 10.0)
        yield running
