"""The largest fitting micro-batch fits, the next one does not, and each named switch makes a run fit."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ibq_scale.cli.main import main
from ibq_scale.config.layers import resolve
from ibq_scale.scaling.fitting import budget_of, largest_micro_batch, switches

WORDS = ["train.precision=bf16", "train.global_batch=64"]


def _peak(*words: str, world: int = 1) -> int:
    return budget_of(resolve("ar/tiny", [*WORDS, *words]).config, world).peak


@pytest.mark.slow
def test_the_largest_micro_batch() -> None:
    run = resolve("ar/tiny", WORDS).config
    assert _peak("train.micro_batch=16") < _peak("train.micro_batch=32")
    between = (_peak("train.micro_batch=16") + _peak("train.micro_batch=32")) / 2
    assert largest_micro_batch(run, 1, between) == 16
    assert largest_micro_batch(run, 1, _peak("train.micro_batch=64")) == 64
    # Of two ranks each has half of the batch.
    assert largest_micro_batch(run, 2, 80e9) == 32
    assert largest_micro_batch(run, 1, 1e9) == 0


@pytest.mark.slow
def test_switches_that_are_named_make_it_fit() -> None:
    run = resolve("ar/tiny", [*WORDS, "train.micro_batch=32"]).config
    memory = 0.5 * (_peak("train.micro_batch=16") + _peak("train.micro_batch=32"))
    found = switches(run, 1, memory)
    assert found
    for switch in found:
        assert _peak("train.micro_batch=32", *switch.words) == switch.peak <= memory
    assert ("train.micro_batch=16",) in [switch.words for switch in found]
    assert switches(run, 1, 1e9) == []


@pytest.mark.slow
def test_states_that_are_too_large_need_more_than_a_smaller_batch() -> None:
    words = ["model.depth=12", "model.width=1024", "model.heads=8", *WORDS, "train.micro_batch=1"]
    run = resolve("ar/tiny", words).config
    zero1, zero3 = (
        budget_of(resolve("ar/tiny", [*words, f"deepspeed.config={name}"]).config, 8).peak
        for name in ("zero1", "zero3")
    )
    assert zero3 < zero1
    found = switches(run, 8, (zero1 + zero3) / 2)
    assert found
    assert all(switch.words[0].startswith("deepspeed.config=") for switch in found)


def _plan(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["plan", *words, "--json"]) == 0
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    return document


@pytest.mark.slow
def test_a_plan_says_what_fits_and_what_is_sent(capsys: pytest.CaptureFixture[str]) -> None:
    plan = _plan(capsys, "ar/tiny", *WORDS, "--device", "h100", "--gpus", "8")
    assert (plan["largest_micro_batch"], plan["switches"]) == (8, [])
    gradients, weights = plan["communication"]
    parameters = sum(plan["parameters"].values())
    # Reduce-scattered, and not all-reduced.
    assert gradients["sent"] == pytest.approx(7 / 8 * 4 * parameters, rel=0.01)
    assert weights["sent"] == pytest.approx(7 / 8 * 2 * parameters, rel=0.01)
    assert plan["roofline"]["total"] > plan["roofline"]["passes"] > 0
    assert plan["storage_bytes"] == 3 * plan["checkpoint_bytes"]
    slow = _plan(capsys, "ar/tiny", *WORDS, "--device", "h100", "--gpus", "4", "--nodes", "2", "--net", "1")
    assert slow["roofline"]["exchange"] > plan["roofline"]["exchange"]
    assert _plan(capsys, "ar/tiny", "--device", "h100")["roofline"] is None, "the peak is bf16's"


@pytest.mark.slow
def test_a_plan_names_the_switch(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["ar/tiny", *WORDS, "train.micro_batch=64", "--device", "h100", "--memory", "2.2"]
    plan = _plan(capsys, *words)
    assert plan["memory"]["fits"] is False
    assert plan["switches"]
    assert main(["plan", *words]) == 0
    said = capsys.readouterr().out
    assert f"would fit with {plan['switches'][0]['words'][0]}" in said
    assert f"largest fitting micro-batch: {plan['largest_micro_batch']}" in said


@pytest.mark.slow
def test_a_plan_tells_of_a_better_group_for_the_codebook(capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "tokenizer/tiny",
        "quantizer.codebook_size=65536",
        "train.micro_batch=2",
        "--device",
        "h100",
        "--gpus",
        "8",
    ]
    many = [*words, "train.global_batch=1024", "--nodes", "64"]
    (note,) = [n for n in _plan(capsys, *many, "codebook_group=0")["notes"] if "codebook" in n]
    assert note.startswith("the codebook over groups of 512 GPUs takes")
    better = note.partition("codebook_group=")[2].split()[0]
    assert int(better) < 512
    assert not [n for n in _plan(capsys, *many, f"codebook_group={better}")["notes"] if "codebook" in n]
    (chosen,) = [choice["value"] for choice in _plan(capsys, *many)["auto"] if choice["key"] == "codebook_group"]
    assert chosen == int(better)
    assert not [n for n in _plan(capsys, *words, "train.global_batch=16")["notes"] if "codebook over" in n]
