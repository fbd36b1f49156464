"""``submit``, ``jobs`` and ``cancel`` on a real Slurm."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ibq_scale.checkpoint.reading import whole_checkpoints
from ibq_scale.cli.main import main
from tests.samples import SMALL_AR, write_codes
from tests.services.slurm import Cluster, skip_without, slurm

pytestmark = [pytest.mark.slow, pytest.mark.services]
PATIENCE = 300.0
PROFILE = """
default: here
profiles:
  here:
    {partition: main, gpus_per_node: 0, ntasks_per_node: 1, cpus_per_task: 1, time: 00:10:00, ibq_scale: IBQ_SCALE,
     env: {CUDA_VISIBLE_DEVICES: ""}}
"""
SMALL = [*SMALL_AR, "data.lanes=3", "train.grace=20", "train.checkpoint_every=1000000"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes, a profile that fits them, and data; this process's environment leads there."""
    skip_without()
    folder = tmp_path_factory.mktemp("submit")
    write_codes(folder / "codes")
    program = folder / "ibq-scale"
    # The environment of the tests may stand on no PATH.
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m ibq_scale "$@"\n')
    program.chmod(0o755)
    (folder / "clusters.yaml").write_text(PROFILE.replace("IBQ_SCALE", str(program)))
    with pytest.MonkeyPatch.context() as patch, slurm(tmp_path_factory.mktemp("slurm") / "s", 2) as running:
        patch.setenv("IBQ_SCALE_CLUSTERS", str(folder / "clusters.yaml"))
        for name, value in running.environment.items():
            patch.setenv(name, value)
        patch.chdir(folder)
        yield running


@pytest.fixture
def submit(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Runs a command that prints JSON; the document, and where it fails what it said."""

    def submit(*words: str, code: int = 0) -> Any:
        capsys.readouterr()
        assert main([*words, *(["--json"] if "--" not in words else [])]) == code, capsys.readouterr().err
        said = capsys.readouterr()
        return json.loads(said.out) | {"said": said.err} if words[0] == "submit" else json.loads(said.out)[0]

    return submit


def _until(condition: Callable[[], bool], log: Callable[[], str]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, log()
        time.sleep(0.3)


def test_a_run_with_a_hostile_name_is_submitted_followed_cancelled_and_goes_on(
    cluster: Cluster, submit: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A name from someone else, of which a shell would run three parts.
    run = tmp_path / "a run; $(touch hostile) `touch hostile` '&touch hostile"
    words = ["submit", "ar/tiny", "data.train=codes", f"out={run}", *SMALL, "--nodes", "2"]

    def log() -> str:
        return "".join(path.read_text() for path in run.glob("logs/job-*.log"))

    def state() -> Any:
        return submit("jobs", str(run))

    first = submit(*words, "train.steps=1000000", "--chain", "2", "--sbatch", "hold")
    assert {check["level"] for check in first["checks"]} == {"ok"}, first["checks"]
    assert (state()["state"], state()["jobs"]) == ("queued", first["jobs"])
    # What is there when the job starts is the snapshot, not the checkout: only the snapshot says this.
    (run / "submitted/001/code/COMMIT").write_text("of the snapshot\n")
    cluster.command("scontrol", "release", *first["jobs"])
    _until(lambda: (state()["step"] or 0) > 0, log)
    assert json.loads((run / "environment.json").read_text())["git"] == "of the snapshot"
    now = state()
    assert (now["state"], now["nodes"], now["steps"]) == ("running", "node[0-1]", 1000000)

    refused = submit(*words, "train.steps=1000000", code=2)
    assert f"has job {first['jobs'][0]} (running), {first['jobs'][1]} (pending) already" in refused["said"]

    assert main(["cancel", str(run), "--wait"]) == 0, log()
    saved = whole_checkpoints(run / "checkpoints")[-1].step
    now = state()
    assert (now["state"], now["step"], now["jobs"]) == ("stopped", saved, [])
    record = cluster.job(first["jobs"][0])
    assert (record["JobState"], record["ExitCode"], record["Restarts"]) == ("FAILED", "75:0", "0"), (
        "and never came back"
    )
    assert "the job ends: it was stopped by a signal" in log()
    assert "goes back" not in log()

    second = submit(*words, f"train.steps={saved + 2}", "--chain", "2")
    assert any(check["text"] == f"goes on from step {saved} of {saved + 2}" for check in second["checks"])
    _until(lambda: not state()["jobs"], log)
    now = state()
    assert (now["state"], now["step"]) == ("finished", saved + 2), log()
    ends = [cluster.job(job)["JobState"] for job in second["jobs"]]
    assert ends == ["COMPLETED", "CANCELLED"], "the second of the chain would find nothing to do"
    assert f"its chained jobs are taken out of the queue: {second['jobs'][1]}" in log()
    assert not [*Path.cwd().rglob("hostile"), *tmp_path.rglob("hostile")], "a part of a name was run"


def test_what_slurm_would_refuse_is_not_submitted(submit: Callable[..., Any], tmp_path: Path) -> None:
    words = ["submit", "ar/tiny", "data.train=codes", f"out={tmp_path / 'run'}", *SMALL, "train.steps=10"]
    refused = submit(*words, "--nodes", "2", "--partition", "nosuch", code=2)
    levels = {check["name"]: check["level"] for check in refused["checks"]}
    assert levels.pop("slurm") == "FAIL"
    assert set(levels.values()) == {"ok"}
    assert "invalid partition specified: nosuch" in refused["said"]
    assert submit(*words, "--nodes", "3", code=2)["jobs"] == [], "there are two nodes"
    assert not (tmp_path / "run").exists()


def test_an_array_that_samples_is_submitted_and_runs_from_its_snapshot(
    cluster: Cluster, submit: Callable[..., Any], tokenizer_dir: Path, ar_dir: Path, tmp_path: Path
) -> None:
    to = tmp_path / "images"
    words = ["sample", str(ar_dir), "--tokenizer", str(tokenizer_dir), "--to", str(to), "--per-class", "2"]
    sampled = submit("submit", "--nodes", "1", "--array", "2", "--json", "--", *words, "--batch", "2")
    assert {check["level"] for check in sampled["checks"]} == {"ok"}, sampled["checks"]
    (job,) = sampled["jobs"]

    def log() -> str:
        return "".join(path.read_text() for path in to.glob("submitted/job-*.log"))

    states: dict[str, str] = {}

    def ended() -> bool:
        states.update({task: cluster.job(f"{job}_{task}")["JobState"] for task in "01"})
        return all(state in ("COMPLETED", "FAILED") for state in states.values())

    _until(ended, log)
    assert set(states.values()) == {"COMPLETED"}, log()
    assert (to / "samples.npz").is_file()
    assert f"{to}/submitted/001/code" in (to / "submitted/001/job.sbatch").read_text()
