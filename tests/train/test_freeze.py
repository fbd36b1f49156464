"""Tuning a part of a tokenizer: the rest keeps its bits, on any layout of ranks and through checkpoints."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ibq_scale.config.layers import resolve
from ibq_scale.errors import UserError
from ibq_scale.generate.images import check_pair
from ibq_scale.pretrained.exporting import export
from ibq_scale.pretrained.loading import load_tokenizer
from ibq_scale.pretrained.models import Tokenizer
from tests import nursery
from tests.train.runs import words

SHORT = ("data.workers=0", "train.checkpoint_every=2", "ema_decay=0.9")
TUNED = ("train.freeze=[encoder,codebook]", *SHORT)


def _trained(*command: str) -> None:
    done = nursery.run(command)
    assert done.returncode == 0, done.stderr


def _parts(tokenizer: Tokenizer) -> dict[str, torch.Tensor]:
    return tokenizer.state_dict()


@pytest.fixture(scope="module")
def first(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run to start from."""
    run = tmp_path_factory.mktemp("first") / "run"
    _trained(*words(dataset, run, "train.steps=2", *SHORT, "--ranks", "1"))
    return run


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(("config", "precision"), [("zero1", "bf16"), ("zero2", "fp32"), ("zero3", "bf16")])
def test_frozen_parts_keep_their_bits(dataset: str, first: Path, tmp_path: Path, config: str, precision: str) -> None:
    tuned = tmp_path / "tuned"
    settings = (f"init={first}", *TUNED, f"deepspeed.config={config}", f"train.precision={precision}")
    _trained(*words(dataset, tuned, *settings, "train.steps=2", "--ranks", "2"))
    # Resumed without ZeRO or under ZeRO-1, on one rank.
    _trained(*words(dataset, tuned, *settings, "train.steps=4", "--ranks", "1"))
    before, now = load_tokenizer(first), load_tokenizer(tuned)
    moved = {name for name, x in _parts(before).items() if not torch.equal(x, _parts(now)[name])}
    assert moved
    assert {name.split(".")[1] for name in moved} <= {"decoder", "post_quant_conv"}
    assert now.hash != before.hash
    assert now.has_codes_of(before.hash)
    export(tuned, tmp_path / "exported")
    _keeps_the_pair(before, load_tokenizer(tmp_path / "exported"))


def _keeps_the_pair(before: Tokenizer, now: Tokenizer) -> None:
    """A transformer on codes of `before` decodes by `now`, and none of another tokenizer does."""
    ar: Any = SimpleNamespace(tokenizer_hash=before.hash, config=SimpleNamespace(codebook_size=64))
    check_pair(ar, now)
    ar.tokenizer_hash = "0" * 64
    with pytest.raises(UserError, match="trained on codes"):
        check_pair(ar, now)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_frozen_decoder_leaves_the_rest_to_train(dataset: str, first: Path, tmp_path: Path) -> None:
    tuned = tmp_path / "tuned"
    keys = (f"init={first}", "train.freeze=decoder", *SHORT, "train.steps=2")
    _trained(*words(dataset, tuned, *keys, "--ranks", "1"))
    before, now = load_tokenizer(first), load_tokenizer(tuned)
    moved = {name for name, x in _parts(before).items() if not torch.equal(x, _parts(now)[name])}
    assert {name.split(".")[1] if "." in name else name for name in moved} == {"encoder", "quant_conv", "codebook_KD"}
    assert now.codes_of == ()
    refused = nursery.run(words(dataset, tuned, f"init={first}", *SHORT, "train.steps=6", "--ranks", "1"))
    assert refused.returncode == 2
    assert "train.freeze was ['decoder']" in refused.stderr


def test_what_cannot_train_is_refused() -> None:
    with pytest.raises(UserError, match="nothing is left to train"):
        resolve("tokenizer/tiny", ["train.freeze=[encoder,codebook,decoder]"])
    with pytest.raises(UserError, match="revive_after"):
        resolve("tokenizer/tiny", ["train.freeze=codebook", "quantizer.kind=vq", "quantizer.revive_after=5"])
    with pytest.raises(UserError, match=r"train\.freeze is for tokenizers"):
        resolve("ar/tiny", ["train.freeze=decoder"])
