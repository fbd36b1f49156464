"""A Slurm that only notes what it is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster.fake_slurm import FakeSlurm, install


@pytest.fixture
def slurm(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    return install(tmp_path_factory.mktemp("slurm"), monkeypatch)


@pytest.fixture
def profiles(slurm: FakeSlurm) -> Path:
    """Where the profiles of clusters are looked for; not there yet."""
    path = slurm.folder / ".config/ibq-scale/clusters.yaml"
    path.parent.mkdir(parents=True)
    return path
