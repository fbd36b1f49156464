"""Slurm from this host: its controller, its partitions and their limits."""

from __future__ import annotations

import os

from ibq_scale.cluster import slurm as commands
from ibq_scale.console import several
from ibq_scale.doctor.tools import Subject
from ibq_scale.errors import UserError
from ibq_scale.findings import Finding, fail, ok, warn

UNSET = ("NONE", "UNLIMITED", "INFINITE")


def slurm(subject: Subject) -> list[Finding]:
    what = "Slurm"
    try:
        version, up = commands.version(), commands.controllers()
    except commands.NoSlurmError as e:
        return [warn(what, str(e), "needed only to submit jobs")]
    except UserError as e:
        todo = "jobs can be neither submitted nor requeued now: tell the administrators (or is SLURM_CONF wrong?)"
        return [fail(what, str(e), todo)]
    job = os.environ.get("SLURM_JOB_ID")
    inside = f"; inside job {job} on {os.environ.get('SLURM_JOB_NODELIST', '?')}" if job else ""
    return [ok(what, f"{version}, controller {', '.join(up)}{inside}"), *partitions(), *_requeue()]


def partitions() -> list[Finding]:
    """Partitions and their limits. A warning for a default time below the limit."""
    what = "partitions"
    found = commands.partitions()
    if not found:
        return [warn(what, "none can be seen", "ask for access: sacctmgr show assoc user=$USER")]
    seen = f"{len(found)}: {several([_describe(p) for p in found], 4)}"
    down = [p["PartitionName"] for p in found if p.get("State") not in ("UP", None)]
    if down:
        return [warn(what, seen, f"jobs in {several(down)} do not start (state not UP)")]
    short = [p["PartitionName"] for p in found if p.get("DefaultTime", "NONE") not in UNSET]
    if short:
        return [warn(what, seen, f"say --time in {several(short)}: without it a job gets the default time only")]
    return [ok(what, seen)]


def _describe(p: dict[str, str]) -> str:
    star = "*" if p.get("Default") == "YES" else ""
    default = p.get("DefaultTime", "NONE")
    by_default = "" if default in UNSET else f", {default} by default"
    limit = p.get("MaxTime", "UNLIMITED")
    longest = "no time limit" if limit in UNSET else f"at most {limit}"
    return f"{p['PartitionName']}{star} ({p.get('TotalNodes', '?')} nodes, {longest}{by_default})"


def _requeue() -> list[Finding]:
    """A finding if the cluster does not requeue jobs by default."""
    found = commands.settings()
    if found.get("JobRequeue") != "0":
        return []
    seen = "JobRequeue=0: a job comes back after a node's failure only where it says --requeue, as the sbatch files do"
    return [ok("requeue", f"{seen}; KillWait {found.get('KillWait', '?')}")]
