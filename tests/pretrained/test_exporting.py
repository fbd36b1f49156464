"""What an exported model says of itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from ibq_scale.pretrained.exporting import CARD, export, save_model
from ibq_scale.pretrained.loading import load_ar, load_tokenizer

MANIFEST = {
    "step": 12_000,
    "samples": 3_072_000,
    "data_hash": "d" * 64,
    "config": {"name": "tok", "train": {"global_batch": 256}, "model": {"channels": 32}, "out": "/secret/place"},
    "metrics": {"loss": 1.25, "usage": 0.98765, "step_s": 0.5, "lr": 1e-4},
}


def test_cards_say_what_the_models_are_and_how_to_load_them(tokenizer_dir: Path, ar_dir: Path, tmp_path: Path) -> None:
    export(tokenizer_dir, tmp_path / "tok")
    export(ar_dir, tmp_path / "ar")
    tokenizer, ar = ((tmp_path / name / CARD).read_text() for name in ("tok", "ar"))
    assert "32 × 32 pixels" in tokenizer
    assert "64 codes × " in tokenizer
    assert f"`{load_tokenizer(tokenizer_dir).hash}`" in tokenizer
    assert 'ibq_scale.load_tokenizer("tok")' in tokenizer
    assert "2 blocks, 2 heads, width 32" in ar
    assert f"tokenizer `{load_ar(ar_dir).tokenizer_hash}`" in ar
    for card in (tokenizer, ar):
        assert card.startswith("---\nlibrary_name: ibq_scale\n")
        assert "## Training" not in card
        assert str(tokenizer_dir.parent) not in card


def test_a_runs_card_has_its_training_and_no_paths(tokenizer_dir: Path, tmp_path: Path) -> None:
    save_model(tmp_path / "m", load_tokenizer(tokenizer_dir), {"run": "tok"}, MANIFEST)
    card = (tmp_path / "m" / CARD).read_text()
    for row in ("optimizer steps | 12,000", "images seen | 3,072,000", "loss | 1.25", "usage | 0.9877"):
        assert f"| {row} |" in card
    assert "step_s" not in card
    assert "/secret" not in card


@pytest.mark.parametrize("ema", [False, True])
def test_an_imports_card_names_the_file(tokenizer_dir: Path, tmp_path: Path, ema: bool) -> None:
    save_model(tmp_path / "m", load_tokenizer(tokenizer_dir), {"imported_from": "IBQ.ckpt", "ema": ema})
    card = (tmp_path / "m" / CARD).read_text()
    assert f"Imported from `IBQ.ckpt`{', averaged weights' if ema else ''}." in card
