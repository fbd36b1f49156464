"""Checks before a run continues: the same networks and samples, fitting codes, held-out data of its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ibq_scale.checkpoint.reading import Checkpoint
from ibq_scale.config.run import AnyRun, ARRun
from ibq_scale.data.manifest import CodesInfo, Kind, Manifest
from ibq_scale.data.sets import DataSets, open_sets
from ibq_scale.errors import UserError
from ibq_scale.pretrained.loading import load_tokenizer

# A run continues a checkpoint only with the same networks and the same stream of samples.
FIXED = ("task", "model", "quantizer", "discriminator")
# Keys of how a network is computed. They may change when a run continues.
FREE = {"backend", "logit_precision", "search", "tile_bytes", "revive_after", "attention"}
FREE |= {"activation_checkpointing", "compile", "fp8"}
# With the values of checkpoints older than a key: they have version 1 of the order, and squares.
FIXED_DATA: dict[str, Any] = {"order": 1, "lanes": None, "window": None, "weights": [], "aspects": []}


def check_same_run(config: AnyRun, checkpoint: Checkpoint) -> None:
    """UserError for a checkpoint of another model or another stream of samples."""
    saved, now = checkpoint.manifest["config"], config.model_dump(mode="json")
    sections = [name for name in FIXED[1:] if name in saved and hasattr(config, name)]
    # Checkpoints of older releases have fewer keys.
    defaults = {name: type(getattr(config, name))().model_dump(mode="json") for name in sections}
    saved = saved | {name: defaults[name] | saved[name] for name in sections}
    for section in FIXED:
        if _what(saved.get(section)) != _what(now.get(section)):
            raise UserError(
                f"{checkpoint.path} is a checkpoint of another model: '{section}' has "
                f"{_difference(saved, now, section)}. Give another out=… or the same config"
            )
    # Checkpoints older than the key are Adam's.
    kind = saved.get("optimizer", {}).get("kind", "adam")
    if config.optimizer.kind != kind:
        raise UserError(
            f"{checkpoint.path}: optimizer.kind was {kind}, and no other can continue its state. Keep it, or begin "
            f"from the weights alone with another out=… and init={checkpoint.path}"
        )
    for key, old in FIXED_DATA.items():
        before = saved["data"].get(key, old)
        if now["data"][key] not in (None, before):
            raise UserError(f"{checkpoint.path}: data.{key} was {before}; the order of samples depends on it")
    frozen = saved["train"].get("freeze", [])
    if sorted(frozen) != sorted(now["train"].get("freeze", [])):
        raise UserError(
            f"{checkpoint.path}: train.freeze was {frozen}; what a frozen part holds depends on it. Give another out=…"
        )
    for key in ("seed", "global_batch"):
        if saved["train"][key] != now["train"][key]:
            raise UserError(
                f"{checkpoint.path}: train.{key} was {saved['train'][key]}; the order of samples depends on it"
            )


def check_same_data(config: AnyRun, checkpoint: Checkpoint, data_hash: str) -> None:
    """UserError if a position now means another sample."""
    if checkpoint.manifest["data_hash"] != data_hash:
        raise UserError(
            f"{checkpoint.path}: {', '.join(config.data.sources)} holds other data than before (the manifests "
            f"differ), so the order of samples would change. Give the same data, or another out=…"
        )


def open_held_out(run: AnyRun, training: DataSets, kind: Kind) -> DataSets:
    """The data at `validation.data`, in the run's aspects if it was prepared in them, else in squares.

    UserError for unusable data and for the training data.
    """
    sets = open_sets(run.data.model_copy(update={"train": run.validation.data, "weights": (), "aspects": ()}), kind)
    if {part.manifest.hash for part in sets.parts} & {part.manifest.hash for part in training.parts}:
        raise UserError(f"validation.data={run.validation.data} is what the run trains on: give {kind} of its own")
    aspects = sets.parts[0].manifest.aspects
    if aspects is None or aspects.names != run.data.aspects:
        return sets
    return replace(sets, config=sets.config.model_copy(update={"aspects": aspects.names}), batch=1)


def check_codes(run: ARRun, sets: DataSets) -> CodesInfo:
    """The description in the code shards. UserError if it does not fit the model or the tokenizer."""
    parts = sets.parts
    for url, part in zip(sets.config.sources, parts, strict=True):
        _check_part(run, url, part.manifest)
        if _codes(part.manifest).tokenizer != _codes(parts[0].manifest).tokenizer:
            raise UserError(f"{url} was written by another tokenizer than {sets.config.sources[0]}")
        encoders = [stored.encoder for p in (part, parts[0]) if (stored := _codes(p.manifest).condition) is not None]
        if run.model.conditioning == "embedding" and len(set(encoders)) > 1:
            raise UserError(f"{url} has conditions of {encoders[0]}, {sets.config.sources[0]} those of {encoders[1]}")
        classes = [p.manifest.classes for p in (part, parts[0])]
        if not same_classes(*classes) and not same_classes(*classes[::-1]):
            raise UserError(
                f"{url} has other classes than {sets.config.sources[0]}: {class_difference(*classes)}; 'prepare images "
                "--classes' gives the pictures of one set the numbers of another's"
            )
    info = _codes(parts[0].manifest)
    if run.tokenizer is not None and not load_tokenizer(run.tokenizer).has_codes_of(info.tokenizer):
        raise UserError(
            f"{sets.config.sources[0]} was written by another tokenizer than {run.tokenizer}: "
            f"run ibq-scale tokenize with this one, or set tokenizer=null"
        )
    return info


def same_classes(some: tuple[str, ...], more: tuple[str, ...]) -> bool:
    """Whether each class name of `some` has the same number in `more`."""
    return some == more[: len(some)]


def class_difference(some: tuple[str, ...], more: tuple[str, ...]) -> str:
    """The first number with two names, in words."""
    number = next((i for i, names in enumerate(zip(some, more, strict=False)) if names[0] != names[1]), len(more))
    return f"number {number} is '{some[number]}' there and {repr(more[number]) if number < len(more) else 'none'} here"


def _check_part(run: ARRun, url: str, manifest: Manifest) -> None:
    info = _codes(manifest)
    if info.codebook_size != run.model.codebook_size:
        raise UserError(
            f"{url} holds codes of a codebook of {info.codebook_size}, the model expects "
            f"{run.model.codebook_size}: set model.codebook_size={info.codebook_size}"
        )
    tokens = info.grid[0] * info.grid[1]
    if tokens != run.model.tokens:
        raise UserError(
            f"{url} has {tokens} codes an image, the model expects {run.model.tokens}: set model.tokens={tokens}"
        )
    stored = info.condition
    if run.model.conditioning == "embedding":
        if stored is None:
            raise UserError(f"{url} holds no conditions: write its codes with 'ibq-scale tokenize --captions'")
        if (stored.tokens, stored.width) != (run.model.condition_tokens, run.model.condition_width):
            raise UserError(
                f"{url} has conditions of {stored.tokens} vectors of {stored.width}: set "
                f"model.condition_tokens={stored.tokens} model.condition_width={stored.width}"
            )
        return
    if len(manifest.classes) > run.model.classes:
        raise UserError(
            f"{url} has {len(manifest.classes)} classes, the model {run.model.classes}: "
            f"set model.classes={len(manifest.classes)}"
        )


def _codes(manifest: Manifest) -> CodesInfo:
    assert manifest.codes is not None
    return manifest.codes


def _what(section: object) -> object:
    return {k: v for k, v in section.items() if k not in FREE} if isinstance(section, dict) else section


def _difference(saved: dict[str, object], now: dict[str, object], section: str) -> str:
    before, after = saved.get(section), now.get(section)
    if isinstance(before, dict) and isinstance(after, dict):
        changed = [k for k in sorted({*before, *after} - FREE) if before.get(k) != after.get(k)]
        return ", ".join(f"{k}={before.get(k)} there and {after.get(k)} here" for k in changed)
    return f"{before} there and {after} here"
