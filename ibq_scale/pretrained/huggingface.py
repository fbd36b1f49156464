"""The layout of ``BAAI/Emu3.5-VisionTokenizer`` and its twin for transformers: ``config.json`` and safetensors.

Its modules have the published code's names. Only the sizes have other keys.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ibq_scale.config.models import AutoencoderConfig, QuantizerConfig
from ibq_scale.documents import read_json
from ibq_scale.errors import UserError
from ibq_scale.names import file_name, is_inside

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
MODEL_TYPE = "Emu3p5VisionVQ"
# Its keys, and ours.
MODEL_KEYS = {
    "z_channels": "z_channels",
    "ch": "channels",
    "ch_mult": "channel_multipliers",
    "num_res_blocks": "res_blocks",
    "attn_resolutions": "attention_resolutions",
    "resolution": "resolution",
}
QUANTIZER_KEYS = {"codebook_size": "codebook_size", "embed_dim": "dim"}


def is_huggingface(path: Path) -> bool:
    """Whether `path` is a folder, or a file, of this layout."""
    return path.suffix == ".safetensors" or (path / WEIGHTS).is_file() or (path / INDEX).is_file()


def read_huggingface(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, and the sizes as ``model`` and ``quantizer`` (none without a ``config.json``).

    UserError if either is unreadable or of another model.
    """
    folder = path.parent if path.suffix == ".safetensors" else path
    tensors: dict[str, Tensor] = {}
    for file in [path] if path is not folder else _files(folder):
        try:
            tensors |= load_file(file)
        except (OSError, SafetensorError, ValueError) as e:
            raise UserError(f"cannot read {file}: {e}") from None
    config = folder / CONFIG
    if not config.is_file():
        return tensors, {}
    try:
        values = read_json(config)
        return tensors, _sizes(values)
    except (OSError, ValueError, KeyError, TypeError) as e:
        said = e.errors()[0]["msg"] if isinstance(e, ValidationError) else f"{type(e).__name__} {e}"
        raise UserError(f"{config} is no config of a '{MODEL_TYPE}': {said}") from None


def write_huggingface(
    to: Path, tensors: Mapping[str, Tensor], model: AutoencoderConfig, quantizer: QuantizerConfig
) -> None:
    """Writes a folder of this layout in fp32, since half precision would change codes."""
    config = {
        "architectures": [f"{MODEL_TYPE}Model"],
        "model_type": MODEL_TYPE,
        **{key: getattr(quantizer, name) for key, name in QUANTIZER_KEYS.items()},
        **{key: getattr(model, name) for key, name in MODEL_KEYS.items()},
        "double_z": False,
        "in_channels": 3,
        "out_channels": 3,
        "dropout": 0.0,
        "torch_dtype": "float32",
    }
    write_folder(to, tensors, config)


def write_folder(to: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Writes what transformers calls a pretrained model: ``config.json``, and the weights in fp32."""
    to.mkdir(parents=True, exist_ok=True)
    whole = {name: tensor.detach().cpu().float().contiguous() for name, tensor in tensors.items()}
    save_file(whole, to / WEIGHTS, metadata={"format": "pt"})
    (to / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _sizes(values: Any) -> dict[str, Any]:
    if values["model_type"] != MODEL_TYPE:
        raise ValueError(f"model_type is {values['model_type']!r:.50}")
    if values.get("double_z") or values.get("in_channels", 3) != 3 or values.get("out_channels", 3) != 3:
        raise ValueError("double_z is true, or there are other channels than 3")
    model = AutoencoderConfig(**{name: values[key] for key, name in MODEL_KEYS.items()})
    quantizer = QuantizerConfig(**{name: values[key] for key, name in QUANTIZER_KEYS.items()})
    return {"model": model.model_dump(mode="json"), "quantizer": quantizer.model_dump(mode="json")}


def _files(folder: Path) -> list[Path]:
    """The single file, or all files in the index."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    try:
        names = sorted({file_name(name) for name in read_json(folder / INDEX)["weight_map"].values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{folder / INDEX} is damaged: {e}") from None
    outside = [name for name in names if not is_inside(folder, name)]
    if outside:
        raise UserError(f"{folder / INDEX} names {outside[0]}, which is outside of it")
    return [folder / name for name in names]
