"""Validation of a transformer: the loss on held-out codes."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from ibq_scale.config.run import ARRun
from ibq_scale.data.sets import DataSets
from ibq_scale.data.stream import evaluation_codes
from ibq_scale.distributed.world import World
from ibq_scale.errors import UserError
from ibq_scale.evaluate.scores import gather_rows
from ibq_scale.models.condition import Condition
from ibq_scale.models.transformer import Transformer
from ibq_scale.supervise.compatible import check_codes, class_difference, open_held_out, same_classes
from ibq_scale.train.validation_tokenizer import reporting


class HeldOut:
    """Codes of `validation.data`. UserError for another tokenizer, other classes or the training data."""

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
                f"{class_difference(held_out, classes)}; 'prepare images --classes {run.data.sources[0]}' gives its "
                "pictures the same numbers"
            )

    @torch.no_grad()
    def loss(self, transformer: Transformer, progress: Callable[[], None]) -> float:
        """Mean cross-entropy per code, in nats. Collective, with the same value on all ranks.

        Each sample counts once for any number of ranks.
        """
        indices, losses = [], []
        batches = evaluation_codes(
            self.sets,
            rank=self.world.rank,
            world_size=self.world.size,
            batch=self.run.train.micro_batch,
            limit=self.run.validation.samples,
            conditions=self.run.model.conditioning == "embedding",
        )
        for batch, weights_B in reporting(batches, progress):
            codes_BT, labels_B = batch.codes.to(self.world.device), batch.labels.to(self.world.device)
            condition = Condition.of(batch.vectors, batch.lengths)
            condition = condition and condition.to(self.world.device)
            losses_B = transformer.losses(codes_BT, labels_B, condition).double().mean(dim=1)
            held = weights_B > 0
            indices.append(batch.requests[held, 0])
            losses.append(losses_B[held.to(losses_B.device)])
        losses_N = gather_rows(torch.cat(indices), torch.cat(losses)[:, None])
        return math.fsum(losses_N.flatten().tolist()) / len(losses_N)
