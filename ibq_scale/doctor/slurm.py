"""Slurm as it is seen from here: its tools, its controller, its partitions and their limits."""

from __future__ import annotations

import os
import re
import shutil

from ibq_scale.doctor.lines import Line, Subject, ask, fail, first, ok, several, warn

UNSET = ("NONE", "UNLIMITED", "INFINITE")


def slurm(subject: Subject) -> list[Line]:
    """All of it."""
    what = "Slurm"
    if shutil.which("sbatch") is None or shutil.which("scontrol") is None:
        return [warn(what, "no sbatch on PATH", "needed to submit jobs only; training here works without it")]
    code, said = ask("scontrol", "ping")
    if code and "configuration source" in said:
        todo = "right where there is no cluster; else SLURM_CONF names its slurm.conf"
        return [warn(what, "its tools are here, but know of no cluster", todo)]
    version = first(ask("sbatch", "--version")[1])
    up = re.findall(r"Slurmctld\(\w+\) at (\S+) is UP", said)
    if code or not up:
        todo = "jobs can be neither submitted nor requeued now: tell the administrators (or is SLURM_CONF wrong?)"
        return [fail(what, f"{version}, the controller does not answer: {_reason(said)}", todo)]
    job = os.environ.get("SLURM_JOB_ID")
    inside = f"; inside job {job} on {os.environ.get('SLURM_JOB_NODELIST', '?')}" if job else ""
    return [ok(what, f"{version}, controller {', '.join(up)}{inside}"), *partitions(), *_requeue()]


def _reason(said: str) -> str:
    """The last error says what the first ones led to."""
    return said.strip().splitlines()[-1].strip() if said.strip() else "no word"


def partitions() -> list[Line]:
    """Each with its limits; those where a job without --time gets less than the partition allows."""
    what = "partitions"
    code, said = ask("scontrol", "show", "partition", "--oneliner")
    found = [dict(re.findall(r"(\w+)=(\S*)", line)) for line in said.splitlines() if "PartitionName=" in line]
    if code or not found:
        return [
            warn(
                what, f"none can be seen: {first(said) or 'no word'}", "ask for access: sacctmgr show assoc user=$USER"
            )
        ]
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


def _requeue() -> list[Line]:
    """Only what stands in the way of a run's coming back."""
    said = ask("scontrol", "show", "config")[1]
    wait = re.search(r"^KillWait\s*=\s*(\d+)", said, re.MULTILINE)
    if re.search(r"^JobRequeue\s*=\s*0", said, re.MULTILINE):
        seen = "JobRequeue=0: a job comes back after a node's failure only where it says --requeue"
        return [ok("requeue", f"{seen}, as the sbatch files do" + (f"; KillWait {wait[1]} s" if wait else ""))]
    return []
