"""DeepSpeed's JSON is completed from the run and never contradicts it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ibq_scale.config.deepspeed import deepspeed_config, find_config
from ibq_scale.config.layers import resolve
from ibq_scale.errors import UserError


def _run(*overrides: str):  # type: ignore[no-untyped-def]
    return resolve("tiny", overrides, "tokenizer").config


@pytest.mark.parametrize("name", ["zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"])
def test_each_shipped_config_has_its_stage_and_fp32_reduction(name: str) -> None:
    config = deepspeed_config(_run(f"deepspeed.config={name}"), 2)
    assert config["zero_optimization"]["stage"] == int(name[4])
    assert ("offload_optimizer" in config["zero_optimization"]) == name.endswith("_offload")
    assert config["communication_data_type"] == config["data_types"]["grad_accum_dtype"] == "fp32"


def test_batch_fields_follow_from_the_run() -> None:
    config = deepspeed_config(_run("train.global_batch=32", "train.micro_batch=4"), 2)
    assert config["train_batch_size"] == 32
    assert config["train_micro_batch_size_per_gpu"] == 4
    assert config["gradient_accumulation_steps"] == 4
    assert config["gradient_clipping"] == 0.0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"train_batch_size": 8}, "train.global_batch"),
        ({"gradient_clipping": 1.0}, "optimizer.grad_clip"),
        ({"zero_optimisation": {"stage": 1}}, "did you mean 'zero_optimization'"),
        ([], "one JSON object"),
    ],
)
def test_contradicting_or_unknown_keys_are_refused(content: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        deepspeed_config(_run(f"deepspeed.config={path}"), 1)


def test_overrides_go_on_top_without_replacing_their_section() -> None:
    config = deepspeed_config(_run("deepspeed.overrides.zero_optimization.reduce_bucket_size=1000"), 2)
    assert config["zero_optimization"]["reduce_bucket_size"] == 1000
    assert config["zero_optimization"]["stage"] == 2


def test_an_unknown_name_lists_what_there_is() -> None:
    with pytest.raises(UserError, match="zero0, zero1, zero2"):
        find_config("zero9")


def test_bf16_wants_a_stage_that_keeps_fp32_weights() -> None:
    with pytest.raises(UserError, match="take zero1"):
        deepspeed_config(_run("deepspeed.config=zero0", "train.precision=bf16"), 2)


def test_zero3_is_not_compiled() -> None:
    with pytest.raises(UserError, match=r"set model\.compile=false"):
        deepspeed_config(_run("deepspeed.config=zero3", "model.compile=true"), 2)
    with pytest.raises(UserError, match=r"set model\.compile=false"):
        deepspeed_config(
            resolve("ar/3b", ["model.compile=true", "deepspeed.config=zero3", "train.micro_batch=16"]).config, 2
        )


def test_a_stage_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UserError, match="ZeRO stage 4 does not exist"):
        deepspeed_config(_run("deepspeed.overrides={zero_optimization: {stage: 4}}"), 2)


@pytest.mark.parametrize("name", ["zero0", "zero1", "zero2", "zero3"])
def test_one_rank_in_fp32_shares_nothing(name: str) -> None:
    config = deepspeed_config(_run(f"deepspeed.config={name}"), 1)
    assert config["zero_optimization"]["stage"] == 0
    assert config["data_types"]["grad_accum_dtype"] == "fp32"


@pytest.mark.parametrize("changes", [("train.precision=bf16",), ("deepspeed.config=zero2_offload",)])
def test_one_rank_keeps_the_stage_that_holds_fp32_weights_or_offloads(changes: tuple[str, ...]) -> None:
    assert deepspeed_config(_run(*changes), 1)["zero_optimization"]["stage"] == 2
