"""A job comes back as long as its attempts bring the run on, and never where they cannot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ibq_scale.checkpoint.reading import MANIFEST, manifest_text
from ibq_scale.cli.main import main
from ibq_scale.cluster.requeue import after
from ibq_scale.distributed.failed_nodes import Faults
from ibq_scale.distributed.failures import FOLDER, leave
from ibq_scale.errors import UserError
from ibq_scale.supervise.attempts import ATTEMPTS, Attempt, add_unnoticed, read_attempts

BUDGET = 3


@pytest.fixture(autouse=True)
def job(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of a batch script."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node[0-3]")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)


def _save(run: Path, step: int) -> None:
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / MANIFEST).write_text(manifest_text({"format_version": 3, "step": step, "samples": step, "files": {}}))


def _after(run: Path, code: int, seconds: float = 3600.0) -> Attempt:
    return after(run, code, seconds, BUDGET).attempt


@pytest.mark.parametrize(
    ("code", "seconds", "again"),
    [
        (0, 9e3, False),
        (2, 9e3, False),
        (75, 5, True),
        (70, 9e3, True),
        (71, 5, True),
        (69, 130, True),
        (76, 5, True),
        (1, 5, False),
        (1, 9e3, True),
    ],
)
def test_the_first_attempt_without_a_new_step(tmp_path: Path, code: int, seconds: float, again: bool) -> None:
    assert _after(tmp_path, code, seconds).again is again


def test_an_early_crash_behind_a_new_step_comes_back(tmp_path: Path) -> None:
    _save(tmp_path, 10)
    attempt = _after(tmp_path, 137, 60.0)
    assert (attempt.again, attempt.step_before, attempt.step_after) == (True, 0, 10)


def test_attempts_without_a_new_step_are_limited_and_progress_resets_that(tmp_path: Path) -> None:
    _save(tmp_path, 10)
    again = [_after(tmp_path, 75).again for _ in range(3)]
    _save(tmp_path, 20)
    again += [_after(tmp_path, 70).again for _ in range(4)]
    # The first of each saved a step, two without one may follow; the third is not followed.
    assert again == [True, True, True, True, True, True, False]
    assert read_attempts(tmp_path)[-1]["why"] == "it hung, and ended itself, and 3 attempts in a row saved no new step"


def test_a_job_that_somebody_submitted_anew_has_its_own_attempts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [_after(tmp_path, 75).again for _ in range(3)] == [True, True, False]
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    assert _after(tmp_path, 75).again


def test_a_failed_node_is_left_out_unless_most_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Faults({"node2": "rank 9: cuda:1 cannot be used"}, of=4).record(tmp_path)
    attempt = _after(tmp_path, 71, 30.0)
    assert (attempt.again, attempt.excluded) == (True, ("node2",))
    assert "node2 (rank 9: cuda:1 cannot be used)" in attempt.why
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert _after(tmp_path, 71, 30.0).excluded == (), "what an earlier attempt found is not this one's"
    Faults(dict.fromkeys(("node0", "node1", "node3"), "no room"), of=4).record(tmp_path)
    assert _after(tmp_path, 71, 30.0).excluded == ()


def test_a_failed_node_counts_whatever_code_its_killed_ranks_gave(tmp_path: Path) -> None:
    """Of a rank that never came srun says that it killed it, and its code is the highest."""
    Faults({"node2": "rank 9: did not come within 600 s"}, of=4).record(tmp_path)
    attempt = _after(tmp_path, 137, 600.0)
    assert (attempt.code, attempt.again, attempt.excluded) == (71, True, ("node2",))


def _begins(run: Path, restart: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
    add_unnoticed(run)


def test_what_slurm_started_again_by_itself_has_a_line_too_and_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_unnoticed(tmp_path)
    assert read_attempts(tmp_path) == []
    assert _after(tmp_path, 75).again
    _begins(tmp_path, 1, monkeypatch)
    _save(tmp_path, 10)
    # Once more, and another time before anything could be written.
    _begins(tmp_path, 3, monkeypatch)
    found = [(a["restart"], a["code"], a["step_before"], a["step_after"]) for a in read_attempts(tmp_path)]
    assert found == [(0, 75, 0, 0), (1, None, 0, 10), (2, None, 10, 10)]
    add_unnoticed(tmp_path)
    assert len(read_attempts(tmp_path)) == 3
    for restart, again in ((3, True), (5, True), (6, False)):
        _begins(tmp_path, restart, monkeypatch)
        assert _after(tmp_path, 75).again is again


@pytest.mark.parametrize(("code", "dropped"), [(0, ("8", "9")), (2, ("8", "9")), (1, ("8", "9")), (75, ())])
def test_a_chain_ends_with_what_will_not_mend(tmp_path: Path, code: int, dropped: tuple[str, ...]) -> None:
    folder = tmp_path / "submitted/002"
    folder.mkdir(parents=True)
    (folder / "submission.json").write_text(json.dumps({"jobs": ["6", "7", "8", "9"]}))
    assert after(tmp_path, code, 30.0, BUDGET).dropped == dropped


def test_a_cancelled_job_does_not_say_that_it_goes_back_and_leaves_its_chain(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "submitted/001"
    folder.mkdir(parents=True)
    (folder / "submission.json").write_text(json.dumps({"jobs": ["7", "8"]}))
    words = ["job-ended", str(tmp_path), "--seconds", "30", "--code"]
    assert main([*words, "75", "--stays"]) == 0
    said = capsys.readouterr()
    assert said.out == "end 75 \n"
    assert "the job ends: it was stopped by a signal" in said.err
    assert read_attempts(tmp_path)[0]["again"] is False
    assert main([*words, "2"]) == 0
    said = capsys.readouterr()
    assert said.out == "end 2 8\n"
    assert "its chained jobs are taken out of the queue: 8" in said.err


def test_a_line_that_was_cut_short_is_left_out(tmp_path: Path) -> None:
    _after(tmp_path, 75)
    with (tmp_path / ATTEMPTS).open("a") as f:
        f.write('{"job": "7", "res\n')
    assert _after(tmp_path, 75).again
    assert not _after(tmp_path, 75).again
    assert len(read_attempts(tmp_path)) == 3


def test_the_batch_script_reads_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Faults({"node2": "no room"}, of=4).record(tmp_path)
    words = ["job-ended", str(tmp_path), "--seconds", "30", "--code"]
    assert main([*words, "71"]) == 0
    assert capsys.readouterr().out == "requeue 71 node2\n"
    (tmp_path / "failed_nodes.json").unlink()
    assert main([*words, "1"]) == 0
    said = capsys.readouterr()
    assert said.out == "end 1 \n"
    assert "failed with code 1 after 30 s, before it saved a new step" in said.err


def test_the_code_is_that_of_the_rank_which_failed_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """srun's is the highest, of a rank that it killed: after that one the job would come back."""
    monkeypatch.setenv(FOLDER, str(tmp_path / "failures"))
    (tmp_path / "failures").mkdir()
    assert leave(UserError("step 8 could not be saved: make room"), UserError.exit_code)
    assert main(["job-ended", str(tmp_path), "--seconds", "7200", "--code", "143"]) == 0
    said = capsys.readouterr()
    assert said.out == "end 2 \n"
    assert said.err.splitlines()[0] == "ibq-scale: step 8 could not be saved: make room"
    assert read_attempts(tmp_path)[0]["code"] == 2
    assert main(["job-ended", str(tmp_path), "--seconds", "7200", "--code", "143"]) == 0
    assert capsys.readouterr().out == "requeue 143 \n", "what ranks had to say is of one attempt"


def test_a_job_that_trains_nothing_ends_with_the_first_causes_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path / "failures"))
    (tmp_path / "failures").mkdir()
    assert leave(UserError("no GPU answers"), 71)
    assert main(["step-ended", "--code", "143"]) == 0
    assert capsys.readouterr() == ("71\n", "ibq-scale: no GPU answers\n")
    assert main(["step-ended", "--code", "9"]) == 0
    assert capsys.readouterr() == ("9\n", "")
    assert not list(tmp_path.iterdir())
