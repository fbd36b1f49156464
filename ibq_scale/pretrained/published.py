"""Reads and writes checkpoints of the published code. Every tensor is accounted for, and no pickled code runs.

A tokenizer has two sets of tensors: live under the names of its modules, averaged as ``model_ema.`` and the name
without dots. Files written here also hold the sizes (``ibq_scale``), since the tensors do not determine all of them.
"""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from ibq_scale.config.models import AutoencoderConfig, QuantizerConfig, TransformerConfig
from ibq_scale.errors import UserError
from ibq_scale.pretrained.huggingface import is_huggingface, read_huggingface, write_huggingface
from ibq_scale.pretrained.loading import Kind, fill_ar, layers_of, load_model, refuse_overwrite
from ibq_scale.pretrained.models import ARModel, Tokenizer
from ibq_scale.pretrained.strict import count_layers, fill_strictly, require_fit, require_layers
from ibq_scale.pretrained.wrappers import OWNERS_WAY, harmless, not_finite, refused, unwrap
from ibq_scale.quantize.kinds import KINDS

MODULES = ("encoder", "decoder", "quant_conv", "post_quant_conv")
CODEBOOK = "quantize.embedding.weight"
TOKEN_TABLE = "transformer.tok_emb.weight"
CLASS_TABLE = "transformer.class_emb.embedding_table.weight"
SIZES = "ibq_scale"
# Values of the published code beside its average: a constant decay, no count of updates.
EMA_DECAY, EMA_UPDATES = 0.999, -1


@dataclass(frozen=True)
class Imported:
    """The model, and the rest of the checkpoint: first parts of names with their numbers of tensors.

    `notes`: messages for the user, one line each.
    """

    model: Tokenizer | ARModel
    left_aside: dict[str, int]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Content:
    file: Path
    state: dict[str, Tensor]
    sizes: dict[str, Any]
    others: dict[str, int]
    notes: tuple[str, ...] = ()


def import_published(file: Path, *, ema: bool = False, heads: int | None = None, tokens: int | None = None) -> Imported:
    """Reads a tokenizer or AR checkpoint, or a folder (or its file) in the layout of Emu3.5's tokenizer.

    `ema`: take a tokenizer's averaged weights. No tensor determines an AR model's number of heads (default width / 64)
    and of codes an image (default 256). The defaults are those of the published models, or of the file's own sizes.

    UserError for another kind of file, pickled code, or missing tensors (named).
    """
    content = _unwrapped(file, *read_huggingface(file)) if is_huggingface(file) else _read(file)
    if TOKEN_TABLE in content.state:
        if ema:
            raise UserError(f"{file} is an AR checkpoint; its average (ema) is not stored there")
        return _transformer(content, heads, tokens)
    if any(_of_tokenizer(name) for name in content.state):
        return _tokenizer(content, ema)
    names = ", ".join(list(content.state)[:3]) or "no tensors"
    raise UserError(
        f"{file} is neither a tokenizer ('{CODEBOOK}') nor an AR checkpoint ('{TOKEN_TABLE}'): it has {names}"
    )


def export_published(path: Path, to: Path) -> Kind:
    """Writes the model at `path` (as for the loaders) to one file `to` for the published code.

    A model directory holds one set of a tokenizer's weights, so live and averaged ones are equal in the file.
    UserError if the model cannot be loaded, `to` exists, or the published code has no such model.
    """
    if to.exists():
        raise UserError(f"{to} is there already: give another --to, or remove it")
    model = load_model(path)
    if isinstance(model, Tokenizer):
        configs = {"model": model.model_config, "quantizer": model.quantizer_config}
        sizes: dict[str, Any] = {name: config.model_dump(mode="json") for name, config in configs.items()}
        content = {"state_dict": published_tokenizer(model), SIZES: sizes}
    else:
        config = model.config
        if (config.conditioning, config.kv_groups, config.qk_norm) != ("adaln", config.heads, False):
            raise UserError("the published layout has AdaLN, as many kv_heads as heads and no qk_norm: not this model")
        if config.order != "raster":
            raise UserError(
                "the published layout has no order embedding: export a model of order=annealed from the end of its run"
            )
        sizes = {"model": model.config.stored(), "tokenizer": model.tokenizer_hash}
        content = {"state_dict": dict(model.state_dict()), SIZES: sizes}
    to.parent.mkdir(parents=True, exist_ok=True)
    partial = to.with_name(f".{to.name}.partial")
    torch.save(content, partial)
    partial.rename(to)
    return "tokenizer" if isinstance(model, Tokenizer) else "ar"


def export_huggingface(path: Path, to: Path) -> Kind:
    """Writes the tokenizer at `path` to a folder `to` in the layout of Emu3.5's tokenizer.

    UserError as `export_published`.
    """
    refuse_overwrite(to)
    model = load_model(path)
    if not isinstance(model, Tokenizer):
        raise UserError(f"{path} is an AR transformer: that layout is a tokenizer's")
    live = {k: v for k, v in published_tokenizer(model).items() if not k.startswith("model_ema")}
    write_huggingface(to, live, model.model_config, model.quantizer_config)
    return "tokenizer"


def published_tokenizer(model: Tokenizer) -> dict[str, Tensor]:
    """The published ``state_dict``, live tensors first, since its loader expects a live name before its average."""
    kind = model.quantizer_config.kind
    if not KINDS[kind].published:
        known = " and ".join(name for name, other in KINDS.items() if other.published)
        raise UserError(f"the published layout has no '{kind}' quantizer: only {known} models can be written in it")
    if model.quantizer_config.l2_normalize:
        raise UserError("the published layout has no l2_normalize: its code would compare vectors of any length")
    live = {_published(name): tensor for name, tensor in model.state_dict().items()}
    average = {
        "model_ema.decay": torch.tensor(EMA_DECAY),
        "model_ema.num_updates": torch.tensor(EMA_UPDATES, dtype=torch.int32),
    }
    return live | average | {_averaged(name): tensor for name, tensor in live.items()}


def _read(file: Path) -> _Content:
    if file.exists() and not file.is_file():
        raise UserError(f"cannot read {file}: it is no regular file")
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(harmless()):
            # A warning about pickle protocols never written by torch.
            warnings.simplefilter("ignore", UserWarning)
            # Mapped, so optimizer states, most of a file, are never read. Old formats cannot be mapped.
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except FileNotFoundError:
        raise UserError(f"{file} not found") from None
    except OSError as e:
        raise UserError(f"cannot read {file}: {e.strerror or e}") from None
    except pickle.UnpicklingError as e:
        code = re.search(r"GLOBAL ([\w.]+)", str(e))
        if code is None:
            raise UserError(
                f"cannot read {file}: it is damaged, or no checkpoint, or holds other values than tensors and numbers: "
                f"{OWNERS_WAY}"
            ) from None
        raise refused(file, code[1]) from None
    except Exception as e:  # foreign bytes raise errors of any type in the unpickler
        raise UserError(f"cannot read {file}: it is cut short, damaged or no checkpoint ({type(e).__name__})") from None
    return _unwrapped(file, content)


def _unwrapped(file: Path, content: Any, sizes: Mapping[str, Any] | None = None) -> _Content:
    """`sizes`: from another file than the tensors, else those beside them."""
    try:
        tensors, beside, wrappers = unwrap(content, (CODEBOOK, TOKEN_TABLE))
    except UserError as e:
        raise UserError(f"{file}: {e}") from None
    own = beside.pop(SIZES, None)
    if sizes is None:
        sizes = own if isinstance(own, dict) else {}
    notes = (f"read without its wrappers: {', '.join(wrappers)}",) if wrappers else ()
    return _Content(file, tensors, dict(sizes), {k: _tensors_in(v) for k, v in beside.items()}, notes)


def _notes(content: _Content, weights: Mapping[str, Tensor]) -> tuple[str, ...]:
    broken = not_finite(weights)
    if not broken:
        return content.notes
    return (
        *content.notes,
        f"WARNING: {len(broken)} of {len(weights)} tensors hold nan or inf ({', '.join(broken[:3])}): so will all that "
        "is computed with them",
    )


def _tensors_in(value: object) -> int:
    if isinstance(value, dict):
        return sum(_tensors_in(v) for v in value.values())
    if isinstance(value, list | tuple):
        return sum(_tensors_in(v) for v in value)
    return int(isinstance(value, Tensor))


def _published(name: str) -> str:
    """The published name of one of `Tokenizer`'s tensors."""
    return CODEBOOK if name == "codebook_KD" else name.removeprefix("autoencoder.")


def _averaged(name: str) -> str:
    return "model_ema." + name.replace(".", "")


def _of_tokenizer(name: str) -> bool:
    return name == CODEBOOK or name.partition(".")[0] in MODULES


def _of_average(name: str) -> bool:
    return name == _averaged(CODEBOOK) or name.startswith(tuple(f"model_ema.{module}" for module in MODULES))


def _tokenizer(content: _Content, ema: bool) -> Imported:
    state, file = content.state, content.file
    sizes = _tokenizer_sizes(content)
    require_layers(state, layers_of(sizes[0]), str(file))
    with torch.device("meta"):
        model = Tokenizer(*sizes)
    wanted = {_published(name): tensor for name, tensor in model.state_dict().items()}
    if ema:
        dotted = {_averaged(name): name for name in wanted}
        weights = {dotted.get(k, k): v for k, v in state.items() if _of_average(k)}
        require_fit(wanted, weights, f"{file}, its average (model_ema.*)")
        used = {*dotted, "model_ema.decay", "model_ema.num_updates"}
    else:
        weights = {k: v for k, v in state.items() if _of_tokenizer(k)}
        require_fit(wanted, weights, str(file))
        used = {*weights}
    fill_strictly(model, {name: weights[_published(name)] for name in model.state_dict()}, file, torch.float32)
    return Imported(model, _left_aside(content, used), _notes(content, weights))


def _tokenizer_sizes(content: _Content) -> tuple[AutoencoderConfig, QuantizerConfig]:
    if content.sizes:
        try:
            return AutoencoderConfig(**content.sizes["model"]), QuantizerConfig(**content.sizes["quantizer"])
        except (KeyError, TypeError, ValidationError) as e:
            raise _foreign_sizes(content.file, e) from None
    state, file = content.state, content.file
    levels = count_layers(state, r"encoder\.down\.(\d+)\.", str(file))
    first = [f"encoder.down.{i}.block.0.conv1.weight" for i in range(max(levels, 1))]
    _require([CODEBOOK, "encoder.conv_in.weight", "encoder.conv_out.weight", *first], state, file)
    codes, dim = _sides(state[CODEBOOK], file)
    try:
        quantizer = QuantizerConfig(codebook_size=codes, dim=dim)
        return _autoencoder_sizes(content, [_side(state[name], file) for name in first]), quantizer
    except ValidationError as e:
        raise UserError(f"{file}: not the published autoencoder: {_line(e)}") from None


def _autoencoder_sizes(content: _Content, widths: list[int]) -> AutoencoderConfig:
    """Widths, depths and levels with attention. The nominal resolution makes the deepest level 16 wide."""
    state, file = content.state, content.file
    channels = _side(state["encoder.conv_in.weight"], file)
    resolution = 16 * 2 ** (len(widths) - 1)
    attended = [any(name.startswith(f"encoder.down.{i}.attn.") for name in state) for i in range(len(widths))]
    return AutoencoderConfig(
        channels=channels,
        channel_multipliers=tuple(width // channels for width in widths),
        res_blocks=count_layers(state, r"encoder\.down\.0\.block\.(\d+)\.", str(file)),
        attention_resolutions=tuple(resolution // 2**i for i, there in enumerate(attended) if there),
        resolution=resolution,
        z_channels=_side(state["encoder.conv_out.weight"], file),
    )


def _require(names: Collection[str], state: Mapping[str, Tensor], file: Path) -> None:
    absent = [name for name in names if name not in state]
    if absent:
        raise UserError(f"{file}: its sizes are unknown without {', '.join(absent)}")


def _sides(table: Tensor, file: Path) -> tuple[int, int]:
    if table.ndim != 2:
        raise UserError(f"{file}: a table of shape {tuple(table.shape)} instead of (rows, width)")
    return table.shape[0], table.shape[1]


def _side(weight: Tensor, file: Path) -> int:
    """The size of the first dimension. UserError if it is 0 or missing."""
    if not weight.ndim or not weight.shape[0]:
        raise UserError(f"{file}: a weight of shape {tuple(weight.shape)} instead of a layer with at least one channel")
    return weight.shape[0]


def _transformer(content: _Content, heads: int | None, tokens: int | None) -> Imported:
    weights = {k: v for k, v in content.state.items() if k.startswith("transformer.")}
    try:
        config = _transformer_sizes(content, heads, tokens)
    except ValidationError as e:
        raise UserError(f"{content.file}: {_line(e)}: give --heads and --tokens as it was trained") from None
    tokenizer = content.sizes.get("tokenizer")
    model = fill_ar(config, tokenizer if isinstance(tokenizer, str) else None, weights, content.file)
    return Imported(model, _left_aside(content, {*weights}), _notes(content, weights))


def _transformer_sizes(content: _Content, heads: int | None, tokens: int | None) -> TransformerConfig:
    given = {name: value for name, value in (("heads", heads), ("tokens", tokens)) if value is not None}
    if content.sizes:
        try:
            return TransformerConfig(**(content.sizes["model"] | given))
        except (KeyError, TypeError, ValidationError) as e:
            raise _foreign_sizes(content.file, e) from None
    _require([TOKEN_TABLE, CLASS_TABLE, "transformer.blocks.0.attention.wqkv.weight"], content.state, content.file)
    codes, width = _sides(content.state[TOKEN_TABLE], content.file)
    sizes = {
        "codebook_size": codes,
        "classes": _side(content.state[CLASS_TABLE], content.file) - 1,
        "depth": count_layers(content.state, r"transformer\.blocks\.(\d+)\.", str(content.file)),
        "heads": max(width // 64, 1),
        "width": width,
    }
    return TransformerConfig(**(sizes | given))


def _left_aside(content: _Content, used: set[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for key in content.state.keys() - used:
        # The losses' networks (discriminator, LPIPS) are listed separately.
        top = ".".join(key.split(".")[: 2 if key.startswith("loss.") else 1])
        counts[top] = counts.get(top, 0) + 1
    return dict(sorted(counts.items())) | content.others


def _foreign_sizes(file: Path, e: Exception) -> UserError:
    return UserError(f"{file}: its '{SIZES}' is of another version, or damaged: {_line(e)}")


def _line(e: Exception) -> str:
    if isinstance(e, ValidationError):
        return str(e.errors()[0]["msg"])
    return f"{type(e).__name__} {e}"
