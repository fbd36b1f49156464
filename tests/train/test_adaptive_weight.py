"""The adaptive generator weight under engines equals VQGAN's formula in plain torch; so does every way to compute."""

from __future__ import annotations

import pytest

from tests.ranks import run_ranks
from tests.train.reference import assert_same, plain_tokenizer, tokenizer_run, train_tokenizers

ADAPTIVE = ("loss.adversarial=adaptive", "loss.adversarial_weight=0.5")


@pytest.mark.slow
@pytest.mark.distributed
def test_on_every_zero_stage() -> None:
    configs = ("zero0", "zero1", "zero2", "zero3", "zero3_offload")
    runs = {config: tokenizer_run(config, "train.global_batch=4", *ADAPTIVE) for config in configs}
    runs["accumulation"] = tokenizer_run("zero2", "train.global_batch=8", *ADAPTIVE)
    for config in ("zero2", "zero3"):
        words = ("train.global_batch=4", "model.activation_checkpointing=true", *ADAPTIVE)
        runs[f"checkpointing, {config}"] = tokenizer_run(config, *words)
    plain = {name: plain_tokenizer(runs[name], calls) for name, calls in (("zero0", 1), ("accumulation", 2))}
    _, constant = plain_tokenizer(tokenizer_run("zero0", "train.global_batch=4", ADAPTIVE[1]))
    weight = "autoencoder.decoder.conv_out.weight"
    _, adaptive = plain["zero0"]
    assert float((adaptive[weight] - constant[weight]).detach().abs().max()) > 1e-3, "the weight changed nothing"
    expected = {name: plain["accumulation" if name == "accumulation" else "zero0"] for name in runs}
    found = run_ranks(train_tokenizers, 2, runs, {name: draw for name, (draw, _) in expected.items()})[0]
    for name in runs:
        assert_same(found[name], expected[name][1], name)


@pytest.mark.slow
@pytest.mark.distributed
def test_compiled_regions_under_an_engine() -> None:
    run = tokenizer_run(
        "zero2", "train.global_batch=4", "model.compile=true", "model.activation_checkpointing=true", *ADAPTIVE
    )
    draw, expected = plain_tokenizer(run)
    found = run_ranks(train_tokenizers, 2, {"compiled": run}, {"compiled": draw})[0]
    assert_same(found["compiled"], expected, "compiled")
