"""How a network is computed may change from one part of a run to the next; what it is may not."""

from __future__ import annotations

from pathlib import Path

import pytest

from ibq_scale.checkpoint.reading import Checkpoint
from ibq_scale.config.layers import resolve
from ibq_scale.config.run import ARRun, TokenizerRun
from ibq_scale.errors import UserError
from ibq_scale.supervise.compatible import check_same_run


def _run(*overrides: str) -> TokenizerRun:
    run = resolve("tokenizer/tiny", ["data.train=none", *overrides]).config
    assert isinstance(run, TokenizerRun)
    return run


def test_checkpointing_and_compilation_are_free_on_resume() -> None:
    saved = _run("model.activation_checkpointing=true").model_dump(mode="json")
    # A checkpoint of a release that knew nothing of them.
    for section, newer in (("model", "compile"), ("quantizer", "levels"), ("discriminator", "augment")):
        del saved[section][newer]
    checkpoint = Checkpoint(Path("run/step"), {"config": saved, "world_size": 1})
    check_same_run(_run("model.compile=true"), checkpoint)
    with pytest.raises(UserError, match="'model' has res_blocks=1 there and 2 here"):
        check_same_run(_run("model.res_blocks=2"), checkpoint)


def _ar(*overrides: str) -> ARRun:
    run = resolve("ar/tiny", ["data.train=none", *overrides]).config
    assert isinstance(run, ARRun)
    return run


def test_a_transformer_goes_on_computed_otherwise_and_not_as_another() -> None:
    saved = _ar("model.attention=sdpa_math").model_dump(mode="json")
    for newer in ("conditioning", "kv_heads", "qk_norm", "compile", "fp8"):
        del saved["model"][newer]
    checkpoint = Checkpoint(Path("run/step"), {"config": saved, "world_size": 1})
    check_same_run(_ar("model.activation_checkpointing=selective", "model.compile=true", "model.fp8=true"), checkpoint)
    with pytest.raises(UserError, match="'model' has kv_heads=None there and 2 here"):
        check_same_run(_ar("model.kv_heads=2"), checkpoint)
    with pytest.raises(UserError, match="'model' has conditioning=adaln there and prefix here"):
        check_same_run(_ar("model.conditioning=prefix"), checkpoint)
