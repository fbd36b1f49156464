"""``submit``, ``jobs`` and ``cancel`` as a user types them, against scripts that play Slurm."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ibq_scale.cli.main import main
from ibq_scale.cluster import checks
from ibq_scale.cluster.render import Script
from ibq_scale.config.layers import load_resolved
from tests.cluster.fake_slurm import FakeSlurm, install

CPU = ["--nodes", "2", "--gpus-per-node", "0", "--time", "01:00:00"]


@pytest.fixture
def slurm(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    # What takes seconds has tests of its own.
    quick = [entry for entry in checks.CHECKS if entry[0] not in ("memory", "disk")]
    monkeypatch.setattr(checks, "CHECKS", quick)
    return install(tmp_path_factory.mktemp("slurm"), monkeypatch)


@pytest.fixture
def words(dataset: str, tmp_path: Path) -> list[str]:
    return ["submit", "tokenizer/tiny", f"data.train={dataset}", f"out={tmp_path / 'run'}", *CPU]


def test_a_job_runs_from_its_snapshot(
    slurm: FakeSlurm, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 0
    run = tmp_path / "run"
    folder = run / "submitted/001"
    assert slurm.calls == [f"sbatch --parsable {folder}/job.sbatch {folder}/config.yaml out={run}"]
    said = capsys.readouterr().out
    for part in (
        "submitted 101:",
        f"tail -F {run}/logs/job-101.log",
        f"ibq-scale jobs {run}",
        f"ibq-scale cancel {run}",
    ):
        assert part in said
    assert (run / "logs").is_dir(), "Slurm makes no folder for a log"
    script = Script((folder / "job.sbatch").read_text())
    assert (script.option("comment"), script.option("output")) == (f"ibq-scale {run}", f"{run}/logs/job-%j.log")
    assert (script.option("nodes"), script.option("ntasks-per-node"), script.option("gpus-per-node")) == (
        "2",
        "1",
        None,
    )
    assert f'export PYTHONPATH={folder}/code"${{PYTHONPATH:+:$PYTHONPATH}}"\n' in script.text
    config = load_resolved(folder / "config.yaml")
    assert (config.out, config.name) == (str(run), "tokenizer-tiny")
    assert json.loads((folder / "submission.json").read_text())["jobs"] == ["101"]
    # The queue shows it now, and a second one is refused.
    slurm.queue(f"101|PENDING|2||Priority|{script.option('comment')}")
    assert main(words) == 2
    assert "has job 101 (pending) already" in capsys.readouterr().err
    assert not (run / "submitted/002").exists()


def test_each_job_of_a_chain_waits_for_the_one_before(
    slurm: FakeSlurm, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--chain", "3", "--json"]) == 0
    first, second, third = slurm.calls
    assert "--dependency" not in first
    assert "--dependency=afterany:101 " in second
    assert "--dependency=afterany:102 " in third
    document = json.loads(capsys.readouterr().out)
    assert document["jobs"] == ["101", "102", "103"]
    assert {check["level"] for check in document["checks"]} == {"ok"}


def test_a_chain_that_breaks_names_what_was_submitted(
    slurm: FakeSlurm, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.limit(102)
    assert main([*words, "--chain", "3"]) == 2
    assert "too many jobs; submitted before that: 101, 102" in capsys.readouterr().err
    assert json.loads((tmp_path / "run/submitted/001/submission.json").read_text())["jobs"] == ["101", "102"]


def test_a_job_that_slurm_refuses_leaves_no_snapshot(
    slurm: FakeSlurm, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.limit(100)
    assert main(words) == 2
    assert "too many jobs" in capsys.readouterr().err
    assert not (tmp_path / "run/submitted/001").exists()


def test_a_dry_run_prints_the_file_and_leaves_nothing(
    slurm: FakeSlurm, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--dry-run"]) == 0
    captured = capsys.readouterr()
    assert captured.out == slurm.tested, "and Slurm was asked about that very file"
    assert all(line.startswith("ok") for line in captured.err.splitlines())
    assert slurm.calls == []
    assert not (tmp_path / "run").exists()
    assert main([*words, "--dry-run", "train.global_batch=15"]) == 2
    captured = capsys.readouterr()
    assert captured.out.startswith("#!/bin/bash")
    assert captured.err.splitlines()[-1] == "ibq-scale: not submitted: fix batch (FAIL, above)"


def test_flags_win_over_the_profile_and_that_over_the_file(
    slurm: FakeSlurm, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = slurm.folder / ".config/ibq-scale/clusters.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(
        "profiles:\n  alps: {partition: gpu, qos: low, time: '02:00:00', sbatch: [reservation=a],\n"
        "    setup: [module load x], env: {NCCL_IB_HCA: mlx5}, srun: ['--container-image=/a b.sqsh'],\n"
        "    inside: [apptainer, exec, --nv, $X/y.sif], ibq_scale: /opt/ibq-scale}"
    )
    assert main([*words, "--cluster", "alps", "--qos", "high", "--sbatch", "exclusive", "--dry-run"]) == 0
    script = Script(capsys.readouterr().out)
    got = {key: script.option(key) for key in ("partition", "qos", "time", "mem", "reservation", "exclusive")}
    assert got == {
        "partition": "gpu",
        "qos": "high",
        "time": "01:00:00",
        "mem": Script.of("train_tokenizer").option("mem"),
        "reservation": "a",
        "exclusive": "",
    }
    for line in (
        "module load x",
        'export NCCL_IB_HCA="mlx5"',
        'SRUN+=("--container-image=/a b.sqsh")',
        'INSIDE=(apptainer exec --nv "$X/y.sif")',
        "IBQ_SCALE=/opt/ibq-scale",
    ):
        assert f"\n{line}\n" in script.text


def test_the_signal_comes_before_the_grace_time(
    slurm: FakeSlurm, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--dry-run", "train.grace=599.5"]) == 0
    assert Script(capsys.readouterr().out).option("signal") == "USR1@630"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--nodes", "0"], "--nodes must be at least 1"),
        (["--chain", "0"], "--chain must be at least 1"),
        (["--gpus-per-node", "-1"], "--gpus-per-node must be at least 0"),
        (["--cluster", "alps"], "does not exist: write there"),
        (["--sbatch", "-p gpu"], "not an sbatch option"),
        (["out=a%b"], "choose a path without"),
        (["data.train=???"], "leaves data.train open"),
        (["optimizer.lr=fast"], "optimizer.lr"),
    ],
)
def test_misuse(
    slurm: FakeSlurm, words: list[str], capsys: pytest.CaptureFixture[str], more: list[str], said: str
) -> None:
    assert main([*words, *([f"--sbatch={more[1]}"] if more[0] == "--sbatch" else more)]) == 2
    assert said in capsys.readouterr().err
    assert slurm.calls == []


def test_jobs_and_cancel(
    slurm: FakeSlurm, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 0
    run = str(tmp_path / "run")
    slurm.queue(f"101|PENDING|2||Priority|ibq-scale {run}")
    capsys.readouterr()
    assert main(["jobs", run]) == 0
    header, line = capsys.readouterr().out.splitlines()
    assert header.split() == ["run", "state", "step", "rate", "ETA", "checkpoint", "job", "nodes"]
    assert line.split() == [run, "queued", "(Priority)", "101"]
    assert main(["jobs", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["steps"] == 300
    assert main(["cancel", run, "--wait"]) == 0
    assert "taken out of the queue: 101" in capsys.readouterr().out
    assert slurm.calls[-1] == "scancel 101"
    assert main(["cancel", run]) == 2
    assert "no run is active" in capsys.readouterr().err
    assert main(["cancel", f"{run}-absent"]) == 2


def _submit(*words: str) -> list[str]:
    """Of the other commands, whose words stand behind ``--``."""
    return ["submit", *CPU, "--ntasks-per-node", "2", *words]


def test_an_array_that_samples(
    slurm: FakeSlurm, tokenizer_dir: Path, ar_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to = tmp_path / "images"
    command = ["sample", str(ar_dir), "--tokenizer", str(tokenizer_dir), "--to", str(to), "--per-class", "4"]
    words = _submit("--array", "3", "--json")
    assert main([*words, "--dry-run", "--", *command]) == 0
    document = json.loads(capsys.readouterr().out)
    assert {check["name"]: check["level"] for check in document["checks"]} == dict.fromkeys(
        ("ranks", "model", "output", "slurm"), "ok"
    )
    assert document["script"] == slurm.tested
    assert not to.exists()
    assert main([*words, "--", *command]) == 0
    document = json.loads(capsys.readouterr().out)
    folder = to / "submitted/001"
    assert slurm.calls == [f"sbatch --parsable {folder}/job.sbatch {' '.join(command[1:])}"]
    assert document["logs"] == [f"{to}/submitted/job-101_0.log"]
    script = Script((folder / "job.sbatch").read_text())
    assert (script.option("array"), script.option("output")) == ("0-2", f"{to}/submitted/job-%A_%a.log")
    assert (script.option("nodes"), script.option("signal")) == ("2", Script.of("sample").option("signal"))
    assert f"export PYTHONPATH={folder}/code" in script.text
    assert (folder / "code/ibq_scale/__init__.py").is_file()


def test_what_writes_to_no_folder_runs_the_code_as_it_is(
    slurm: FakeSlurm,
    tokenizer_dir: Path,
    dataset: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["evaluate", "reconstruction", str(tokenizer_dir), dataset, "--json"]
    assert main([*_submit(), "--", *command]) == 0
    (call,) = slurm.calls
    assert call.startswith("sbatch --parsable /")
    assert call.endswith(f"/job.sbatch {' '.join(command[1:])}")
    said = capsys.readouterr().out
    assert "no folder for a copy" in said
    assert f"tail -F {tmp_path}/ibq-evaluate-101.log" in said
    assert "scancel 101" in said
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--array", "2", "--", "evaluate", "compare", "a"], "--array is for tokenize and sample: evaluate"),
        (["--", "tokenize", "TOK", "DATA", "--to", "a%b"], "choose a path without"),
        (["--", "sample", "TOK", "--tokenizer", "TOK", "--to", "x"], "kind tokenizer, ar is needed"),
        (["--", "sample", "AR", "--tokenizer", "nosuch", "--to", "x"], "nosuch does not exist"),
        (["--", "sample", "AR", "--tokenizer", "TOK", "--to", "x", "--per-class", "0"], "--per-class must be at least"),
        (["--", "tokenize", "TOK", "nosuch", "--to", "x"], "has no manifest.json"),
        (["--", "evaluate", "generation", "nosuch", "--reference", "DATA"], "nosuch does not exist"),
        (["--gpus-per-node", "4", "--", "tokenize", "TOK", "DATA", "--to", "x"], "2 ranks on 4 GPUs of a node"),
    ],
)
def test_misuse_of_other_commands(
    slurm: FakeSlurm,
    tokenizer_dir: Path,
    ar_dir: Path,
    dataset: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"TOK": str(tokenizer_dir), "AR": str(ar_dir), "DATA": dataset}
    assert main(_submit(*(names.get(word, word) for word in words))) == 2
    assert said in capsys.readouterr().err
    assert slurm.calls == []


def test_a_word_that_the_command_does_not_know_ends_as_it_would_there(
    slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(_submit("--", "sample", "ar", "--per-clas", "4", "--wrong"))
    assert end.value.code == 2
    assert "usage: ibq-scale" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("profile", "more"),
    [
        ("srun: ['--export=ALL,WANDB_API_KEY=hunter2']", ()),
        ("inside: [env, HF_TOKEN=hunter2]", ()),
        ("sbatch: ['export=ALL,WANDB_API_KEY=hunter2']", ()),
        ("partition: gpu", ("--sbatch", "export=ALL,WANDB_API_KEY=hunter2")),
    ],
)
def test_a_secret_stands_in_no_line_of_a_jobs_script(
    slurm: FakeSlurm, words: list[str], capsys: pytest.CaptureFixture[str], profile: str, more: tuple[str, ...]
) -> None:
    path = slurm.folder / ".config/ibq-scale/clusters.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(f"profiles:\n  alps: {{{profile}}}\n")
    assert main([*words, "--cluster", "alps", *more, "--dry-run"]) == 2
    said = "".join(capsys.readouterr())
    assert "is a secret, and batch scripts are kept" in said
    assert "hunter2" not in said
