"""A real Slurm of several virtual nodes on this machine, from Debian's packages.

A node is a slurmd in PID, host name and mount namespaces of its own, so killing it is what a power cut is: all that ran
there is gone at once, and says nothing. By hand, as root, until Ctrl-C: ``python -m tests.services.slurm``
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.ports import free_ports
from tests.services.daemons import run_by_hand

PACKAGES = {"slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client", "munged": "munge"}
"""Debian's package of each program."""
START_SECONDS = 300.0
# The first number of a job, random: the port at which its ranks meet comes of it, and other clusters may run here.
JOBS = 10_000_000

_CONFIG = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
ReturnToService=2
SlurmdParameters=config_overrides
SlurmdTimeout=20
MpiDefault=none
JobCompType=jobcomp/none
AccountingStorageType=accounting_storage/none
SchedulerParameters=sched_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MinJobAge=3600
FirstJobId={first_job}
"""
_NODE = "NodeName={name} NodeAddr=127.0.0.1 Port={port} CPUs=8 RealMemory=16000 Gres=gpu:8 State=UNKNOWN\n"
_PARTITIONS = """\
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 GraceTime=60 State=UP
PartitionName=urgent Nodes=ALL PriorityTier=2 PreemptMode=OFF State=UP
"""
# A shell stays as the first process of the node: it takes care of orphans, which slurmd would not.
_BOOT = 'mount --bind "$1" /etc/hosts && hostname "$2" && { slurmd -D -N "$2" & wait; }'


def missing_packages() -> list[str]:
    """Debian packages to install before `slurm` can run."""
    return sorted({package for program, package in PACKAGES.items() if shutil.which(program) is None})


class Cluster:
    """A running cluster. `environment` leads Slurm's commands to it."""

    def __init__(self, folder: Path, nodes: int) -> None:
        self.folder = folder
        self.nodes = [f"node{n}" for n in range(nodes)]
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """RuntimeError where it does not come up."""
        (self.folder / "state").mkdir(parents=True)
        port, *ports = free_ports(1 + len(self.nodes))
        config = _CONFIG.format(
            host=socket.gethostname(), port=port, folder=self.folder, first_job=1 + secrets.randbelow(JOBS)
        )
        for name, its_port in zip(self.nodes, ports, strict=True):
            config += _NODE.format(name=name, port=its_port)
        (self.folder / "slurm.conf").write_text(config + _PARTITIONS)
        for gpu in range(8):
            (self.folder / f"gpu{gpu}").touch()
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-7]\n")
        hosts = "".join(f"127.0.0.1 {name}\n" for name in self.nodes)
        (self.folder / "hosts").write_text(Path("/etc/hosts").read_text() + hosts)
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(64))
        key.chmod(0o400)
        files = {"socket": "munge.socket", "pid-file": "munge.pid", "log-file": "munge.log", "seed-file": "munge.seed"}
        words = [f"--{option}={self.folder / name}" for option, name in files.items()]
        self._start("munged", "munged", "--foreground", "--force", f"--key-file={key}", *words)
        self._wait_for(lambda: (self.folder / "munge.socket").exists(), "munged")
        self._start("slurmctld", "slurmctld", "-D", "-i")
        for name in self.nodes:
            self.start_node(name)
        self._wait_for(lambda: self._idle() == len(self.nodes), "all nodes idle")

    def start_node(self, name: str) -> None:
        """Its power comes back."""
        (self.folder / f"spool.{name}").mkdir(exist_ok=True)
        namespaces = ("unshare", "--pid", "--uts", "--mount", "--fork", "--kill-child", "--mount-proc")
        self._start(name, *namespaces, "bash", "-c", _BOOT, "boot", str(self.folder / "hosts"), name)

    def kill_node(self, name: str) -> None:
        """Its power is gone, and with it everything that runs there."""
        process = self._running.pop(name)
        process.kill()
        process.wait()

    def stop(self) -> None:
        """Ends everything that was started."""
        for name in [*self._running][::-1]:
            self.kill_node(name)

    def command(self, *words: str) -> str:
        """Runs one of Slurm's commands; what it prints. RuntimeError where it fails."""
        done = subprocess.run(words, env=os.environ | self.environment, capture_output=True, text=True, timeout=300)
        if done.returncode:
            raise RuntimeError(f"{' '.join(words)}: {done.stderr or done.stdout}")
        return done.stdout

    def job(self, number: int | str) -> dict[str, str]:
        """Slurm's record of a job: JobState, Restarts, NodeList, ExcNodeList, ExitCode…"""
        line = self.command("scontrol", "show", "job", "--oneliner", str(number))
        return dict(word.split("=", 1) for word in line.split() if "=" in word)

    def _idle(self) -> int:
        try:
            return sum(map(int, self.command("sinfo", "-h", "-p", "main", "-t", "idle", "-o", "%D").split()))
        except RuntimeError:
            return 0

    def _start(self, name: str, *words: str) -> None:
        # Ended by the kernel if this process is: nothing outlives the tests.
        words = ("setpriv", "--pdeathsig", "KILL", *words)
        # A cluster may not take itself for a part of another one, whose job starts it.
        environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")} | self.environment
        with (self.folder / f"{name}.out").open("ab") as output:
            self._running[name] = subprocess.Popen(words, env=environment, stdout=output, stderr=output)

    def _wait_for(self, condition: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + START_SECONDS
        while not condition():
            ended = [name for name, process in self._running.items() if process.poll() is not None]
            if ended or time.monotonic() > end:
                said = "".join(p.read_text(errors="replace")[-500:] for p in self.folder.glob("*.out"))
                raise RuntimeError(f"no Slurm: waiting for {what}; ended: {ended}\n{said}")
            time.sleep(0.1)


def skip_without() -> None:
    """Ends a test that cannot have a cluster here, and says why."""
    import pytest

    if missing_packages():
        pytest.skip(f"no Slurm: apt-get install --no-install-recommends {' '.join(missing_packages())}")
    if os.geteuid():
        pytest.skip("no Slurm: its nodes are namespaces, which only root can make")


@contextmanager
def slurm(folder: Path, nodes: int) -> Iterator[Cluster]:
    """Runs a cluster with its state in `folder`. Needs to be root, and the packages of `missing_packages`."""
    cluster = Cluster(folder, nodes)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def main() -> None:
    run_by_hand(missing_packages(), _four_nodes)


@contextmanager
def _four_nodes(folder: Path) -> Iterator[Mapping[str, str]]:
    with slurm(folder / "slurm", 4) as cluster:
        yield cluster.environment


if __name__ == "__main__":
    main()
