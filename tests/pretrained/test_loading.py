"""Models on disk: what is written is read, whole or not at all."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import ibq_scale
from ibq_scale.errors import UserError
from ibq_scale.pretrained.loading import export, load_ar, load_tokenizer
from ibq_scale.pretrained.published import import_published


def test_the_public_python_api(tokenizer_dir: Path, ar_dir: Path) -> None:
    tokenizer, ar = ibq_scale.load_tokenizer(tokenizer_dir), ibq_scale.load_ar(ar_dir)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    codes = tokenizer.encode(images)
    assert (codes.shape, codes.dtype) == ((2, 8, 8), torch.int64)
    assert tokenizer.decode(codes).shape == images.shape
    labels = torch.tensor([0, 3])
    assert ar.forward(codes.flatten(1), labels).shape == (2, 64, 64)
    sampled = ar.generate(labels, guidance=2.0, temperature=1.0, top_k=0, top_p=1.0, greedy=False, seed=0)
    assert (sampled.shape, sampled.dtype) == ((2, 64), torch.int64)


def test_images_of_other_sizes_and_of_impossible_ones(tokenizer_dir: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_dir)
    assert tokenizer.encode(torch.zeros(1, 3, 48, 32)).shape == (1, 12, 8)
    with pytest.raises(ValueError, match="must be multiples of 4"):
        tokenizer.encode(torch.zeros(1, 3, 30, 32))


def test_an_export_is_the_same_model(tokenizer_dir: Path, ar_dir: Path, tmp_path: Path) -> None:
    assert export(tokenizer_dir, tmp_path / "tok") == ("tokenizer", tmp_path / "tok")
    assert load_tokenizer(tmp_path / "tok").hash == load_tokenizer(tokenizer_dir).hash
    export(ar_dir, tmp_path / "ar")
    again, first = load_ar(tmp_path / "ar"), load_ar(ar_dir)
    assert again.tokenizer_hash == first.tokenizer_hash
    for a, b in zip(again.parameters(), first.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(UserError, match="not empty"):
        export(ar_dir, tmp_path / "tok")


def test_a_codebook_in_parts_is_put_together_in_order(tokenizer_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(tokenizer_dir, tmp_path, dirs_exist_ok=True)
    rows = load_file(tmp_path / "codebook.safetensors")["codebook"]
    (tmp_path / "codebook.safetensors").unlink()
    for part, piece in enumerate(rows.chunk(2)):
        save_file({"codebook": piece.contiguous()}, tmp_path / f"codebook-0000{part}-of-00002.safetensors")
    assert load_tokenizer(tmp_path).hash == load_tokenizer(tokenizer_dir).hash
    (tmp_path / "codebook-00001-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="codebook_KD has shape"):
        load_tokenizer(tmp_path)


def test_a_missing_tensor_is_an_error_and_never_a_random_one(tokenizer_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(tokenizer_dir, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("decoder.conv_in.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"decoder\.conv_in\.weight is missing"):
        load_tokenizer(tmp_path)


def test_wrong_models_are_refused(tokenizer_dir: Path, ar_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is an AR transformer; a tokenizer is needed"):
        load_tokenizer(ar_dir)
    with pytest.raises(UserError, match="does not exist"):
        load_ar(tmp_path / "absent")
    with pytest.raises(UserError, match="holds no model"):
        load_ar(tmp_path)
    shutil.copytree(tokenizer_dir, tmp_path / "new")
    values = json.loads((tmp_path / "new/config.json").read_text())
    (tmp_path / "new/config.json").write_text(json.dumps(values | {"format_version": 9}))
    with pytest.raises(UserError, match="has model format 9"):
        load_tokenizer(tmp_path / "new")


class _Evil:
    def __reduce__(self) -> tuple:
        return (print, ("code ran",))


def test_a_published_checkpoint_runs_no_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": {"x": torch.zeros(1)}, "hook": _Evil()}, tmp_path / "evil.ckpt")
    with pytest.raises(UserError, match="running code from a checkpoint is refused"):
        import_published(tmp_path / "evil.ckpt")
    assert "code ran" not in capsys.readouterr().out


def test_files_that_are_no_checkpoint(tmp_path: Path) -> None:
    torch.save({"state_dict": {"x": torch.zeros(1)}}, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match="neither a tokenizer"):
        import_published(tmp_path / "other.ckpt")
    (tmp_path / "text.ckpt").write_text("text")
    with pytest.raises(UserError, match=r"cannot read|refused"):
        import_published(tmp_path / "text.ckpt")
    with pytest.raises(UserError, match="not found"):
        import_published(tmp_path / "absent.ckpt")
    (tmp_path / "pickle.ckpt").write_bytes(pickle.dumps(_Evil()))
    with pytest.raises(UserError):
        import_published(tmp_path / "pickle.ckpt")
