"""Checkpoints of the published code: sizes read off the tensors, every tensor accounted for, no pickled code run."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ibq_scale.config.models import AutoencoderConfig, QuantizerConfig, TransformerConfig
from ibq_scale.errors import UserError
from ibq_scale.pretrained.loading import ARModel, Tokenizer, fill_strictly

AUTOENCODER = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
CODEBOOK = "quantize.embedding.weight"


@dataclass(frozen=True)
class Imported:
    """The model, and the checkpoint's other top-level names with how many tensors each had."""

    model: Tokenizer | ARModel
    ignored: dict[str, int]


def import_published(file: Path, *, ema: bool = False, heads: int | None = None, tokens: int = 256) -> Imported:
    """Reads a tokenizer or AR checkpoint.

    `ema` takes a tokenizer's averaged weights. An AR model's number of heads (default width / 64) and of codes an
    image (`tokens`) stand in no tensor; the defaults are the published models'.

    Raises UserError for a file that is neither, holds pickled code, or lacks tensors (named).
    """
    state = _read(file)
    if CODEBOOK in state:
        return _tokenizer(state, ema, file)
    if "transformer.tok_emb.weight" in state:
        if ema:
            raise UserError(f"{file} is an AR checkpoint; its average (ema) is not stored there")
        return _transformer(state, heads, tokens, file)
    raise UserError(f"{file} is neither a tokenizer ('{CODEBOOK}') nor an AR checkpoint ('transformer.tok_emb.weight')")


def _read(file: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{file} not found") from None
    except pickle.UnpicklingError:
        raise UserError(f"{file} holds more than tensors, and running code from a checkpoint is refused") from None
    except Exception as e:  # the unpickler meets foreign bytes with errors of any type
        raise UserError(f"cannot read {file}: {(str(e).splitlines() or [''])[0]} ({type(e).__name__})") from None
    state = content.get("state_dict", content) if isinstance(content, dict) else {}
    return {k: v for k, v in state.items() if isinstance(v, Tensor)}


def _tokenizer(state: Mapping[str, Tensor], ema: bool, file: Path) -> Imported:
    names = [k for k in state if k.startswith(AUTOENCODER) or k == CODEBOOK]
    weights = {k: state[k] for k in names}
    if ema:
        averaged = {k: "model_ema." + k.replace(".", "") for k in names}
        absent = [k for k in averaged.values() if k not in state]
        if absent:
            raise UserError(f"{file} has no whole average: {absent[0]} is missing")
        weights = {k: state[a] for k, a in averaged.items()}
    codes, dim = state[CODEBOOK].shape
    model = Tokenizer(_autoencoder_sizes(state, file), QuantizerConfig(codebook_size=codes, dim=dim))
    tensors = {f"autoencoder.{k}": v for k, v in weights.items() if k != CODEBOOK}
    fill_strictly(model, tensors | {"codebook_KD": weights[CODEBOOK]}, file)
    return Imported(model, _others(state, {*names}))


def _autoencoder_sizes(state: Mapping[str, Tensor], file: Path) -> AutoencoderConfig:
    """Widths, depths and where attention sits. The nominal resolution is set so that the deepest level is 16 wide."""
    try:
        channels = state["encoder.conv_in.weight"].shape[0]
        levels = 1 + max(int(m[1]) for k in state if (m := re.match(r"encoder\.down\.(\d+)\.", k)))
        blocks = 1 + max(int(m[1]) for k in state if (m := re.match(r"encoder\.down\.0\.block\.(\d+)\.", k)))
        widths = [state[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels)]
        z_channels = state["encoder.conv_out.weight"].shape[0]
    except (KeyError, ValueError) as e:
        raise UserError(f"{file}: not the published autoencoder: {e} is missing") from None
    resolution = 16 * 2 ** (levels - 1)
    attention = [resolution // 2**i for i in range(levels) if f"encoder.down.{i}.attn.0.q.weight" in state]
    return AutoencoderConfig(
        channels=channels,
        channel_multipliers=tuple(w // channels for w in widths),
        res_blocks=blocks,
        attention_resolutions=tuple(attention),
        resolution=resolution,
        z_channels=z_channels,
    )


def _transformer(state: Mapping[str, Tensor], heads: int | None, tokens: int, file: Path) -> Imported:
    weights = {k: v for k, v in state.items() if k.startswith("transformer.")}
    codes, width = state["transformer.tok_emb.weight"].shape
    table = "transformer.class_emb.embedding_table.weight"
    if table not in state:
        raise UserError(f"{file}: {table} is missing")
    depth = 1 + max(int(m[1]) for k in weights if (m := re.match(r"transformer\.blocks\.(\d+)\.", k)))
    config = TransformerConfig(
        codebook_size=codes,
        classes=state[table].shape[0] - 1,
        tokens=tokens,
        depth=depth,
        heads=heads or width // 64,
        width=width,
    )
    model = ARModel(config, tokenizer=None)
    fill_strictly(model, weights, file)
    return Imported(model, _others(state, {*weights}))


def _others(state: Mapping[str, Tensor], used: set[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for key in state.keys() - used:
        top = key.partition(".")[0]
        counts[top] = counts.get(top, 0) + 1
    return counts
