"""The adaptive generator weight under engines equals VQGAN's formula in plain torch; so does every way to compute."""

from __future__ import annotations

import pytest

from tests.ranks import run_ranks
from tests.train.test_tokenizer_task import _assert_same, _plain, _run, _train

ADAPTIVE = ("loss.adversarial=adaptive", "loss.adversarial_weight=0.5")


@pytest.mark.slow
@pytest.mark.distributed
def test_on_every_zero_stage() -> None:
    runs = {f"zero{stage}": _run(stage, "train.global_batch=4", *ADAPTIVE) for stage in (0, 1, 2)}
    runs["accumulation"] = _run(2, "train.global_batch=8", *ADAPTIVE)
    runs["checkpointing"] = _run(2, "train.global_batch=4", "model.activation_checkpointing=true", *ADAPTIVE)
    plain = {name: _plain(runs[name], calls) for name, calls in (("zero0", 1), ("accumulation", 2))}
    _, constant = _plain(_run(0, "train.global_batch=4", ADAPTIVE[1]))
    weight = "model.autoencoder.decoder.conv_out.weight"
    _, adaptive = plain["zero0"]
    assert float((adaptive[weight] - constant[weight]).detach().abs().max()) > 1e-3, "the weight changed nothing"
    expected = {name: plain["accumulation" if name == "accumulation" else "zero0"] for name in runs}
    found = run_ranks(_train, 2, runs, {name: draw for name, (draw, _) in expected.items()})
    for rank in (0, 1):
        for name in runs:
            _assert_same(found[rank][name], expected[name][1])


@pytest.mark.slow
@pytest.mark.distributed
def test_compiled_regions_under_an_engine() -> None:
    run = _run(2, "train.global_batch=4", "model.compile=true", "model.activation_checkpointing=true", *ADAPTIVE)
    draw, expected = _plain(run)
    (found, _) = run_ranks(_train, 2, {"compiled": run}, {"compiled": draw})
    _assert_same(found["compiled"], expected)
