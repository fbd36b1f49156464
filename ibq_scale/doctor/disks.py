"""The folders of a run: free space, rate, file system, locks and clock."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path

from ibq_scale.cluster.room import nearest
from ibq_scale.console import gigabytes
from ibq_scale.doctor.tools import Subject
from ibq_scale.findings import Finding, fail, ok, warn

SIZE = 64 << 20
SHARED = ("nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "cifs", "9p", "panfs", "fuse.glusterfs", "wekafs", "afs")
# A checkpoint of 2 · 10⁹ parameters with moments and averages takes about 34 GB, and two exist at a time.
ROOM = {"run directory": 50e9, "cache folder": 20e9}
# The limit of a job's start-up check.
LEAST_FREE = 256 << 20
SLOW = 50e6
SKEW_SECONDS = 5.0


def run_directory(subject: Subject) -> list[Finding]:
    """The folder of checkpoints: ``--run-dir``, else ``runs`` here."""
    return [_folder("run directory", Path(subject.run_dir or "runs").expanduser(), shared=True)]


def cache_folder(subject: Subject) -> list[Finding]:
    """The default folder for shards from object storage, without data.cache_dir."""
    from ibq_scale.data.cache import default_folder

    return [_folder("cache folder", default_folder(), shared=False)]


def _folder(what: str, wanted: Path, *, shared: bool) -> Finding:
    """Writes, locks and compares clocks there."""
    from ibq_scale.bench.disk import write_rate

    other = "out=…" if shared else "data.cache_dir=…"
    try:
        folder = nearest(wanted)
        where = f"{wanted}" if folder == wanted.absolute() else f"{wanted} (to be made in {folder})"
        if not folder.is_dir():
            return fail(what, f"{folder} is not a folder", f"give another: {other}")
        free, inodes = shutil.disk_usage(folder).free, os.statvfs(folder)
        if free < LEAST_FREE or (inodes.f_files and not inodes.f_favail):
            lacking = gigabytes(free) if free < LEAST_FREE else "room for no file (inodes)"
            return fail(what, f"{where}: {lacking} free", f"make room, or give another: {other}")
        skew, rate, kind = _skew_and_lock(folder), write_rate(folder, SIZE), file_system(folder)
    except OSError as e:
        full = e.errno in (errno.ENOSPC, errno.EDQUOT)
        todo = f"make room or raise the quota, or give another: {other}" if full else f"give another: {other}"
        return fail(what, f"{wanted} cannot be written: {e.strerror or e}", todo)
    seen = f"{where}: {gigabytes(rate)}/s, {gigabytes(free)} free, {kind}"
    if abs(skew) > SKEW_SECONDS:
        todo = "this node or the file server has the wrong time: jobs on other nodes will take live runs for dead"
        return warn(what, f"{seen}; its clock is {skew:+.0f} s off this node's", todo)
    if rate < SLOW:
        todo = "a save hides behind training only where it is quicker than the next is due: train.checkpoint_every"
        return warn(what, seen, todo if shared else f"a faster disk: {other}")
    if free < ROOM[what]:
        plan, cache = "'ibq-scale plan' shows a run's checkpoints", "data.cache_bytes is kept below the free space"
        return warn(what, seen, f"may be little: {plan if shared else cache}")
    if kind in ("tmpfs", "ramfs"):
        return warn(what, seen, f"it is memory{', and gone with the node' * shared}: {other}")
    if not shared and kind in SHARED:
        return warn(what, seen, f"a node's own disk spares the network: {other}")
    return ok(what, seen)


def _skew_and_lock(folder: Path) -> float:
    """Seconds by which a new file's time, from the file server, is ahead of this node's clock."""
    with tempfile.TemporaryFile(dir=folder) as f:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        before = time.time()
        f.write(b"\0")
        f.flush()
        os.fsync(f.fileno())
        stamp, after = os.fstat(f.fileno()).st_mtime, time.time()
    return stamp - min(max(stamp, before), after)


def file_system(path: Path) -> str:
    """The file system type of a path, in the kernel's words."""
    here = nearest(path).resolve()
    best, kind = "", "unknown file system"
    for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines():
        _, mount, of, *_ = line.split(" ")
        mount = mount.replace("\\040", " ")
        if here.is_relative_to(mount) and len(mount) >= len(best):
            best, kind = mount, of
    return kind


def is_shared(path: Path) -> bool:
    """Whether other nodes may share this folder."""
    return file_system(path) in SHARED
