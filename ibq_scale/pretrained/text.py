"""Text encoders for `model.conditioning=embedding`, and captions of prepared images.

``hash`` gives each word a fixed random vector: no weights, for tests and small sets of words. ``t5:NAME`` and
``clip:NAME`` are encoders of transformers, in the Hub's cache or in a folder. Nothing is fetched here.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ibq_scale.data.manifest import ConditionInfo
from ibq_scale.documents import parse_json
from ibq_scale.errors import UserError
from ibq_scale.models.condition import Condition, padded
from ibq_scale.models.initial import generator_of

HASH_WIDTH, HASH_TOKENS = 64, 16
# Classes of transformers by kind, and the longest captions of LlamaGen (T5) and of CLIP.
KINDS = {"t5": ("T5EncoderModel", 120), "clip": ("CLIPTextModel", 77)}
# Captions encoded at a time.
BATCH = 64


class TextEncoder(NamedTuple):
    """`encode`: captions → vectors fp32 (l, width) each on the CPU, cut after `tokens`."""

    name: str
    width: int
    tokens: int
    encode: Callable[[Sequence[str]], list[Tensor]]

    def condition(self, captions: Sequence[str]) -> Condition:
        return padded(self.encode(captions), self.tokens)


def text_encoder(name: str, tokens: int | None = None, device: torch.device | str = "cpu") -> TextEncoder:
    """``hash``, ``hash:WIDTH``, ``t5:NAME`` or ``clip:NAME`` (on the Hub, or a folder). `tokens`: default of the kind.

    UserError for other names, a model that is not in the Hub's cache, and more `tokens` than its positions.
    """
    kind, _, rest = name.partition(":")
    if kind == "hash" and (rest or str(HASH_WIDTH)).isdecimal() and int(rest or HASH_WIDTH) > 0:
        width, limit = int(rest or HASH_WIDTH), tokens or HASH_TOKENS
        return TextEncoder(name, width, limit, lambda captions: [_hashed(c, width)[:limit] for c in captions])
    if kind not in KINDS or not rest:
        raise UserError(f"text encoder {name}: write hash, hash:WIDTH, t5:OWNER/NAME or clip:OWNER/NAME")
    return _of_transformers(name, kind, rest, tokens, device)


def encoder_of(info: ConditionInfo, device: torch.device | str = "cpu") -> TextEncoder:
    """The encoder of stored vectors. UserError if it is not available, or is another one by now."""
    encoder = text_encoder(info.encoder, info.tokens, device)
    if encoder.width != info.width:
        raise UserError(f"text encoder {info.encoder} gives {encoder.width} wide vectors, {info.width} are needed")
    return encoder


def _hashed(caption: str, width: int) -> Tensor:
    """A vector from N(0, 1) for each word, (words, width), a function of the word in lower case."""
    words = re.findall(r"\w+", caption.lower())
    return torch.cat([torch.empty(0, width), *(torch.randn(1, width, generator=generator_of(word)) for word in words)])


def _of_transformers(name: str, kind: str, model: str, asked: int | None, device: torch.device | str) -> TextEncoder:
    try:
        import transformers  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise UserError(f"text encoder {name} needs transformers: pip install transformers, or take hash") from None
    try:
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(model, local_files_only=True)
        network: Any = getattr(transformers, KINDS[kind][0]).from_pretrained(model, local_files_only=True)
    except (OSError, ValueError) as e:
        raise UserError(
            f"text encoder {name} is not in the Hub's cache ({str(e).splitlines()[0]:.100}): "
            f"fetch it with 'hf download {model}' where there is a network"
        ) from None
    # T5's positions are relative, and have no end.
    most = getattr(network.config, "max_position_embeddings", None) or KINDS[kind][1]
    tokens = asked or min(KINDS[kind][1], most)
    if kind == "clip" and tokens > most:
        raise UserError(f"text encoder {name} has {most} positions: no more than {most} vectors a caption are possible")
    # A checkpoint may be in fp16, and T5 overflows in it.
    network.to(device, torch.float32).eval()

    @torch.inference_mode()
    def encode(captions: Sequence[str]) -> list[Tensor]:
        rows: list[Tensor] = []
        for first in range(0, len(captions), BATCH):
            part = list(captions[first : first + BATCH])
            inputs = tokenizer(part, padding=True, truncation=True, max_length=tokens, return_tensors="pt").to(device)
            hidden_BLC, mask_BL = network(**inputs).last_hidden_state.cpu(), inputs["attention_mask"].bool().cpu()
            rows += [hidden_LC[mask_L] for hidden_LC, mask_L in zip(hidden_BLC, mask_BL, strict=True)]
        return rows

    return TextEncoder(name, int(network.config.hidden_size), tokens, encode)


class Captions:
    """Captions by the key of an image, its path in the source, or its class.

    A file has lines of JSON, ``{"key": …, "caption": …}``, or of ``KEY<TAB>CAPTION``. ``classes`` takes the names of
    the classes as captions. UserError for unreadable files.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self._by_key: dict[str, str] | None = None
        text = source.encode()
        if source != "classes":
            try:
                text = Path(source).read_bytes()
                self._by_key = dict(_line(line) for line in text.decode().splitlines() if line.strip())
            except (OSError, ValueError, KeyError, TypeError) as e:
                raise UserError(
                    f"--captions {source}: {e}: give lines of KEY, a tab and the caption, or of "
                    '{"key": …, "caption": …}, or the word classes'
                ) from None
        self.hash = hashlib.sha256(text).hexdigest()
        """sha256 (hex) of the file."""

    def of(self, key: str, path: str, class_name: str) -> str:
        """An image's caption. UserError if it has none."""
        if self._by_key is None:
            return class_name.replace("_", " ")
        for name in (key, path, class_name):
            if name in self._by_key:
                return self._by_key[name]
        raise UserError(f"--captions {self.source} has no caption for {path} (key {key}, class {class_name})")


def _line(line: str) -> tuple[str, str]:
    if line.lstrip().startswith("{"):
        values = parse_json(line)
        return str(values["key"]), str(values["caption"])
    key, tab, caption = line.partition("\t")
    if not tab:
        raise ValueError(f"no tab in {json.dumps(line[:60])}")
    return key, caption
