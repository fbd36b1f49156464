"""What Slurm's answers are taken for."""

from __future__ import annotations

import pytest

from ibq_scale.doctor.slurm import slurm
from ibq_scale.doctor.tools import Subject
from ibq_scale.findings import Finding
from tests.doctor.conftest import Fake

UP = "Slurmctld(primary) at head0 is UP\n"
MAIN = (
    "PartitionName=main AllowGroups=ALL Default=YES DefaultTime=NONE MaxTime=7-00:00:00 State=UP TotalCPUs=8 "
    "TotalNodes=2 JobDefaults=(null)\n"
)
CONFIG = "JobRequeue              = 1\nKillWait                = 30 sec\n"


def _look(fake: Fake, ping: str = UP, partitions: str = MAIN, config: str = CONFIG) -> dict[str, Finding]:
    fake("sbatch", {"version": "slurm 22.05.8\n"})
    fake("scontrol", {"ping": ping, "partition": partitions, "config": config})
    return {line.name: line for line in slurm(Subject())}


def test_a_cluster(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    found = _look(fake)
    assert found == {
        "Slurm": Finding("ok", "Slurm", "slurm 22.05.8, controller head0"),
        "partitions": Finding("ok", "partitions", "1: main* (2 nodes, at most 7-00:00:00)"),
    }
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node[0-1]")
    assert _look(fake)["Slurm"].text.endswith("inside job 17 on node[0-1]")


def test_a_controller_that_is_down(fake: Fake) -> None:
    found = _look(fake, "Slurmctld(primary) at head0 is DOWN\n")
    assert found["Slurm"].level == "FAIL"
    assert "head0 is DOWN" in found["Slurm"].text


def test_limits_that_surprise(fake: Fake) -> None:
    short = MAIN + MAIN.replace("main", "debug").replace("DefaultTime=NONE", "DefaultTime=00:10:00").replace(
        "YES", "NO"
    )
    found = _look(fake, partitions=short, config=CONFIG.replace("= 1", "= 0"))
    assert found["partitions"].level == "warn"
    assert "debug (2 nodes, at most 7-00:00:00, 00:10:00 by default)" in found["partitions"].text
    assert "--time in debug" in found["partitions"].todo
    assert found["requeue"].text.startswith("JobRequeue=0")
    found = _look(fake, partitions=short.replace("State=UP", "State=DOWN"))
    assert "do not start" in found["partitions"].todo
    assert _look(fake, partitions="")["partitions"].level == "warn"


def test_tools_without_a_cluster(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    fake("sbatch", {"version": "slurm 22.05.8\n"})
    fake("scontrol", {"ping": "scontrol: fatal: Could not establish a configuration source\n"}, 1)
    (line,) = slurm(Subject())
    assert (line.level, "scontrol finds no cluster" in line.text) == ("warn", True)
    monkeypatch.setenv("PATH", "/nowhere")
    (line,) = slurm(Subject())
    assert (line.level, "there is no sbatch here" in line.text) == ("warn", True)
