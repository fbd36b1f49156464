"""A real S3 server on the loopback interface: Ceph's RADOS gateway over one in-memory disk, from Debian's packages.

By hand, as root, until Ctrl-C, with the environment to use printed: ``python -m tests.services.radosgw``
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from tests.ports import free_ports
from tests.services.daemons import run_by_hand

PACKAGES = {
    "ceph": "ceph-common",
    "ceph-mon": "ceph-mon",
    "ceph-osd": "ceph-osd",
    "ceph-mgr": "ceph-mgr",
    "radosgw": "radosgw",
}
"""Debian's package of each program."""
ACCESS_KEY, SECRET_KEY = "services-access", "services-secret"
STORE_BYTES = 2 << 30
START_SECONDS = 300.0

# One monitor, one disk, one copy of everything; what asks for more is told that this is meant.
_CONFIG = """\
[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{v2},v1:127.0.0.1:{v1}]
mon initial members = a
public network = 127.0.0.0/8
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
keyring = {folder}/keyring
run dir = {folder}
admin socket = {folder}/$name.asok
log file = {folder}/$name.log
mon data = {folder}/mon
mgr data = {folder}/mgr
osd data = {folder}/osd
rgw data = {folder}/rgw
osd objectstore = memstore
memstore device bytes = {bytes}
osd crush chooseleaf type = 0
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pgp num = 4
osd pool default pg autoscale mode = off
mon allow pool size one = true
mon warn on pool no redundancy = false
mon max pg per osd = 1000
osd heartbeat grace = 3600
mon osd report timeout = 36000

[client.rgw.a]
rgw frontends = beast endpoint=127.0.0.1:{http}
"""

_CAPABILITIES = {
    "mon.": {"mon": "allow *"},
    "client.admin": {"mon": "allow *", "osd": "allow *", "mgr": "allow *"},
    "client.rgw.a": {"mon": "allow rw", "osd": "allow rwx"},
    "osd.0": {"mon": "allow profile osd", "mgr": "allow profile osd", "osd": "allow *"},
    "mgr.x": {"mon": "allow profile mgr", "osd": "allow *"},
}


def missing_packages() -> list[str]:
    """Debian packages to install before `radosgw` can run."""
    return sorted({package for program, package in PACKAGES.items() if shutil.which(program) is None})


@contextmanager
def radosgw(folder: Path) -> Iterator[dict[str, str]]:
    """Runs the server with its data in `folder`; gives the environment that leads to it. RuntimeError where it fails.

    Needs to be root, and the packages of `missing_packages`.
    """
    v2, v1, http = free_ports(3)
    for name in ("mon", "mgr", "osd", "rgw"):
        (folder / name).mkdir(parents=True)
    monitors = f"[v2:127.0.0.1:{v2},v1:127.0.0.1:{v1}]"
    fsid = str(uuid4())
    config = folder / "ceph.conf"
    config.write_text(_CONFIG.format(folder=folder, fsid=fsid, v2=v2, v1=v1, http=http, bytes=STORE_BYTES))
    environment = os.environ | {"CEPH_CONF": str(config)}
    daemons: list[subprocess.Popen[bytes]] = []

    def run(*command: str) -> None:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr or done.stdout}")

    def start(*command: str) -> None:
        # In the foreground, and ended by the kernel if this process is: nothing outlives the tests.
        command = ("setpriv", "--pdeathsig", "KILL", *command, "-f")
        with (folder / "output.log").open("ab") as output:
            daemons.append(subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=output))

    try:
        for name, capabilities in _CAPABILITIES.items():
            caps = [word for of, what in capabilities.items() for word in ("--cap", of, what)]
            created = [] if (folder / "keyring").exists() else ["--create-keyring"]
            run("ceph-authtool", "keyring", *created, "--gen-key", "-n", name, *caps)
        run("monmaptool", "--create", "--addv", "a", monitors, "--fsid", fsid, "monmap")
        run("ceph-mon", "--mkfs", "-i", "a", "--monmap", "monmap", "--keyring", "keyring")
        start("ceph-mon", "-i", "a")
        disk = str(uuid4())
        run("ceph", "--connect-timeout", "30", "osd", "new", disk)
        run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", disk)
        start("ceph-osd", "-i", "0")
        start("ceph-mgr", "-i", "x")
        start("radosgw", "-n", "client.rgw.a")
        user = ("--uid", "tests", "--display-name", "tests", "--access-key", ACCESS_KEY, "--secret-key", SECRET_KEY)
        run("radosgw-admin", "-n", "client.rgw.a", "user", "create", *user)
        _wait_for(f"http://127.0.0.1:{http}/", daemons, folder)
        yield {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{http}",
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_DEFAULT_REGION": "us-east-1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }
    finally:
        for daemon in reversed(daemons):
            daemon.kill()
        for daemon in daemons:
            daemon.wait()


def _wait_for(url: str, daemons: list[subprocess.Popen[bytes]], folder: Path) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    end = time.monotonic() + START_SECONDS
    while True:
        ended = [daemon.args for daemon in daemons if daemon.poll() is not None]
        try:
            opener.open(url, timeout=5).close()
            return
        except OSError as e:
            if ended or time.monotonic() > end:
                output = (folder / "output.log").read_text(errors="replace")[-2000:]
                raise RuntimeError(f"no S3 server at {url} ({e}); ended: {ended}\n{output}") from None
        time.sleep(0.1)


def main() -> None:
    run_by_hand(missing_packages(), lambda folder: radosgw(folder / "ceph"))


if __name__ == "__main__":
    main()
