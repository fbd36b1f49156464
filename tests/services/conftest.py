"""Real servers, each started once for all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import s3fs

from tests.services.radosgw import missing_packages, radosgw

BUCKET = "services"
SETTINGS = ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_REQUEST_CHECKSUM_CALCULATION", "AWS_RESPONSE_CHECKSUM_VALIDATION")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment that leads to a running S3 server with one bucket."""
    if missing_packages():
        pytest.skip(f"no S3 server: apt-get install --no-install-recommends {' '.join(missing_packages())}")
    with radosgw(tmp_path_factory.mktemp("radosgw") / "ceph") as environment, pytest.MonkeyPatch.context() as patch:
        lead_to(patch, environment)
        s3fs.S3FileSystem(skip_instance_cache=True).mkdir(BUCKET)
        patch.undo()
        yield environment


def lead_to(patch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    """Sets the environment of this process and its children."""
    for name in SETTINGS:
        patch.delenv(name, raising=False)
    for name, value in environment.items():
        patch.setenv(name, value)
