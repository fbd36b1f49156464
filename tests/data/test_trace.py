"""The trace names what the stream delivered."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest

from ibq_scale.cli.main import main
from ibq_scale.config.layers import resolve, to_yaml
from ibq_scale.data.sets import open_sets
from ibq_scale.data.stream import image_stream
from ibq_scale.data.trace import trace
from ibq_scale.errors import UserError


@pytest.fixture
def run_dir(dataset: str, tmp_path: Path) -> Path:
    """A run's record: 8 samples a step, micro-batches of 2."""
    overrides = [f"data.train={dataset}", "train.global_batch=8", "train.micro_batch=2", "train.steps=20"]
    config = resolve("tokenizer/tiny", [*overrides, "data.workers=0"]).config
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    (tmp_path / "environment.json").write_text(json.dumps({"world_size": 2}))
    return tmp_path


def test_the_samples_of_a_step_are_those_of_the_stream(run_dir: Path) -> None:
    config = resolve(str(run_dir / "config.yaml")).config
    found = trace(run_dir, 7, ranks=2)
    assert [sample.position for sample in found] == list(range(48, 56))
    for rank in (0, 1):
        stream = image_stream(
            open_sets(config.data, "images"), resolution=32, seed=0, rank=rank, world_size=2, micro_batch=2, start=48
        )
        seen = [
            (int(position), int(label))
            for batch in islice(stream, 2)
            for position, label in zip(batch.requests[:, 0], batch.labels, strict=True)
        ]
        assert seen == [(s.position, s.label) for s in found if s.rank == rank]
    # 24 samples an epoch: position 48 begins the third, and files are named as they were prepared.
    assert {sample.epoch for sample in found} == {2}
    assert all(str(sample.source).split("/")[0] in ("apples", "birds", "cars") for sample in found)


def test_the_command_takes_the_ranks_of_the_last_start(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "trace", str(run_dir), "--step", "1", "--json"]) == 0
    assert {sample["rank"] for sample in json.loads(capsys.readouterr().out)} == {0, 1}
    assert main(["data", "trace", str(run_dir), "--step", "1", "--ranks", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 9
    assert lines[0].split()[:2] == ["rank", "position"]


def test_what_cannot_be_traced_is_refused(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="steps 1 to 20"):
        trace(run_dir, 21, ranks=2)
    with pytest.raises(UserError, match="does not divide"):
        trace(run_dir, 1, ranks=3)
    with pytest.raises(UserError, match="no run directory"):
        trace(tmp_path / "nowhere", 1, ranks=1)
