"""Models of other people: their sizes are looked at before anything is built, and no file ends in a traceback."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ibq_scale.errors import UserError
from ibq_scale.pretrained.loading import load_ar, load_model, load_tokenizer
from ibq_scale.pretrained.published import export_published, import_published

AT_ONCE = 5.0
"""CPU seconds, of which building what is asked for would take many times more."""


def _with(folder: Path, to: Path, **changed: Any) -> Path:
    """A copy whose config.json has other values; ``model__depth`` is one inside."""
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    for name, value in changed.items():
        *outer, last = name.split("__")
        section = config
        for key in outer:
            section = section[key]
        section[last] = value
    (to / "config.json").write_text(json.dumps(config))
    return to


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model__depth": 10**7}, "model.depth: Input should be less than or equal to 1024"),
        ({"model__depth": 1000}, r"2 of transformer.blocks.N.\* instead of 1000"),
        ({"model__width": 2**40}, "model.width"),
        ({"model__width": 2**17, "model__heads": 2}, "misshapen"),
        ({"model__classes": 2**64}, "model.classes"),
        ({"model": None}, "model: Input should be"),
        ({"model": []}, "model: Input should be"),
        ({"tokenizer": 3}, "its tokenizer is no text"),
        ({"source": 3}, "its source no object"),
        ({"kind": []}, r"kind is \[\]"),
        ({"weights": {"folder": "../.."}}, "weights: .* is no relative file name"),
    ],
)
def test_a_transformers_config(ar_dir: Path, tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    begun = time.process_time()
    with pytest.raises(UserError, match=said) as told:
        load_model(_with(ar_dir, tmp_path / "m", **changed))
    assert len(str(told.value).splitlines()) == 1
    assert time.process_time() - begun < AT_ONCE


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model__res_blocks": 10**6}, "model.res_blocks: Input should be less than or equal to 1024"),
        ({"model__res_blocks": 900}, r"1 of autoencoder.encoder.down.0.block.N.\* instead of 900"),
        ({"model__channel_multipliers": [1] * 1000}, "model.channel_multipliers"),
        ({"model__channels": 2**16}, "misshapen"),
        ({"quantizer__codebook_size": 2**60}, "quantizer.codebook_size"),
        ({"quantizer__codebook_size": 2**31}, "codebook_KD misshapen"),
        ({"quantizer": 5}, "quantizer: Input should be"),
    ],
)
def test_a_tokenizers_config(tokenizer_dir: Path, tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    begun = time.process_time()
    with pytest.raises(UserError, match=said):
        load_tokenizer(_with(tokenizer_dir, tmp_path / "m", **changed))
    assert time.process_time() - begun < AT_ONCE


def test_weights_of_whole_numbers_are_none(ar_dir: Path, tmp_path: Path) -> None:
    folder = _with(ar_dir, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name].to(torch.int32)}, folder / "model.safetensors")
    with pytest.raises(UserError, match="of whole numbers"):
        load_ar(folder)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to(path.name)])
@pytest.mark.parametrize("name", ["model.safetensors", "codebook.safetensors", "config.json"])
def test_what_is_no_file_is_told(
    tokenizer_dir: Path, tmp_path: Path, name: str, make: Callable[[Path], object]
) -> None:
    folder = _with(tokenizer_dir, tmp_path / "m")
    (folder / name).unlink()
    make(folder / name)
    with pytest.raises(UserError):
        load_tokenizer(folder)


def _published(model: Path, to: Path, change: Callable[[dict[Any, Any]], object]) -> Path:
    """As the published code writes it, without sizes, and then changed."""
    export_published(model, to)
    state = torch.load(to, weights_only=True)["state_dict"]
    change(state)
    torch.save({"state_dict": state}, to)
    return to


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.update({"transformer.blocks.999999.x": torch.ones(1)}), "3 layers .* numbered up to 999999"),
        (lambda s: s.update({f"transformer.blocks.{'9' * 5000}.x": torch.ones(1)}), "numbered up to 100000000"),
        (lambda s: s.update({"transformer.tok_emb.weight": torch.ones(4)}), r"a table of shape \(4,\)"),
        (lambda s: s.update({"transformer.class_emb.embedding_table.weight": torch.ones(())}), r"of shape \(\)"),
    ],
)  # fmt: skip
def test_a_published_transformer(ar_dir: Path, tmp_path: Path, change: Callable[..., object], said: str) -> None:
    begun = time.process_time()
    with pytest.raises(UserError, match=said):
        import_published(_published(ar_dir, tmp_path / "x.ckpt", change))
    assert time.process_time() - begun < AT_ONCE


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.update({"encoder.down.9999999.x": torch.ones(1)}), "4 layers there are numbered up to 9999999"),
        (lambda s: s.update({"encoder.down.0.block.999999.x": torch.ones(1)}), "numbered up to 999999"),
        (lambda s: s.update({"encoder.conv_in.weight": torch.ones(())}), r"of shape \(\)"),
        (lambda s: s.update({"encoder.conv_in.weight": torch.ones(0, 3, 3, 3)}), r"of shape \(0, 3, 3, 3\)"),
        (lambda s: s.pop("encoder.conv_in.weight"), "are unknown without"),
    ],
)
def test_a_published_tokenizer(tokenizer_dir: Path, tmp_path: Path, change: Callable[..., object], said: str) -> None:
    begun = time.process_time()
    with pytest.raises(UserError, match=said):
        import_published(_published(tokenizer_dir, tmp_path / "x.ckpt", change))
    assert time.process_time() - begun < AT_ONCE


def test_names_that_are_no_text_are_left_aside(ar_dir: Path, tmp_path: Path) -> None:
    whole = _published(ar_dir, tmp_path / "x.ckpt", lambda s: s.update({0: torch.ones(1), None: torch.ones(1)}))
    found = import_published(whole, heads=2, tokens=64)
    assert all(torch.equal(a, b) for a, b in zip(found.model.parameters(), load_ar(ar_dir).parameters(), strict=True))
