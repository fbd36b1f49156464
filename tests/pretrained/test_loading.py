"""Models on disk: what is written is read, whole or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

import ibq_scale
from ibq_scale.checkpoint.files import StateFile, TextFile
from ibq_scale.checkpoint.pieces import Piece, piece_file
from ibq_scale.errors import UserError
from ibq_scale.models.autoencoder import tokens_of
from ibq_scale.pretrained.exporting import export
from ibq_scale.pretrained.loading import InCheckpoint, load_ar, load_tokenizer, save_tokenizer
from ibq_scale.pretrained.models import Tokenizer
from ibq_scale.pretrained.published import export_published


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


def _by_hand(tokenizer: Tokenizer, images: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and reconstruction from the tensors alone, by the formulas of the published networks, in float64."""
    w = {k.removeprefix("autoencoder."): v.double() for k, v in tokenizer.state_dict().items()}

    def conv(x: Tensor, name: str, padding: int = 0, stride: int = 1) -> Tensor:
        return F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], stride, padding)

    def norm(x: Tensor, name: str) -> Tensor:
        return F.group_norm(x, 32, w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    def resnet(x: Tensor, name: str) -> Tensor:
        h = conv(F.silu(norm(x, f"{name}.norm1")), f"{name}.conv1", 1)
        h = conv(F.silu(norm(h, f"{name}.norm2")), f"{name}.conv2", 1)
        return h + (conv(x, f"{name}.nin_shortcut") if f"{name}.nin_shortcut.weight" in w else x)

    def attention(x: Tensor, name: str) -> Tensor:
        q, k, v = (conv(norm(x, f"{name}.norm"), f"{name}.{part}") for part in "qkv")
        scores = torch.einsum("bcij,bckl->bijkl", q, k) * x.shape[1] ** -0.5
        weights = scores.flatten(3).softmax(-1).view_as(scores)
        return x + conv(torch.einsum("bijkl,bckl->bcij", weights, v), f"{name}.proj_out")

    def level(x: Tensor, name: str) -> Tensor:
        for i in range(sum(f"{name}.block.{i}.conv1.weight" in w for i in range(9))):
            x = resnet(x, f"{name}.block.{i}")
            x = attention(x, f"{name}.attn.{i}") if f"{name}.attn.{i}.q.weight" in w else x
        if f"{name}.downsample.conv.weight" in w:
            return conv(F.pad(x, (0, 1, 0, 1)), f"{name}.downsample.conv", stride=2)
        if f"{name}.upsample.conv.weight" in w:
            return conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3), f"{name}.upsample.conv", 1)
        return x

    def middle(x: Tensor, name: str) -> Tensor:
        return resnet(attention(resnet(x, f"{name}.block_1"), f"{name}.attn_1"), f"{name}.block_2")

    h = conv(images.double(), "encoder.conv_in", 1)
    for i in range(3):
        h = level(h, f"encoder.down.{i}")
    z = conv(F.silu(norm(middle(h, "encoder.mid"), "encoder.norm_out")), "encoder.conv_out", 1)
    z = conv(z, "quant_conv")
    codes = torch.einsum("bdhw,kd->bhwk", z, w["codebook_KD"]).argmax(-1)
    h = conv(w["codebook_KD"][codes].permute(0, 3, 1, 2), "post_quant_conv")
    h = middle(conv(h, "decoder.conv_in", 1), "decoder.mid")
    for i in (2, 1, 0):
        h = level(h, f"decoder.up.{i}")
    return codes, conv(F.silu(norm(h, "decoder.norm_out")), "decoder.conv_out", 1)


@pytest.mark.slow
@pytest.mark.parametrize(("height", "width"), [(32, 32), (4, 64), (72, 20), (96, 128)])
def test_any_sides_that_the_downsampling_divides(tokenizer_dir: Path, height: int, width: int) -> None:
    tokenizer = load_tokenizer(tokenizer_dir)
    images = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1
    codes, reconstruction = _by_hand(tokenizer, images)
    assert torch.equal(tokenizer.encode(images), codes)
    assert codes.unique().numel() > 1
    torch.testing.assert_close(tokenizer.decode(codes), reconstruction.float(), rtol=1e-4, atol=1e-4)


def test_images_and_codes_of_impossible_shapes(tokenizer_dir: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_dir)
    for sides in [(30, 32), (32, 30), (0, 32)]:
        with pytest.raises(ValueError, match=f"image sides {sides[0]} × {sides[1]} must be multiples of 4"):
            tokenizer.encode(torch.zeros(1, 3, *sides))
    for shape in [(3, 32, 32), (1, 1, 32, 32)]:
        with pytest.raises(ValueError, match=r"images must be \(B, 3, H, W\)"):
            tokenizer.encode(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"codes must be \(B, h, w\), got \(8, 8\)"):
        tokenizer.decode(torch.zeros(8, 8, dtype=torch.int64))


def test_an_export_is_the_same_model(tokenizer_dir: Path, ar_dir: Path, tmp_path: Path) -> None:
    assert export(tokenizer_dir, tmp_path / "tok") == "tokenizer"
    assert load_tokenizer(tmp_path / "tok").hash == load_tokenizer(tokenizer_dir).hash
    assert export(ar_dir, tmp_path / "ar") == "ar"
    again, first = load_ar(tmp_path / "ar"), load_ar(ar_dir)
    assert again.tokenizer_hash == first.tokenizer_hash
    for a, b in zip(again.parameters(), first.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(UserError, match="not empty"):
        export(ar_dir, tmp_path / "tok")


def test_a_model_with_unit_codes_is_the_same_after_an_export(tokenizer_dir: Path, tmp_path: Path) -> None:
    """Its codebook is stored as it was trained. Length 1 is part of the model's config and of its hash."""
    plain = load_tokenizer(tokenizer_dir)
    unit = Tokenizer(plain.model_config, plain.quantizer_config.model_copy(update={"l2_normalize": True}))
    unit.load_state_dict(plain.state_dict())
    save_tokenizer(tmp_path / "unit", unit, {})
    export(tmp_path / "unit", tmp_path / "export")
    found = load_tokenizer(tmp_path / "export")
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    codes = found.encode(images)
    z_ND = F.normalize(tokens_of(unit.autoencoder.encode(images)))
    codes_KD = F.normalize(plain.codebook_KD)
    assert torch.equal(codes.flatten(), (z_ND @ codes_KD.T).argmax(dim=1))
    assert torch.equal(codes, unit.encode(images))
    decoded = unit.autoencoder.decode(codes_KD[codes].permute(0, 3, 1, 2))
    torch.testing.assert_close(found.decode(codes), decoded)
    assert found.hash == unit.hash != plain.hash
    assert "tokens and codes of unit length" in (tmp_path / "export/README.md").read_text()
    with pytest.raises(UserError, match="published layout has no l2_normalize"):
        export_published(tmp_path / "export", tmp_path / "unit.ckpt")


def test_a_codebook_in_parts_is_put_together_in_order(tokenizer_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(tokenizer_dir, tmp_path, dirs_exist_ok=True)
    rows = load_file(tmp_path / "codebook.safetensors")["codebook"]
    (tmp_path / "codebook.safetensors").unlink()
    for part, piece in enumerate(rows.chunk(2)):
        save_file({"codebook": piece.contiguous()}, tmp_path / f"codebook-0000{part}-of-00002.safetensors")
    assert load_tokenizer(tmp_path).hash == load_tokenizer(tokenizer_dir).hash
    (tmp_path / "codebook-00001-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"codebook_KD misshapen \(\(32, 16\) instead of \(64, 16\)\)"):
        load_tokenizer(tmp_path)


@pytest.fixture
def checkpoint(ar_dir: Path, tmp_path: Path) -> Path:
    """What three ranks save of a transformer: its weights cut anywhere, and no file that has them whole."""
    whole = {name: value.reshape(-1) for name, value in load_file(ar_dir / "model.safetensors").items()}
    facts = {"shapes": {name: value.shape for name, value in load_file(ar_dir / "model.safetensors").items()}}
    config = json.loads((ar_dir / "config.json").read_text()) | {"weights": InCheckpoint("ema")._asdict()}
    files: list[StateFile] = [TextFile("model/config.json", json.dumps(config))]
    for rank in range(3):
        cuts = {name: [len(value) * part // 3 for part in (rank, rank + 1)] for name, value in whole.items()}
        pieces = [Piece(name, first, whole[name][first:last]) for name, (first, last) in cuts.items() if first < last]
        files.append(piece_file("ema", rank, pieces, facts))
    path = tmp_path / "step-00000007"
    written = {file.path: file.write(path)._asdict() for file in files}
    (path / "manifest.json").write_text(json.dumps({"format_version": 3, "step": 7, "files": written}))
    return path


def test_a_checkpoints_model_is_put_together_from_the_ranks_pieces(ar_dir: Path, checkpoint: Path) -> None:
    found, expected = load_ar(checkpoint).state_dict(), load_ar(ar_dir).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_checkpoints_model_that_was_damaged_is_refused(checkpoint: Path) -> None:
    path = checkpoint / "ema/rank-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"is damaged \(ema/rank-00001\.safetensors: content changed"):
        load_ar(checkpoint)
    assert load_ar(checkpoint, check_hashes=False).config.depth > 0
    path.unlink()
    with pytest.raises(UserError, match="elements: the checkpoint is of another model"):
        load_ar(checkpoint, check_hashes=False)


def test_a_missing_tensor_is_an_error_and_never_a_random_one(tokenizer_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(tokenizer_dir, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("decoder.conv_in.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"fit the model: autoencoder\.decoder\.conv_in\.weight missing$"):
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
