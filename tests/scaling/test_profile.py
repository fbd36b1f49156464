"""Measured rates and links: kept by device, used by plan and auto, and left out where they do not fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ibq_scale.cli.main import main
from ibq_scale.config.layers import resolve
from ibq_scale.scaling.auto import settle
from ibq_scale.scaling.flops import training_flops
from ibq_scale.scaling.plan import Machine, make_plan
from ibq_scale.scaling.profile import (
    LinkRate,
    MachineProfile,
    StepRate,
    profile_path,
    profile_to_extend,
    read_profile,
    write_profile,
)

H100 = "NVIDIA H100 80GB HBM3"
RUN = resolve("ar/tiny", ["train.precision=bf16", "train.global_batch=64", "train.micro_batch=auto"]).config
FLOPS = training_flops(RUN)
RATE = StepRate("ar", "bf16", False, 1, 16, FLOPS, FLOPS, 100.0, "2026-11-30")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def _kept(*rates: StepRate, links: tuple[LinkRate, ...] = ()) -> MachineProfile:
    write_profile(replace(profile_to_extend(H100), rates=rates, links=links))
    found = read_profile("h100")
    assert found is not None
    return found


def test_a_profile_is_of_the_device_by_any_of_its_names() -> None:
    assert read_profile(H100) is None
    assert _kept(RATE) == read_profile(H100) == MachineProfile("H100", (RATE,))
    assert read_profile("h200") is None
    again = profile_to_extend(H100).with_rate(replace(RATE, images_per_s=120.0))
    assert [rate.images_per_s for rate in again.rates] == [120.0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"versions": {"torch": "1.0"}}, "it was measured with torch 1.0, here is "),
        ({"device": "A100"}, "it is of 'A100'"),
        ({"rates": [{"task": "ar"}]}, "it has no 'precision'"),
        ({"rates": 7}, "not iterable"),
        ({"links": [{"ranks": -8, "nodes": 1}]}, "ranks is -8"),
    ],
)
def test_a_file_that_does_not_fit_is_left_out_with_a_line(
    change: dict[str, object], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _kept(RATE)
    path = profile_path("h100")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    capsys.readouterr()
    assert read_profile("h100") is None
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"ibq-scale: {path} is not used: ")
    assert said in line


def test_a_damaged_file_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    _kept(RATE)
    profile_path("h100").write_text('{"format": 1')
    assert read_profile("h100") is None
    assert "is not used" in capsys.readouterr().err


def test_plan_names_the_measured_rate(capsys: pytest.CaptureFixture[str]) -> None:
    _kept(RATE)
    words = ["train.precision=bf16", "train.global_batch=64", "train.micro_batch=32", "--device", "h100"]
    assert main(["plan", "ar/tiny", *words]) == 0
    assert "100 images/s; rate: measured here 2026-11-30 (micro-batch 16, 1 rank)" in capsys.readouterr().out
    # A rate of another model is none.
    assert main(["plan", "ar/tiny", *words, "model.depth=1"]) == 0
    assert "ASSUMED" in capsys.readouterr().out


def test_the_fastest_measured_micro_batch_is_chosen() -> None:
    machine = Machine(1, 1, "h100")
    assert settle(RUN, machine)[0].train.micro_batch == 64
    slower = replace(RATE, micro_batch=64, images_per_s=50.0)
    settled, choices = settle(RUN, replace(machine, profile=_kept(RATE, slower)))
    assert settled.train.micro_batch == 16
    assert "rate: measured here 2026-11-30" in next(c.reason for c in choices if c.key == "train.micro_batch")
    # Without a GPU too, where the constant would be 4.
    assert settle(RUN, Machine(profile=_kept(RATE, slower)))[0].train.micro_batch == 16


def test_measured_links_are_the_fabric() -> None:
    inner = LinkRate(8, 1, 200e9, 1e-5, "2026-11-30")
    outer = LinkRate(16, 2, 160e9, 1e-5, "2026-11-30")
    machine = Machine(8, 2, "h100", profile=_kept(links=(inner, outer)))
    fabric = machine.fabric
    assert fabric is not None
    assert (fabric.link, fabric.net) == pytest.approx((200e9 / 0.8, 160e9 / 0.8 / 8))
    assert replace(machine, net=1e9).fabric.net == 1e9  # type: ignore[union-attr]
    run = settle(RUN.model_copy(update={"train": RUN.train.model_copy(update={"global_batch": 64})}), machine)[0]
    slow, assumed = (make_plan(run, m, mfu=0.5).roofline for m in (machine, replace(machine, profile=None)))
    assert slow is not None
    assert assumed is not None
    assert slow.exchange > assumed.exchange
