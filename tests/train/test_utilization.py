"""MFU: only against a peak that is known, and of the FLOPs that a plan counts."""

from __future__ import annotations

import pytest
import torch

from ibq_scale.config.layers import resolve
from ibq_scale.distributed.world import World
from ibq_scale.scaling.plan import Machine, make_plan
from ibq_scale.train.utilization import Utilization

GPUS = World(0, 16, 0, torch.device("cuda", 0))


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["tokenizer/tiny", "ar/tiny"])
def test_it_is_the_share_of_all_gpus_peak(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    config = resolve(preset, ["data.train=x", "train.precision=bf16", "train.global_batch=32"]).config
    config = config.model_copy(update={"train": config.train.model_copy(update={"micro_batch": 2})})
    known = Utilization.of(config, GPUS)
    assert known is not None
    plan = make_plan(config, Machine(gpus=8, nodes=2, device="h100"), mfu=0.5)
    assert plan.time.images_per_s is not None
    assert known.mfu(plan.time.images_per_s) == pytest.approx(0.5)


def test_nothing_is_made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    bf16, fp32 = (resolve("ar/tiny", ["data.train=x", f"train.precision={p}"]).config for p in ("bf16", "fp32"))
    assert Utilization.of(bf16, World(0, 1, 0, torch.device("cpu"))) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA Unheard Of")
    assert Utilization.of(bf16, GPUS) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    assert Utilization.of(fp32, GPUS) is None
