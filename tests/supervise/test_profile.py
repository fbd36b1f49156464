"""A profile records the steps and ranks that are asked for, and what held the memory where it did not suffice."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path

import pytest
import torch

from ibq_scale.config.run import TrainConfig
from ibq_scale.distributed.world import World
from ibq_scale.supervise.profile import StepProfile
from tests.train.runs import each_rank, lines

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def _events(path: Path) -> list[dict[str, object]]:
    with gzip.open(path, "rt") as file:
        events: list[dict[str, object]] = json.load(file)["traceEvents"]
    return events


def _products(path: Path) -> int:
    return sum(event.get("name") == "aten::mm" for event in _events(path))


def _steps(profile: StepProfile, numbers: range) -> None:
    x = torch.ones(4, 4)
    for number in numbers:
        with profile.step(number):
            x = x @ x


@pytest.mark.slow
def test_steps_from_the_first_to_the_last_are_recorded(tmp_path: Path) -> None:
    for rank in range(2):
        profile = StepProfile(tmp_path, (2, 4), (1,), World(rank, 2, rank, CPU))
        _steps(profile, range(1, 7))
        profile.close()
    (trace,) = (tmp_path / "profile").iterdir()
    assert trace.name == "rank-00001.steps-2-4.json.gz"
    assert _products(trace) == 3
    assert any(event.get("name") == "[memory]" for event in _events(trace))


@pytest.mark.slow
def test_a_run_that_begins_and_ends_between_records_what_it_has(tmp_path: Path) -> None:
    profile = StepProfile(tmp_path, (2, 9), (0,), World(0, 1, 0, CPU))
    _steps(profile, range(5, 7))
    profile.close()
    assert _products(tmp_path / "profile/rank-00000.steps-5-6.json.gz") == 2


def test_nothing_is_recorded_where_nothing_is_asked(tmp_path: Path) -> None:
    profile = StepProfile(tmp_path, None, (0,), World(0, 1, 0, CPU))
    _steps(profile, range(1, 3))
    profile.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_trace_that_cannot_be_written_ends_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "profile").touch()
    with caplog.at_level(logging.WARNING):
        _steps(StepProfile(tmp_path, (1, 1), (0,), World(0, 1, 0, CPU)), range(1, 2))
    assert "could not be written" in caplog.text


@pytest.fixture
def snapshots(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Calls of torch's recorder of a GPU's memory, which a CPU build has not."""
    calls: list[object] = []
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **_: calls.append("history"))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: calls.append(Path(path).write_bytes(b"")))
    return calls


def _exhaust(profile: StepProfile) -> None:
    with profile.out_of_memory():
        raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("steps", [None, (5, 6)])
def test_memory_that_ran_out_is_told(tmp_path: Path, snapshots: list[object], steps: tuple[int, int] | None) -> None:
    """Of every rank; where one records it, with the history."""
    profile = StepProfile(tmp_path, steps, (3,), World(3, 8, 3, GPU))
    with pytest.raises(torch.OutOfMemoryError) as raised:
        _exhaust(profile)
    path = tmp_path / "profile/rank-00003.out-of-memory.memory.pickle"
    assert path.is_file()
    assert str(path) in raised.value.__notes__[0]
    assert ("history" in snapshots) == (steps is not None)


def test_other_errors_leave_no_snapshot(tmp_path: Path, snapshots: list[object]) -> None:
    profile = StepProfile(tmp_path, None, (0,), World(0, 1, 0, GPU))
    with pytest.raises(RuntimeError), profile.out_of_memory():
        raise RuntimeError
    assert snapshots == []


def test_steps_that_are_out_of_order_are_refused() -> None:
    with pytest.raises(ValueError, match=r"the first step \(5\) comes after the last \(3\)"):
        TrainConfig(steps=10, profile=(5, 3))


@pytest.mark.slow
@pytest.mark.distributed
def test_a_run_is_profiled_on_the_rank_that_is_named(dataset: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    more = ("train.steps=3", "data.workers=0", "train.profile=[2,3]", "train.profile_ranks=[1]")
    with each_rank(dataset, run, *more) as ranks:
        for rank in ranks:
            rank.communicate()
            assert rank.wait() == 0, rank.said()
    assert [line["step"] for line in lines(run)] == [1, 2, 3]
    (trace,) = (run / "profile").iterdir()
    assert trace.name == "rank-00001.steps-2-3.json.gz"
    names = {str(event.get("name")) for event in _events(trace)}
    assert {"aten::convolution_backward", "ibq_scale::ibq_forward", "gloo:all_reduce"} <= names
    assert {"rank 1, step 2", "rank 1, step 3", "wait for data", "optimizer", "codebook's optimizer"} <= names
    assert {"encoder", "quantizer", "decoder", "losses of the reconstruction", "generator's backward"} <= names
