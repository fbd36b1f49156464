"""Exports models to folders, from a run or from a file of the published code, each with a model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ibq_scale.checkpoint.reading import MANIFEST, read_checkpoint
from ibq_scale.pretrained.loading import (
    Kind,
    config_of,
    load_model,
    model_directory,
    refuse_overwrite,
    save_ar,
    save_tokenizer,
)
from ibq_scale.pretrained.models import ARModel, Tokenizer
from ibq_scale.quantize.kinds import KINDS

CARD = "README.md"
# Logged metrics that belong on a card.
SHOWN = ("loss", "l1", "perceptual", "usage", "perplexity", "validation")


def export(path: Path, to: Path) -> Kind:
    """Writes the model at `path` (as for the loaders) to a model directory, with the codebook in one file.

    Returns its kind. UserError if it cannot be loaded completely, or `to` exists.
    """
    refuse_overwrite(to)
    folder = model_directory(path)
    source = config_of(folder).get("source", {}) | {"exported_from": str(path)}
    of_a_run = (folder.parent / MANIFEST).is_file()
    training = read_checkpoint(folder.parent).manifest if of_a_run else None
    return save_model(to, load_model(folder), source, training)


def save_model(
    to: Path, model: Tokenizer | ARModel, source: Mapping[str, Any], training: Mapping[str, Any] | None = None
) -> Kind:
    """Writes a model and its card. `source`: its origin. `training`: the checkpoint's manifest, if any."""
    kind: Kind
    if isinstance(model, Tokenizer):
        save_tokenizer(to, model, source)
        kind, body = "tokenizer", _tokenizer(model, to.name)
    else:
        save_ar(to, model, source)
        kind, body = "ar", _transformer(model, to.name)
    parts = [body, _origin(source), _training(training) if training is not None else ""]
    (to / CARD).write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    return kind


def _head(tag: str) -> str:
    return f"---\nlibrary_name: ibq_scale\ntags: [{tag}, discrete-image-tokenizer]\n---\n\n"


def _parameters(model: Tokenizer | ARModel) -> str:
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:,.1f}M parameters"


def _tokenizer(model: Tokenizer, name: str) -> str:
    side, quantizer = model.model_config.resolution, model.quantizer_config
    grid = side // model.downsampling
    return (
        f"{_head('image-tokenizer')}# {name}\n\nAn image tokenizer: pictures of {side} × {side} pixels (or any sides "
        f"that {model.downsampling} divides) become {grid} × {grid} codes, and codes become pictures. "
        f"Its codebook of {quantizer.codebook_size:,} codes × {quantizer.dim} is that of "
        f"{KINDS[quantizer.kind].words}{', tokens and codes of unit length' * quantizer.l2_normalize}. "
        f"{_parameters(model)}.\n\n```python\nimport ibq_scale\n\n"
        f'tokenizer = ibq_scale.load_tokenizer("{name}")\n'
        "codes = tokenizer.encode(images)  # float (B, 3, H, W) in [-1, 1] → int64 (B, h, w)\n"
        "images = tokenizer.decode(codes)\n```\n\n"
        f"Hash of sizes and weights, which code shards carry: `{model.hash}`."
    )


def _transformer(model: ARModel, name: str) -> str:
    config = model.config
    by, given, asked = "class-conditional", f"{config.classes:,} classes", "labels"
    if config.conditioning == "embedding":
        by, asked = "text-conditional", 'labels, condition=["a cat"]'
        encoder = model.encoder.encoder if model.encoder else "a text encoder"
        given = f"up to {config.condition_tokens} vectors of {encoder}"
    codes = f" Its codes are those of tokenizer `{model.tokenizer_hash}`." if model.tokenizer_hash else ""
    return (
        f"{_head('autoregressive-image-generation')}# {name}\n\nA {by} transformer over {config.tokens} "
        f"codes of {config.codebook_size:,}, {given}: {config.depth} blocks, {config.heads} heads, "
        f"width {config.width}. {_parameters(model)}.{codes}\n\n```python\nimport ibq_scale\n\n"
        f'ar = ibq_scale.load_ar("{name}")\n'
        f"codes = ar.generate({asked}, guidance=2.0, seed=0)  # int64 (B, T), raster order\n```"
    )


def _origin(source: Mapping[str, Any]) -> str:
    """The imported file's name. Paths on the exporting machine are private and left out."""
    file = source.get("imported_from")
    return f"Imported from `{file}`{', averaged weights' if source.get('ema') else ''}." if file else ""


def _training(manifest: Mapping[str, Any]) -> str:
    config, metrics = manifest["config"], manifest.get("metrics") or {}
    rows = {
        "run": config["name"],
        "optimizer steps": f"{manifest['step']:,}",
        "images seen": f"{manifest['samples']:,}",
        "global batch": f"{config['train']['global_batch']:,}",
        "data (sha256 of its manifests)": manifest["data_hash"],
        **{n: f"{v:.4g}" for n, v in metrics.items() if n.startswith(SHOWN)},
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    seen = {key: config[key] for key in ("model", "quantizer", "loss", "optimizer", "schedule") if key in config}
    settings = json.dumps(seen, indent=1)
    details = f"<details><summary>Settings</summary>\n\n```json\n{settings}\n```\n\n</details>"
    return f"## Training\n\n| | |\n|---|---|\n{table}\n\n{details}"
