"""The published layout: sizes read off tensors, everything accounted for, no code run, and the way back."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ibq_scale.cli.main import main
from ibq_scale.config.layers import resolve
from ibq_scale.config.models import TransformerConfig
from ibq_scale.errors import UserError
from ibq_scale.pretrained.loading import load_ar, load_model, load_tokenizer, save_ar, save_tokenizer
from ibq_scale.pretrained.models import ARModel, Tokenizer
from ibq_scale.pretrained.published import (
    CODEBOOK,
    SIZES,
    export_published,
    import_published,
    published_tokenizer,
)
from tests.conftest import tiny_tokenizer_sizes

PUBLISHED_PRESETS = ("ibq-1024", "ibq-8192", "ibq-16384", "ibq-262144")


def _foreign(state: dict[str, Tensor], file: Path, **more: Any) -> Path:
    """A file as the published code writes it: without our sizes, with what Lightning adds."""
    torch.save({"state_dict": state} | more, file)
    return file


@pytest.fixture
def state(tokenizer_dir: Path) -> dict[str, Tensor]:
    """A published state, its average different from its live weights."""
    state = published_tokenizer(load_tokenizer(tokenizer_dir))
    return {k: v + 0.25 if k.startswith("model_ema.") and v.ndim else v for k, v in state.items()}


@pytest.mark.slow
@pytest.mark.parametrize("preset", PUBLISHED_PRESETS)
def test_the_sizes_of_every_published_tokenizer_are_read_off_its_tensors(
    preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole import on the meta device: names and shapes of the real sizes, no numbers."""
    run = resolve(preset, ["data.train=x"], "tokenizer").config
    with torch.device("meta"):
        state = published_tokenizer(Tokenizer(run.model, run.quantizer))
        # A file of them would have no numbers to load, so what it would hold stands in for it.
        monkeypatch.setattr(torch, "load", lambda *_, **__: {"state_dict": state})
        model = import_published(tmp_path / "file.ckpt", ema=True).model
    assert isinstance(model, Tokenizer)
    assert model.model_config == run.model
    assert (model.quantizer_config.codebook_size, model.quantizer_config.dim) == (run.quantizer.codebook_size, 256)
    assert {k: v.shape for k, v in published_tokenizer(model).items()} == {k: v.shape for k, v in state.items()}


def test_sizes_other_than_the_published_ones(tmp_path: Path) -> None:
    """Code width apart from z_channels, several depths, attention on two levels; the model computes the same."""
    from ibq_scale.config.models import AutoencoderConfig, QuantizerConfig

    sizes = AutoencoderConfig(
        channels=32,
        channel_multipliers=(1, 3, 2),
        res_blocks=2,
        attention_resolutions=(64, 16),
        resolution=64,
        z_channels=12,
    )
    tokenizer = Tokenizer(sizes, QuantizerConfig(codebook_size=48, dim=6))
    tokenizer.codebook_KD.normal_(generator=torch.Generator().manual_seed(0))
    file = _foreign(published_tokenizer(tokenizer), tmp_path / "a.ckpt")
    found = import_published(file).model
    assert isinstance(found, Tokenizer)
    assert found.model_config == sizes
    assert found.quantizer_config == tokenizer.quantizer_config
    assert found.hash == tokenizer.hash


@pytest.mark.slow
def test_live_and_averaged_weights(state: dict[str, Tensor], tokenizer_dir: Path, tmp_path: Path) -> None:
    file = _foreign(state, tmp_path / "a.ckpt")
    original = load_tokenizer(tokenizer_dir).state_dict()
    live, averaged = import_published(file), import_published(file, ema=True)
    for name, tensor in original.items():
        assert torch.equal(live.model.state_dict()[name], tensor)
        assert torch.equal(averaged.model.state_dict()[name], tensor + 0.25)
    assert live.left_aside == {"model_ema": len(original) + 2}
    assert averaged.left_aside == {
        top: sum(k.startswith(f"{top}.") for k in state)
        for top in ("decoder", "encoder", "post_quant_conv", "quant_conv", "quantize")
    }


def test_everything_else_in_the_file_is_told(
    state: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = {
        "model_ema.lossdiscriminatormain0weight": torch.zeros(1),
        "loss.discriminator.main.0.weight": torch.zeros(1),
        "loss.discriminator.main.0.bias": torch.zeros(1),
        "loss.perceptual_loss.lin0.model.1.weight": torch.zeros(1),
    }
    optimizers = [{"state": {0: {"exp_avg": torch.zeros(2), "exp_avg_sq": torch.zeros(2), "step": 3}}}, {"state": {}}]
    file = _foreign(state | losses, tmp_path / "a.ckpt", optimizer_states=optimizers, epoch=3)
    assert import_published(file).left_aside == {
        "loss.discriminator": 2,
        "loss.perceptual_loss": 1,
        "model_ema": 1 + len([k for k in state if k.startswith("model_ema.")]),
        "optimizer_states": 2,
        "epoch": 0,
    }
    assert import_published(file, ema=True).left_aside["model_ema"] == 1
    assert main(["checkpoint", "import", str(file), "--to", str(tmp_path / "to")]) == 0
    said = capsys.readouterr().out
    assert "loss.discriminator (2 tensors), loss.perceptual_loss (1 tensors)" in said
    assert "optimizer_states (2 tensors), epoch" in said
    assert "--ema" in said


def _drop(*names: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda state: [state.pop(name) for name in names] and None


@pytest.mark.parametrize(
    ("change", "ema", "said"),
    [
        (_drop("decoder.conv_out.bias", "quant_conv.weight"), False, "decoder.conv_out.bias missing; quant_conv.w"),
        (_drop("post_quant_conv.weight", "post_quant_conv.bias"), False, r"post_quant_conv.\* \(2\) missing"),
        (_drop(CODEBOOK, "encoder.conv_in.weight"), False, f"are unknown without {CODEBOOK}, encoder.conv_in.wei"),
        (_drop("encoder.down.2.attn.0.q.weight"), False, "encoder.down.2.attn.0.q.weight missing$"),
        (lambda s: s.update({CODEBOOK: torch.zeros(3)}), False, r"a table of shape \(3,\) instead of"),
        (
            lambda s: s.update({"decoder.conv_out.bias": torch.zeros(4)}),
            False,
            r"decoder.conv_out.bias misshapen \(\(4,\) instead of \(3,\)\)",
        ),
        (lambda s: s.update({"encoder.more": torch.zeros(4)}), False, "encoder.more not expected"),
        (
            _drop("model_ema.decoderconv_outbias", "model_ema.quantizeembeddingweight"),
            True,
            r"average \(model_ema.\*\): .*: quantize.embedding.weight missing; decoder.conv_out.bias missing$",
        ),
        (lambda s: s.update({"model_ema.encodermore": torch.zeros(4)}), True, "model_ema.encodermore not expected"),
    ],
)
def test_what_is_missing_or_misshapen_is_listed(
    state: dict[str, Tensor], tmp_path: Path, change: Callable[[dict[str, Tensor]], None], ema: bool, said: str
) -> None:
    change(state)
    with pytest.raises(UserError, match=said):
        import_published(_foreign(state, tmp_path / "a.ckpt"), ema=ema)


def test_a_checkpoint_without_an_average_says_so_once(state: dict[str, Tensor], tmp_path: Path) -> None:
    live = {k: v for k, v in state.items() if not k.startswith("model_ema.")}
    with pytest.raises(UserError, match=r"its average \(model_ema\.\*\): .*decoder\.\* \(\d+\) missing") as refused:
        import_published(_foreign(live, tmp_path / "a.ckpt"), ema=True)
    assert len(str(refused.value)) < 400


@pytest.mark.slow
def test_a_tokenizer_comes_back_bit_for_bit(tokenizer_dir: Path, tmp_path: Path) -> None:
    original = load_tokenizer(tokenizer_dir)
    assert export_published(tokenizer_dir, tmp_path / "new/tok.ckpt") == "tokenizer"
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["tok.ckpt"]
    for ema in (False, True):
        again = import_published(tmp_path / "new/tok.ckpt", ema=ema).model
        assert isinstance(again, Tokenizer)
        assert (again.model_config, again.quantizer_config) == (original.model_config, original.quantizer_config)
        assert again.hash == original.hash
        for name, tensor in original.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor)


def test_a_file_written_back_serves_the_published_loader(tokenizer_dir: Path, tmp_path: Path) -> None:
    """It takes ``["state_dict"]``, fills modules by name, and gives averages to the names it has met before them."""
    export_published(tokenizer_dir, tmp_path / "tok.ckpt")
    content = torch.load(tmp_path / "tok.ckpt", map_location="cpu", weights_only=True)
    met: dict[str, str] = {}
    averaged: dict[str, Tensor] = {}
    for name, tensor in content["state_dict"].items():
        rest = name.removeprefix("model_ema.")
        if rest == name:
            met[name.replace(".", "")] = name
        elif rest not in ("decay", "num_updates"):
            averaged[met[rest]] = tensor
    assert averaged.keys() == set(met.values())
    assert averaged[CODEBOOK].dtype == torch.float32
    assert (float(content["state_dict"]["model_ema.decay"]), int(content["state_dict"]["model_ema.num_updates"])) == (
        pytest.approx(0.999),
        -1,
    )
    # Averages share their live tensors' storage, so the file is not twice the model.
    size = sum(t.nbytes for t in load_tokenizer(tokenizer_dir).state_dict().values())
    assert (tmp_path / "tok.ckpt").stat().st_size < 1.5 * size


def test_a_transformer_comes_back_bit_for_bit_with_heads_and_tokens(ar_dir: Path, tmp_path: Path) -> None:
    original = load_ar(ar_dir)
    assert main(["checkpoint", "export", str(ar_dir), "--layout", "published", "--to", str(tmp_path / "ar.ckpt")]) == 0
    assert main(["checkpoint", "import", str(tmp_path / "ar.ckpt"), "--to", str(tmp_path / "ar")]) == 0
    again = load_model(tmp_path / "ar")
    assert again.config == original.config
    assert again.tokenizer_hash == original.tokenizer_hash
    for name, tensor in original.state_dict().items():
        assert name.startswith("transformer.")
        assert torch.equal(again.state_dict()[name], tensor)


@pytest.mark.parity
def test_a_published_transformer_is_written_back_as_it_was(parity_dir: Path, tmp_path: Path) -> None:
    file = parity_dir / "ar_small.ckpt"
    save_ar(tmp_path / "ar", import_published(file, heads=4, tokens=16).model, {})
    export_published(tmp_path / "ar", tmp_path / "back.ckpt")
    original, back = (torch.load(f, weights_only=True)["state_dict"] for f in (file, tmp_path / "back.ckpt"))
    assert back.keys() == original.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in original.items())


@pytest.mark.slow
@pytest.mark.parametrize("inside", [True, False], ids=["with its tokenizer", "alone"])
@pytest.mark.parametrize("preset", ["b", "l", "xl", "xxl"])
def test_the_sizes_of_every_published_transformer_are_read_off_its_tensors(
    preset: str, inside: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole import on the meta device: names and shapes of the real sizes, no numbers."""
    run = resolve(preset, ["data.train=x"], "ar").config
    with torch.device("meta"):
        state = dict(ARModel(run.model, None).state_dict())
        tokenizer = Tokenizer(*tiny_tokenizer_sizes())
    frozen = {f"first_stage_model.{k}": v for k, v in published_tokenizer(tokenizer).items()} if inside else {}
    monkeypatch.setattr(torch, "load", lambda *_, **__: {"state_dict": state | frozen})
    imported = import_published(tmp_path / "file.ckpt")
    assert imported.left_aside == ({"first_stage_model": len(frozen)} if inside else {})
    found, wanted = imported.model.config, run.model
    for size in ("codebook_size", "classes", "tokens", "depth", "heads", "width", "conditioning"):
        assert getattr(found, size) == getattr(wanted, size)
    assert {k: v.shape for k, v in imported.model.state_dict().items()} == {k: v.shape for k, v in state.items()}


def test_a_transformer_whose_heads_cannot_be_guessed(ar_dir: Path, tmp_path: Path) -> None:
    state = dict(load_ar(ar_dir).state_dict())
    file = _foreign(state | {"first_stage_model.x": torch.zeros(1)}, tmp_path / "ar.ckpt")
    imported = import_published(file, heads=2, tokens=64)
    assert imported.model.config == load_ar(ar_dir).config
    assert imported.left_aside == {"first_stage_model": 1}
    with pytest.raises(UserError, match="give --heads and --tokens as it was trained"):
        import_published(file, heads=5)
    with pytest.raises(UserError, match="average"):
        import_published(file, ema=True)
    del state["transformer.blocks.1.feed_forward.w2.weight"]
    with pytest.raises(UserError, match=r"transformer\.blocks\.1\.feed_forward\.w2\.weight missing"):
        import_published(_foreign(state, tmp_path / "less.ckpt"), heads=2)


def test_what_the_published_layout_cannot_hold(tokenizer_dir: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_dir)
    tokenizer.quantizer_config = tokenizer.quantizer_config.model_copy(update={"kind": "simvq"})
    save_tokenizer(tmp_path / "simvq", tokenizer, {})
    with pytest.raises(UserError, match="has no 'simvq' quantizer"):
        export_published(tmp_path / "simvq", tmp_path / "a.ckpt")
    for i, change in enumerate(({"conditioning": "prefix"}, {"kv_heads": 1}, {"qk_norm": True})):
        sizes = TransformerConfig(codebook_size=8, classes=2, tokens=4, depth=1, heads=2, width=16, **change)
        save_ar(tmp_path / f"ar{i}", ARModel(sizes, None), {})
        assert load_ar(tmp_path / f"ar{i}").config == sizes
        with pytest.raises(UserError, match="the published layout has AdaLN"):
            export_published(tmp_path / f"ar{i}", tmp_path / "a.ckpt")
    (tmp_path / "taken.ckpt").touch()
    with pytest.raises(UserError, match="is there already"):
        export_published(tokenizer_dir, tmp_path / "taken.ckpt")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ar0", "ar1", "ar2", "simvq", "taken.ckpt"]


def test_sizes_of_another_version(tokenizer_dir: Path, tmp_path: Path) -> None:
    state = published_tokenizer(load_tokenizer(tokenizer_dir))
    with pytest.raises(UserError, match="of another version, or damaged"):
        import_published(_foreign(state, tmp_path / "a.ckpt", **{SIZES: {"model": {"chanels": 1}}}))


class _Evil:
    """Touches a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.mark}",))


def _evil_zip(content: dict[str, Any], file: Path) -> None:
    torch.save(content, file)


def _evil_old(content: dict[str, Any], file: Path) -> None:
    torch.save(content, file, _use_new_zipfile_serialization=False)


def _evil_pickle(content: dict[str, Any], file: Path) -> None:
    file.write_bytes(pickle.dumps(content, protocol=2))


@pytest.mark.parametrize("save", [_evil_zip, _evil_old, _evil_pickle])
def test_a_pickle_that_would_run_code_is_refused(
    tmp_path: Path, state: dict[str, Tensor], save: Callable[[dict[str, Any], Path], None]
) -> None:
    mark = tmp_path / "mark"
    save({"state_dict": state, "callbacks": _Evil(mark)}, tmp_path / "evil.ckpt")
    with pytest.raises(UserError, match=r"running code|no checkpoint") as refused:
        import_published(tmp_path / "evil.ckpt")
    assert save is _evil_pickle or "(posix.system)" in str(refused.value)
    assert not mark.exists()
    # The file is a real one: unpickled without care it does what it says.
    if save is _evil_zip:
        torch.load(tmp_path / "evil.ckpt", weights_only=False)
    elif save is _evil_pickle:
        pickle.loads((tmp_path / "evil.ckpt").read_bytes())
    assert save is _evil_old or mark.exists()


def test_a_refusal_on_the_command_line_is_short_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _evil_zip({"x": _Evil(tmp_path / "mark")}, tmp_path / "evil.ckpt")
    assert main(["checkpoint", "import", str(tmp_path / "evil.ckpt"), "--to", str(tmp_path / "to")]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) <= 2
    assert [p.name for p in tmp_path.iterdir()] == ["evil.ckpt"]


def test_files_that_are_no_checkpoint(tmp_path: Path, state: dict[str, Tensor]) -> None:
    whole = _foreign(state, tmp_path / "whole.ckpt").read_bytes()
    _evil_old({"state_dict": state}, tmp_path / "old.ckpt")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as other:
        other.writestr("a", "b")
    contents = {
        "cut": whole[: len(whole) // 2],
        "cut-end": whole[:-10],
        "old-cut": (tmp_path / "old.ckpt").read_bytes()[:-1000],
        "text": b"text",
        "empty": b"",
        "zip": (tmp_path / "other.zip").read_bytes(),
        "pickle": pickle.dumps([1, 2], protocol=4),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"cannot read {tmp_path / name}: it is ") as refused:
            import_published(tmp_path / name)
        assert "\n" not in str(refused.value)
    for name, value in {"tensor": torch.zeros(3), "list": [1], "state": {"state_dict": [1]}, "none": {}}.items():
        torch.save(value, tmp_path / name)
        with pytest.raises(UserError, match="neither a tokenizer"):
            import_published(tmp_path / name)
    with pytest.raises(UserError, match="not found"):
        import_published(tmp_path / "absent.ckpt")
    with pytest.raises(UserError, match="no regular file"):
        import_published(tmp_path)
