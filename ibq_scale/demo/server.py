"""An S3 endpoint inside this process: real HTTP on the loopback interface."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

from ibq_scale.errors import UserError

BUCKET = "ibq-demo"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "demo", "AWS_SECRET_ACCESS_KEY": "demo-secret", "AWS_DEFAULT_REGION": "us-east-1"}


@contextmanager
def object_storage(bucket: str = BUCKET) -> Iterator[None]:
    """Starts the server with one empty bucket. The environment of this process and of its children points at it.

    UserError without moto.
    """
    try:
        from moto.server import ThreadedMotoServer
    except ModuleNotFoundError:
        raise UserError("the embedded S3 endpoint needs moto: pip install 'ibq-scale[demo]'") from None
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    before = dict(os.environ)
    try:
        host, port = server.get_host_and_port()
        os.environ |= CREDENTIALS | {"AWS_ENDPOINT_URL": f"http://{host}:{port}"} | _no_proxy()
        _make_bucket(bucket)
        yield
        _drop_bucket(bucket)
    finally:
        os.environ.clear()
        os.environ |= before
        server.stop()


def _make_bucket(bucket: str) -> None:
    import s3fs

    s3fs.S3FileSystem(skip_instance_cache=True).mkdir(bucket)


def _drop_bucket(bucket: str) -> None:
    """moto keeps buckets for the life of the process, across its servers."""
    import s3fs

    s3fs.S3FileSystem(skip_instance_cache=True).rm(bucket, recursive=True)


def _no_proxy() -> dict[str, str]:
    """Keeps loopback traffic away from any proxy."""
    known = os.environ.get("NO_PROXY") or os.environ.get("no_proxy") or ""
    hosts = ",".join(dict.fromkeys([*filter(None, known.split(",")), "127.0.0.1", "localhost"]))
    return {"NO_PROXY": hosts, "no_proxy": hosts}
