"""W&B and TensorBoard are told what the run's own files hold, and cannot end it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ibq_scale.config.layers import resolve
from ibq_scale.supervise.dashboards import Histogram
from ibq_scale.supervise.metrics import MetricsLog
from ibq_scale.train.usage import by_powers_of_two

VALUES = {"loss": 1.5, "samples_per_s": 10.0, "step_s": 0.5, "data_wait": 0.01, "memory_bytes": 2e9}
PICTURE = torch.full((3, 5, 7), 200, dtype=torch.uint8)
CHOICES = Histogram([5, 0, 3], [0, 1, 2, 4])


def _told(run_dir: Path, *overrides: str, step: int = 10, start: int = 0) -> None:
    config = resolve("tokenizer/tiny", ["data.train=x", *overrides]).config
    log = MetricsLog(run_dir, config, start)
    log.write(step, 16 * step, VALUES, ("loss",), ["usage fell"], {"code_choices": CHOICES})
    log.show(step, {"reconstructions": PICTURE})
    log.close()


def _steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (path / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_wandb_offline_has_everything_under_one_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.setenv("WANDB_SILENT", "true")
    (tmp_path / "environment.json").write_text('{"host": "node7"}')
    began: list[dict[str, Any]] = []
    init = wandb.init
    monkeypatch.setattr(wandb, "init", lambda **k: began.append(k) or init(**k))
    _told(tmp_path, "wandb.mode=offline", "wandb.group=sizes")
    _told(tmp_path, "wandb.mode=offline", "wandb.group=sizes", step=20, start=10)
    assert began[0]["id"] == began[1]["id"] == (tmp_path / "wandb_id").read_text()
    assert began[0]["group"] == "sizes"
    assert began[0]["config"]["environment"] == {"host": "node7"}
    assert began[0]["config"]["quantizer"]["codebook_size"] == 1024
    pictures = sorted((tmp_path / "wandb").glob("offline-run-*/files/media/images/reconstructions_*.png"))
    assert [path.name.split("_")[1] for path in pictures] == ["10", "20"]
    for path in (*pictures, tmp_path / "images/reconstructions-00000010.png"):
        with Image.open(path) as image:
            assert image.size == (7, 5)
            assert image.getpixel((0, 0)) == (200, 200, 200)


class _Run:
    """W&B's run, which refuses the first lines."""

    def __init__(self, refusals: int) -> None:
        self.refusals = refusals
        self.logged: list[dict[str, Any]] = []
        self.alerts: list[str] = []

    def log(self, values: dict[str, Any], step: int) -> None:
        if self.refusals:
            self.refusals -= 1
            raise ConnectionError("no dashboard today")
        self.logged.append(values)

    def alert(self, title: str, text: str, level: str) -> None:
        self.alerts.append(f"{title}: {text}")

    def finish(self) -> None:
        raise ConnectionError("nor at the end")


@pytest.mark.slow
def test_an_outage_costs_lines_and_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import wandb

    run = _Run(refusals=2)
    monkeypatch.setattr(wandb, "init", lambda **_: run)
    _told(tmp_path, "wandb.mode=online")
    assert _steps(tmp_path) == [10]
    # The values and the histogram were refused, the alarm and the picture were not.
    assert run.alerts == ["step 10: usage fell"]
    assert [list(values) for values in run.logged] == [["reconstructions"]]
    assert caplog.text.count("W&B refused a line") == 2, "once for the first two, once for the end"


def test_without_a_network_at_the_start_it_is_written_to_be_sent_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import wandb

    run, modes = _Run(refusals=0), []

    def init(mode: str, **_: object) -> _Run:
        modes.append(mode)
        if mode == "online":
            raise ConnectionError("no route")
        return run

    monkeypatch.setattr(wandb, "init", init)
    _told(tmp_path, "wandb.mode=online")
    assert modes == ["online", "offline"]
    assert "'wandb sync' sends it later" in capsys.readouterr().err
    assert run.logged[0]["loss"] == 1.5
    assert "alarms" not in run.logged[0]

    def broken(**_: object) -> None:
        raise ConnectionError("nothing works")

    monkeypatch.setattr(wandb, "init", broken)
    _told(tmp_path, "wandb.mode=online", step=20, start=10)
    assert _steps(tmp_path) == [10, 20]


@pytest.mark.slow
def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _told(tmp_path, "tensorboard=true")
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    [loss] = events.Scalars("loss")
    assert (loss.step, loss.value) == (10, 1.5)
    assert "step" not in events.Tags()["scalars"]
    [picture] = events.Images("reconstructions")
    assert (picture.width, picture.height) == (7, 5)
    [choices] = events.Histograms("code_choices")
    assert choices.histogram_value.num == 8
    assert events.Tags()["tensors"] == ["alarms/text_summary"]


def test_a_dashboard_that_is_not_installed_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    _told(tmp_path, "tensorboard=true")
    assert "pip install 'ibq-scale[tensorboard]'" in capsys.readouterr().err
    assert _steps(tmp_path) == [10]
    assert not (tmp_path / "tensorboard").exists()


def test_counts_by_powers_of_two() -> None:
    counts_K = torch.tensor([0, 0, 1, 2, 3, 4, 7, 8, 1023])
    histogram = by_powers_of_two(counts_K)
    assert histogram.edges == [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
    assert histogram.counts == [2, 1, 2, 2, 1, 0, 0, 0, 0, 0, 1]
    assert by_powers_of_two(torch.zeros(4, dtype=torch.int64)) == Histogram([4], [0, 1])
