"""An all-reduce over ranks of this node: the first step of a job, and the first to hang."""

from __future__ import annotations

import json
import sys

from ibq_scale.console import gigabytes
from ibq_scale.distributed.launch import default_ranks
from ibq_scale.doctor.gpus import listed
from ibq_scale.doctor.tools import Subject, ask
from ibq_scale.findings import Finding, fail, ok, warn

# A rank starts in seconds, but in minutes from a cold shared disk.
SECONDS = 60.0
MEGABYTES = 64
# Below PCIe 3 between two GPUs.
SLOW = 5e9


def all_reduce(subject: Subject) -> list[Finding]:
    """One rank per GPU, or two on CPUs, unless the subject has a number."""
    ranks = subject.ranks or (default_ranks() if listed() else 2)
    again = f"bench collectives --ranks {ranks} --megabytes {MEGABYTES}"
    code, said = ask(sys.executable, "-m", "ibq_scale", *again.split(), "--json", seconds=SECONDS)
    what = "all-reduce"
    see = f"NCCL_DEBUG=INFO ibq-scale {again}"
    if code == 124:
        todo = f"see where it stops: {see}; NCCL_P2P_DISABLE=1 or another NCCL_SOCKET_IFNAME may help"
        return [fail(what, f"{ranks} ranks did not meet within {SECONDS:.0f} s", todo)]
    report = next((json.loads(line) for line in said.splitlines() if line.startswith("{")), None)
    if report is None or (code and report["right"]):
        return [fail(what, f"{ranks} ranks: {_last(said)}", f"see all of it: {see}")]
    rate = report["bus_bytes_per_s"]
    seen = f"{report['ranks']} ranks, {report['backend']}: {gigabytes(rate)}/s, {1e3 * report['latency_s']:.2f} ms"
    if not report["right"]:
        todo = "no result of this node can be trusted: leave it out (sbatch --exclude) and tell the administrators"
        return [fail(what, f"{seen}; the sums are WRONG", todo)]
    if report["backend"] == "nccl" and ranks > 1 and rate < SLOW:
        return [warn(what, seen, f"slower than PCIe: {see} shows its route")]
    return [ok(what, seen)]


def _last(said: str) -> str:
    """The last line of our own, or the last line."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    ours = [line for line in lines if line.startswith("ibq-scale:")]
    return (ours or lines or ["no word"])[-1].removeprefix("ibq-scale:").strip()
