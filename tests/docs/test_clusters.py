"""The files for Kubernetes and SkyPilot know the exit codes, and a container's first process keeps them."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from ibq_scale.cli.main import _parse
from ibq_scale.cluster.requeue import REASONS
from ibq_scale.config.layers import resolve
from ibq_scale.supervise.notify import EVENTS
from tests.docs.pages import ROOT
from tests.train.runs import ENDLESS, lines, wait_until, words

FOLDER = ROOT / "docs/clusters"
AGAIN = {code for code, event in EVENTS.items() if event == "requeue"}


def _read(name: str) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((FOLDER / name).read_text())
    return document


def _check(command: list[str]) -> Any:
    """The config of a command that parses."""
    assert command[0] == "ibq-scale"
    args = _parse(command[1:])
    return resolve(args.source, args.overrides, args.task).config


def test_a_kubernetes_job_ends_or_goes_on_by_the_exit_code() -> None:
    job = _read("kubernetes-job.yaml")
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    rules = {rule["action"]: rule["onExitCodes"] for rule in spec["podFailurePolicy"]["rules"] if "onExitCodes" in rule}
    assert {action: rule["values"] for action, rule in rules.items()} == {"FailJob": [2], "Ignore": [75]}
    assert all(rule["operator"] == "In" and rule["containerName"] == container["name"] for rule in rules.values())
    # What podFailurePolicy asks for.
    assert pod["restartPolicy"] == "Never"
    config = _check(container["command"])
    assert pod["terminationGracePeriodSeconds"] > config.train.grace
    assert [port["containerPort"] for port in container["ports"]] == [config.metrics.port]
    assert config.metrics.host == "0.0.0.0"
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert set(mounts.values()) == {volume["name"] for volume in pod["volumes"]}
    assert {"/dev/shm", config.data.cache_dir, str(Path(config.run_dir).parent)} == mounts.keys()


def test_a_sky_job_recovers_by_the_exit_code() -> None:
    job = _read("skypilot.yaml")
    recovery = job["resources"]["job_recovery"]
    assert set(recovery["recover_on_exit_codes"]) == AGAIN == REASONS.keys() - {70}
    config = _check(shlex.split(job["run"]))
    assert config.train.mirror
    assert {target.removeprefix("$") for target in config.notify} <= job["secrets"].keys()


@pytest.mark.long
@pytest.mark.distributed
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs namespaces of processes")
def test_a_containers_first_process_keeps_the_exit_codes(dataset: str, tmp_path: Path) -> None:
    """The launcher is process 1 of its namespace, without an init: SIGTERM saves, a killed rank is a failure."""
    command = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-m", "ibq_scale"]
    command += [*words(dataset, tmp_path / "run", *ENDLESS), "--ranks", "2"]
    for number, code in ((signal.SIGTERM, 75), (signal.SIGKILL, 128 + signal.SIGKILL)):
        before = len(lines(tmp_path / "run"))
        container = subprocess.Popen(command, cwd=ROOT)
        try:
            wait_until(lambda n=before: len(lines(tmp_path / "run")) > n + 1)  # type: ignore[misc]
            (first,) = psutil.Process(container.pid).children()
            ranks = first.children()
            (first if number == signal.SIGTERM else ranks[1]).send_signal(number)
            assert container.wait(300) == code
            assert not any(rank.is_running() for rank in ranks)
        finally:
            container.kill()
