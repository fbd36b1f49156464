"""What a transformer's codes have to be, and the loss on those that it does not train on."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from ibq_scale.config.run import ARRun
from ibq_scale.data.manifest import CodesInfo, Manifest
from ibq_scale.data.sets import DataSets
from ibq_scale.data.stream import evaluation_codes
from ibq_scale.distributed.world import World
from ibq_scale.errors import UserError
from ibq_scale.evaluate.gather import gather_rows
from ibq_scale.models.transformer import Transformer
from ibq_scale.pretrained.loading import load_tokenizer
from ibq_scale.train.held_out import open_held_out, reporting


class HeldOut:
    """Codes of `validation.data`. UserError where they do not fit, or are what is trained on."""

    def __init__(self, run: ARRun, world: World, training: DataSets) -> None:
        self.run = run
        self.world = world
        self.sets = open_held_out(run, training, "codes")
        here, there = (check_codes(run, sets) for sets in (self.sets, training))
        if here.tokenizer != there.tokenizer:
            raise UserError(f"validation.data={run.validation.data} was written by another tokenizer than data.train")
        classes = max((part.manifest.classes for part in training.parts), key=len)
        held_out = self.sets.parts[0].manifest.classes
        if not same_classes(held_out, classes):
            raise UserError(
                f"validation.data={run.validation.data} has other classes than data.train: "
                f"{_differ(held_out, classes)}; 'prepare images --classes {run.data.sources[0]}' gives its pictures "
                "the same numbers"
            )

    @torch.no_grad()
    def loss(self, transformer: Transformer, progress: Callable[[], None]) -> float:
        """Mean cross-entropy a code, in nats. Collective, the same for all ranks.

        Each sample counts once whatever the number of ranks.
        """
        indices, losses = [], []
        batches = evaluation_codes(
            self.sets,
            rank=self.world.rank,
            world_size=self.world.size,
            batch=self.run.train.micro_batch,
            limit=self.run.validation.samples,
        )
        for batch, weights_B in reporting(batches, progress):
            codes_BT, labels_B = batch.codes.to(self.world.device), batch.labels.to(self.world.device)
            losses_B = transformer.losses(codes_BT, labels_B).double().mean(dim=1)
            held = weights_B > 0
            indices.append(batch.requests[held, 0])
            losses.append(losses_B[held.to(losses_B.device)])
        losses_N = gather_rows(torch.cat(indices), torch.cat(losses)[:, None])
        return math.fsum(losses_N.flatten().tolist()) / len(losses_N)


def check_codes(run: ARRun, sets: DataSets) -> CodesInfo:
    """Reads what the code shards say of themselves. UserError where they do not fit the model or the tokenizer."""
    parts = sets.parts
    for url, part in zip(sets.config.sources, parts, strict=True):
        _check_part(run, url, part.manifest)
        if _codes(part.manifest).tokenizer != _codes(parts[0].manifest).tokenizer:
            raise UserError(f"{url} was written by another tokenizer than {sets.config.sources[0]}")
        classes = [p.manifest.classes for p in (part, parts[0])]
        if not same_classes(*classes) and not same_classes(*classes[::-1]):
            raise UserError(
                f"{url} has other classes than {sets.config.sources[0]}: {_differ(*classes)}; 'prepare images "
                "--classes' gives the pictures of one set the numbers of another's"
            )
    info = _codes(parts[0].manifest)
    if run.tokenizer is not None and load_tokenizer(run.tokenizer).hash != info.tokenizer:
        raise UserError(
            f"{sets.config.sources[0]} was written by another tokenizer than {run.tokenizer}: "
            f"run ibq-scale tokenize with this one, or set tokenizer=null"
        )
    return info


def same_classes(some: tuple[str, ...], more: tuple[str, ...]) -> bool:
    """Whether each of `some` has its number among `more`: classes are the same by their names."""
    return some == more[: len(some)]


def _differ(some: tuple[str, ...], more: tuple[str, ...]) -> str:
    """The first number that names two classes."""
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
    if len(manifest.classes) > run.model.classes:
        raise UserError(
            f"{url} has {len(manifest.classes)} classes, the model {run.model.classes}: "
            f"set model.classes={len(manifest.classes)}"
        )


def _codes(manifest: Manifest) -> CodesInfo:
    assert manifest.codes is not None
    return manifest.codes
