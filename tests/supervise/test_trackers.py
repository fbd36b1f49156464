"""MLflow and trackio get a run's lines under one run after each resume. The modules here have the calls of theirs."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from ibq_scale.config.layers import resolve
from ibq_scale.errors import UserError
from ibq_scale.supervise.dashboards import TRACKERS
from ibq_scale.supervise.metrics import MetricsLog

VALUES = {"loss": 1.5, "samples_per_s": 10.0, "step_s": 0.5, "data_wait": 0.01, "memory_bytes": 2e9}


def _told(run_dir: Path, name: str) -> None:
    """Two starts of one run."""
    for step in (10, 20):
        log = MetricsLog(run_dir, resolve("tokenizer/tiny", ["data.train=x", f"dashboards=[{name}]"]).config, step - 10)
        log.write(step, 16 * step, VALUES, ("loss",), ["usage fell"])
        log.show(step, {"reconstructions": torch.full((3, 5, 7), 200, dtype=torch.uint8)})
        log.close()


class _Client:
    """MLflow's client, as of 3.17."""

    calls: list[tuple[Any, ...]]

    def __init__(self, tracking_uri: str) -> None:
        self.calls.append(("uri", tracking_uri))

    def get_experiment_by_name(self, name: str) -> object:
        return SimpleNamespace(experiment_id="1") if any(call[0] == "experiment" for call in self.calls) else None

    def create_experiment(self, name: str, artifact_location: str | None = None) -> str:
        self.calls.append(("experiment", name, artifact_location))
        return "1"

    def create_run(self, experiment_id: str, run_name: str) -> object:
        self.calls.append(("run", experiment_id, run_name))
        return SimpleNamespace(info=SimpleNamespace(run_id="abc"))

    def update_run(self, run_id: str, status: str) -> None:
        self.calls.append(("update", run_id, status))

    def log_batch(self, run_id: str, metrics: Any = (), params: Any = ()) -> None:
        assert len(params) <= 100
        self.calls.append(("batch", run_id, {m[0]: (m[1], m[3]) for m in metrics}, dict(params)))

    def log_image(self, run_id: str, image: Any, key: str, step: int) -> None:
        self.calls.append(("image", run_id, image.shape, key, step))

    def set_tag(self, run_id: str, key: str, value: str) -> None:
        self.calls.append(("tag", run_id, key, value))

    def set_terminated(self, run_id: str) -> None:
        self.calls.append(("end", run_id))


def test_mlflow_has_one_run_over_two_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(_Client, "calls", calls, raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    mlflow = ModuleType("mlflow")
    vars(mlflow).update(MlflowClient=_Client, entities=SimpleNamespace(Metric=lambda *a: a, Param=lambda *a: a))
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    _told(tmp_path, "mlflow")
    assert calls[0] == ("uri", f"sqlite:///{tmp_path}/mlflow.db")
    assert [call[:2] for call in calls if call[0] in ("run", "update", "end")] == [
        ("run", "1"),
        ("end", "abc"),
        ("update", "abc"),
        ("end", "abc"),
    ]
    batches = [call for call in calls if call[0] == "batch"]
    params = {key: value for call in batches for key, value in call[3].items()}
    assert params["quantizer.codebook_size"] == "1024"
    assert [call[2]["loss"] for call in batches if call[2]] == [(1.5, 10), (1.5, 20)]
    assert [call[2:] for call in calls if call[0] == "image"] == [
        ((5, 7, 3), "reconstructions", 10),
        ((5, 7, 3), "reconstructions", 20),
    ]
    assert ("tag", "abc", "alarm at step 20", "usage fell") in calls
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.example")
    _told(tmp_path, "mlflow")
    assert calls[-1] == ("end", "abc")
    assert ("uri", "http://mlflow.example") in calls


def test_trackio_resumes_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[dict[str, Any]] = []
    logged: list[tuple[dict[str, Any], int]] = []
    alerts: list[str] = []
    run = SimpleNamespace(
        log=lambda values, step: logged.append((values, step)),
        alert=lambda title, text: alerts.append(f"{title}: {text}"),
        finish=lambda: alerts.append("end"),
    )
    module = ModuleType("trackio")
    vars(module).update(init=lambda **k: begun.append(k) or run, Image=lambda array: array.shape)
    monkeypatch.setitem(sys.modules, "trackio", module)
    _told(tmp_path, "trackio")
    assert [(k["name"], k["resume"]) for k in begun] == [("tokenizer-tiny", "allow")] * 2
    assert begun[0]["config"]["quantizer.codebook_size"] == 1024
    assert [(values.get("loss"), step) for values, step in logged if "loss" in values] == [(1.5, 10), (1.5, 20)]
    assert ({"reconstructions": (5, 7, 3)}, 20) in logged
    assert alerts == ["step 10: usage fell", "end", "step 20: usage fell", "end"]


@pytest.mark.parametrize("name", list(TRACKERS))
def test_a_tracker_that_is_not_installed_is_told(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    config = resolve("tokenizer/tiny", ["data.train=x", f"dashboards=[{name}]"]).config
    with pytest.raises(UserError, match=f"pip install 'ibq-scale\\[{name}\\]'"):
        TRACKERS[name](tmp_path, config)
