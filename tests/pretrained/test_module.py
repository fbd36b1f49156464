"""Models as plain modules: loaded by folder or address, changed, saved again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ibq_scale
from ibq_scale.errors import UserError
from ibq_scale.pretrained.hub import address_of


def test_a_tokenizer_is_a_module_that_is_changed_and_saved(tokenizer_dir: Path, tmp_path: Path) -> None:
    tokenizer = ibq_scale.Tokenizer.from_pretrained(tokenizer_dir)
    assert isinstance(tokenizer, torch.nn.Module)
    assert not tokenizer.training
    assert tokenizer.hash == ibq_scale.load_tokenizer(tokenizer_dir).hash
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(tokenizer(images), tokenizer.decode(tokenizer.encode(images)))
    old = tokenizer.hash
    tokenizer.codebook_KD += 0.5
    tokenizer.save_pretrained(tmp_path / "new")
    again = ibq_scale.Tokenizer.from_pretrained(str(tmp_path / "new"))
    assert torch.equal(again.codebook_KD, tokenizer.codebook_KD)
    assert again.hash == tokenizer.hash != old
    assert again.hash in (tmp_path / "new/README.md").read_text()
    with pytest.raises(UserError, match="is there already and not empty"):
        tokenizer.save_pretrained(tmp_path / "new")


def test_another_kind_is_refused(tokenizer_dir: Path, ar_dir: Path) -> None:
    assert ibq_scale.ARModel.from_pretrained(ar_dir).hash == ibq_scale.load_ar(ar_dir).hash
    with pytest.raises(UserError, match="holds a Tokenizer, not a ARModel"):
        ibq_scale.ARModel.from_pretrained(tokenizer_dir)


def test_names_on_the_hub_and_folders_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me/here").mkdir(parents=True)
    assert address_of("me/tok-16384") == "hf://me/tok-16384"
    assert address_of("me/tok", "v1") == address_of("hf://me/tok", "v1") == "hf://me/tok@v1"
    for path in ("me/here", "models/sub/tok", "/me/tok", tmp_path / "me"):
        assert address_of(path) == path
