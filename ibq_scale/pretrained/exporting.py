"""Exports models to folders, from a run or from a file of the published code, each with a card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ibq_scale.checkpoint.reading import MANIFEST, read_checkpoint
from ibq_scale.pretrained.card import write_card
from ibq_scale.pretrained.loading import (
    ARModel,
    Kind,
    Tokenizer,
    config_of,
    load_model,
    model_directory,
    refuse_overwrite,
    save_ar,
    save_tokenizer,
)


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
        kind = "tokenizer"
        save_tokenizer(to, model, source)
    else:
        kind = "ar"
        save_ar(to, model, source)
    write_card(to, model, source, training)
    return kind
