"""Captions and their vectors: words hashed without weights, encoders of transformers from the cache alone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ibq_scale.config.run import DataConfig
from ibq_scale.data.images import shard_index
from ibq_scale.data.manifest import ConditionInfo
from ibq_scale.data.sets import open_sets
from ibq_scale.errors import UserError
from ibq_scale.generate.codes import Captioner
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


WORDS = ("<pad>", "</s>", "<s>", "<unk>", "a", "green", "apple")


def _save(kind: str, folder: Path) -> Any:
    """A tiny encoder with random weights in fp16, and a tokenizer of words that ends captions, or encloses them."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    made = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    template = {"t5": "$A </s>", "clip": "<s> $A </s>"}[kind]
    made.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 2), ("</s>", 1)])
    named = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, **named).save_pretrained(folder)
    torch.manual_seed(0)
    ids = {"vocab_size": len(WORDS), "pad_token_id": 0, "eos_token_id": 1}
    if kind == "t5":
        sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
        network: Any = transformers.T5EncoderModel(transformers.T5Config(**ids, **sizes))
    else:
        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = transformers.CLIPTextConfig(**ids, **sizes, bos_token_id=2, max_position_embeddings=5)
        network = transformers.CLIPTextModel(config)
    network.half().save_pretrained(folder)
    return network.float().eval()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "ids"), [("t5", [5, 6, 1]), ("clip", [2, 5, 6, 1])])
def test_vectors_are_those_of_transformers(kind: str, ids: list[int], dataset: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    network = _save(kind, tmp_path)
    encoder = text_encoder(f"{kind}:{tmp_path}")
    assert (encoder.width, encoder.tokens) == (8, {"t5": 120, "clip": 5}[kind])
    # Padding beside longer captions changes nothing, and no caption is the end alone.
    found, none, long = encoder.encode(["green apple", "", "a green apple a " * 40])
    with torch.inference_mode():
        expected = network(input_ids=torch.tensor([ids])).last_hidden_state[0]
    torch.testing.assert_close(found, expected)
    assert (len(none), len(long)) == (len(ids) - 2, encoder.tokens)
    assert (
        len(encoder_of(ConditionInfo(encoder=encoder.name, tokens=4, width=8, captions="")).encode(["a a a a"])[0]) == 4
    )
    images = open_sets(DataConfig(train=dataset), "images").parts[0]
    captioner = Captioner(images, "classes", encoder.name, 4, torch.device("cpu"))
    (vectors, spans), classes = captioner.shard(0), images.manifest.classes
    assert (captioner.info.tokens, captioner.info.width) == (4, 8)
    by_class = dict(zip(classes, text_encoder(encoder.name, 4).encode(classes), strict=True))
    for member, (first, rows) in zip(shard_index(images, 0).members, spans.tolist(), strict=True):
        torch.testing.assert_close(torch.from_numpy(vectors[first : first + rows]), by_class[classes[member.label]])
    if kind == "clip":
        with pytest.raises(UserError, match="has 5 positions: no more than 5 vectors"):
            text_encoder(encoder.name, 6)


def test_encoders_that_are_not_here_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    with pytest.raises(UserError, match=r"not in the Hub's cache \(.*\): fetch it with 'hf download owner/absent'"):
        text_encoder("t5:owner/absent")
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
