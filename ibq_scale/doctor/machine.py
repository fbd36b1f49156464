"""Cores, memory, limits, network ports and clock of this node."""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
from pathlib import Path

from ibq_scale.console import gigabytes, several
from ibq_scale.doctor.tools import Subject
from ibq_scale.findings import Finding, ok, warn

SHM = Path("/dev/shm")
LEAST_SHM = 1 << 30
LEAST_FILES = 4096
INFINIBAND = Path("/sys/class/infiniband")
CGROUPS = Path("/sys/fs/cgroup")
# adjtimex(2): the kernel's clock is not synchronised.
TIME_ERROR = 5


def machine(subject: Subject) -> list[Finding]:
    return [_cores(), _shared_memory(), _files(), *_infiniband(), _clock()]


def _cores() -> Finding:
    here, all_of_them = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    memory = min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *_limits()])
    seen = f"{here} of {all_of_them} cores, {gigabytes(memory)} of memory"
    if here < all_of_them and here == 1:
        return warn("CPU", seen, "one core decodes few pictures: ask for more (--cpus-per-task)")
    return ok("CPU", seen)


def _limits() -> list[int]:
    """Memory limits of the process's control group and of its parents."""
    groups = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    folder = CGROUPS / next(filter(None, (line.partition("::")[2].strip("/") for line in groups)), "")
    files = [above / "memory.max" for above in (folder, *folder.parents) if above.is_relative_to(CGROUPS)]
    texts = [path.read_text(encoding="utf-8").strip() for path in files if path.is_file()]
    return [int(text) for text in texts if text.isdigit()]


def _shared_memory() -> Finding:
    what = "shared memory"
    if not SHM.is_dir():
        return warn(what, f"no {SHM}", "loader workers and NCCL need it: mount it (docker: --ipc=host)")
    usage = shutil.disk_usage(SHM)
    seen = f"{gigabytes(usage.free)} of {gigabytes(usage.total)} free in {SHM}"
    if usage.free < LEAST_SHM:
        return warn(what, seen, "loader workers and NCCL die without it: remove old files, or --shm-size=16g (docker)")
    return ok(what, seen)


def _files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < LEAST_FILES:
        enough = hard == resource.RLIM_INFINITY or hard >= LEAST_FILES
        todo = "ulimit -n 65536 before the start" if enough else "ask the administrators for a higher hard limit"
        return warn("open files", f"at most {soft:,} a process", todo)
    return ok("open files", f"{'unlimited' if soft == resource.RLIM_INFINITY else f'{soft:,}'} a process")


def _infiniband() -> list[Finding]:
    """Empty without such adapters."""
    states = {
        f"{path.parts[-4]}:{path.parts[-2]}": path.read_text(encoding="utf-8").strip().rpartition(" ")[2]
        for path in sorted(INFINIBAND.glob("*/ports/*/state"))
    }
    if not states:
        return []
    down = [name for name, state in states.items() if state != "ACTIVE"]
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if locked != resource.RLIM_INFINITY:
        todo = "NCCL over InfiniBand needs ulimit -l unlimited (in jobs: Slurm's PropagateResourceLimitsExcept=MEMLOCK)"
        return [warn("InfiniBand", f"only {locked:,} bytes of memory may be locked", todo)]
    if down:
        seen = f"{len(states) - len(down)} of {len(states)} ports active, not {several(down)}"
        todo = "if they should be connected, tell the administrators. NCCL_IB_HCA names the adapters to use"
        return [warn("InfiniBand", seen, todo)]
    return [ok("InfiniBand", f"{len(states)} ports active: {several(sorted(states))}")]


def _clock() -> Finding:
    """The kernel's own state, without a server."""
    # struct timex is smaller. modes = 0 only reads.
    state = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(512))
    if state == TIME_ERROR:
        todo = "S3 refuses requests 15 minutes off, and nodes must agree within a minute: start chronyd or ntpd"
        return warn("clock", "no sign of synchronisation on this host", todo)
    return ok("clock", "synchronised" if state >= 0 else "the kernel does not say whether it is synchronised")
