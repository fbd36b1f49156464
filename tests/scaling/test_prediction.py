"""A plan beside what the run measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ibq_scale.cli.main import main
from ibq_scale.config.layers import resolve, to_yaml
from ibq_scale.scaling.plan import Machine, make_plan
from ibq_scale.scaling.prediction import PlanRatios, Prediction

CONFIG = resolve(
    "ar/tiny",
    ["train.precision=bf16", "train.global_batch=64", "train.micro_batch=16", "data.train=codes", "out=run"],
).config
H100 = {"device": "NVIDIA H100 80GB HBM3", "gpu_memory": 85_000_000_000}


def _run(folder: Path, environment: dict[str, object], seconds: list[float]) -> Path:
    (folder / "config.yaml").write_text(to_yaml(CONFIG))
    (folder / "environment.json").write_text(json.dumps({"world_size": 4, "ranks_per_node": 2} | environment))
    lines = [{"step": 10 * (i + 1), "step_s": s, "memory_bytes": 3e9} for i, s in enumerate(seconds)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_lines_after_the_first_have_the_ratios() -> None:
    ratios = PlanRatios(Prediction(step_s=0.5, peak_bytes=4e9))
    values = {"step_s": 1.0, "memory_bytes": 3e9}
    assert ratios.of(values) == {}
    assert ratios.of(values) == {"plan_time_ratio": 2.0, "plan_memory_ratio": 0.75}
    unknown = PlanRatios(Prediction.for_run(CONFIG, Machine(2)))
    assert [unknown.of(values), unknown.of(values)] == [{}, {}]


def test_plan_of_a_run_prints_predicted_beside_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = _run(tmp_path, H100, [9.0, 0.2, 0.3, 0.2])
    plan = make_plan(CONFIG, Machine(2, 2, "H100", 85e9), mfu=0.5)
    assert plan.roofline is not None
    assert main(["plan", str(run), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["machine"]["gpus"], document["machine"]["nodes"]) == (2, 2)
    assert document["predicted"] == {"step_s": plan.roofline.total, "peak_bytes": plan.memory.peak - 2e9}
    measured = document["measured"]
    assert (measured["step_s"], measured["first"], measured["last"]) == (0.2, 20, 40)
    assert measured["plan_time_ratio"] == pytest.approx(0.2 / plan.roofline.total)
    assert measured["plan_memory_ratio"] == pytest.approx(3e9 / (plan.memory.peak - 2e9))
    assert main(["plan", str(run)]) == 0
    assert f"{measured['plan_time_ratio']:.3f}  plan_time_ratio" in capsys.readouterr().out


def test_a_device_without_a_prediction_is_told_as_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = _run(tmp_path, {"device": "x86_64", "cpu": "CPU of this test, 1 thread"}, [9.0, 0.2])
    assert main(["plan", str(run)]) == 0
    assert capsys.readouterr().out.count("no prediction for this device") == 2
    (run / "metrics.jsonl").write_text("")
    assert main(["plan", str(run)]) == 0
    assert "nothing is measured yet" in capsys.readouterr().out
    (run / "environment.json").unlink()
    assert main(["plan", str(run)]) == 2
    assert "the run has not started yet" in capsys.readouterr().err
