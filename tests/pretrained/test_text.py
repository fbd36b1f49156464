"""Captions and their vectors: words hashed without weights, encoders of transformers from the cache alone."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from ibq_scale.data.manifest import ConditionInfo
from ibq_scale.errors import UserError
from ibq_scale.pretrained.text import Captions, encoder_of, text_encoder


def test_words_have_vectors_of_their_own() -> None:
    encoder = text_encoder("hash:32", 3)
    red, apple, both, none, long = encoder.encode(["Red!", "apple", "red apple", " ", "a b c d"])
    assert torch.equal(both, torch.cat([red, apple]))
    assert (red.shape, none.shape, long.shape) == ((1, 32), (0, 32), (3, 32))
    assert float((red @ apple.T).abs()) < 20
    condition = encoder.condition(["red apple", ""])
    assert (condition.vectors_BLC.shape, condition.lengths_B.tolist()) == ((2, 3, 32), [2, 0])
    assert float(text_encoder("hash").encode(["red"])[0].std()) == pytest.approx(1.0, abs=0.3)


def test_unknown_encoders_are_refused() -> None:
    for name in ("word2vec", "hash:x", "hash:0", "t5", "clip:"):
        with pytest.raises(UserError, match="write hash, hash:WIDTH, t5:OWNER/NAME or clip:OWNER/NAME"):
            text_encoder(name)
    info = ConditionInfo(encoder="hash:8", tokens=4, width=9, captions="")
    with pytest.raises(UserError, match="hash:8 gives 8 wide vectors, 9 are needed"):
        encoder_of(info)


class _Network:
    """As transformers' encoders: one vector a token, its number in all places."""

    config = type("Config", (), {"hidden_size": 6})

    def to(self, device: Any) -> _Network:
        return self

    def eval(self) -> _Network:
        return self

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        hidden = input_ids[..., None].expand(-1, -1, 6).double()
        return type("Output", (), {"last_hidden_state": hidden})


class _Inputs(dict[str, torch.Tensor]):
    def to(self, device: Any) -> _Inputs:
        return self


def _tokenize(texts: list[str], max_length: int, **_: Any) -> _Inputs:
    lengths = [min(len(text), max_length) for text in texts]
    ids = torch.tensor([[ord(c) for c in text[:n].ljust(max(lengths))] for text, n in zip(texts, lengths, strict=True)])
    mask = torch.tensor([[int(i < n) for i in range(max(lengths))] for n in lengths])
    return _Inputs(input_ids=ids, attention_mask=mask)


def test_an_encoder_of_transformers_is_read_from_the_cache_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the package."""
    fake: Any = ModuleType("transformers")

    def cached(made: object) -> Any:
        def from_pretrained(name: str, *, local_files_only: bool) -> object:
            assert local_files_only
            if name != "owner/small":
                raise OSError(f"no {name}\nmore")
            return made

        return type("Auto", (), {"from_pretrained": staticmethod(from_pretrained)})

    fake.AutoTokenizer, fake.T5EncoderModel, fake.CLIPTextModel = cached(_tokenize), cached(_Network()), cached(None)
    monkeypatch.setitem(sys.modules, "transformers", fake)
    encoder = text_encoder("t5:owner/small", 4)
    assert (encoder.width, encoder.tokens) == (6, 4)
    rows = encoder.encode(["ab", "c" * 9, *["d"] * 70])
    assert [len(row) for row in rows[:3]] == [2, 4, 1]
    assert rows[0][:, 0].tolist() == [97.0, 98.0]
    with pytest.raises(UserError, match=r"not in the Hub's cache \(no owner/large\): fetch it with 'hf download owner"):
        text_encoder("t5:owner/large")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="needs transformers: pip install transformers, or take hash"):
        text_encoder("clip:owner/small")


def test_captions_by_key_path_or_class(tmp_path: Path) -> None:
    file = tmp_path / "captions.tsv"
    file.write_text('k-1\tone\n{"key": "cats/2.png", "caption": "two"}\n\ndogs\ta dog\n')
    captions = Captions(str(file))
    found = [captions.of(*names) for names in (("k-1", "", ""), ("", "cats/2.png", "cats"), ("k-3", "3.png", "dogs"))]
    assert found == ["one", "two", "a dog"]
    with pytest.raises(UserError, match=r"has no caption for 4\.png \(key k-4, class cats\)"):
        captions.of("k-4", "4.png", "cats")
    assert Captions("classes").of("", "", "polar_bear") == "polar bear"
    for content in ("no tab\n", '{"key": "a"}\n', "{\n"):
        file.write_text(content)
        with pytest.raises(UserError, match="give lines of KEY, a tab and the caption"):
            Captions(str(file))
    with pytest.raises(UserError, match="No such file"):
        Captions(str(tmp_path / "absent"))
