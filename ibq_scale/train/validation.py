"""Validation on `validation.data`: a tokenizer's reconstructions, a transformer's loss."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch

from ibq_scale.config.run import ARRun, TokenizerRun
from ibq_scale.console import tell
from ibq_scale.data.sets import DataSets
from ibq_scale.data.stream import evaluation_codes, validation_images
from ibq_scale.distributed.agree import of_all_ranks
from ibq_scale.distributed.world import World
from ibq_scale.errors import UserError
from ibq_scale.evaluate.reconstruction import FILES, Networks, measure
from ibq_scale.evaluate.scores import gather_rows
from ibq_scale.losses.weights import missing
from ibq_scale.models.condition import Condition
from ibq_scale.models.transformer import Transformer
from ibq_scale.pretrained.models import Tokenizer
from ibq_scale.supervise.compatible import check_codes, class_difference, open_held_out, same_classes

# By default. AlexNet's LPIPS adds little to VGG's.
METRICS = ("lpips", "rfid")

log = logging.getLogger(__name__)
T = TypeVar("T")


def reporting(batches: Iterable[T], progress: Callable[[], None]) -> Iterator[T]:
    """The same batches. Calls `progress` for each."""
    for batch in batches:
        progress()
        yield batch


class HeldOutImages:
    """Images of `validation.data` and the networks of the metrics. Collective.

    UserError for unusable data, the training data, and a missing file of a named metric.
    """

    def __init__(self, run: TokenizerRun, world: World, training: DataSets) -> None:
        self.run = run
        self.world = world
        self.sets = open_held_out(run, training, "images")
        named = run.validation.metrics
        self.networks = Networks(world.device, _cached_everywhere(world) if named is None else named)

    def measure(self, tokenizer: Tokenizer, progress: Callable[[], None]) -> dict[str, float]:
        """The metrics of ``evaluate reconstruction``, of 8-bit pixels. Collective, with equal values on all ranks."""
        stream = validation_images(
            self.sets,
            resolution=self.run.model.resolution,
            rank=self.world.rank,
            world_size=self.world.size,
            batch=self.run.train.micro_batch,
            limit=self.run.validation.samples,
            crops=self.run.crop_sizes if self.sets.config.aspects else (),
        )
        values, _, _ = measure(tokenizer, self.networks, reporting(stream, progress), self.world)
        # A perfect reconstruction, for example of a black image, has an infinite PSNR. It must not end the run.
        return {name: value for name, value in values.items() if value is not None and math.isfinite(value)}


def _cached_everywhere(world: World) -> list[str]:
    """Those of `METRICS` with their files on every rank. Rank 0 reports the others with the reason."""
    faults: dict[str, str] = {}
    here = {name: fault for name in METRICS if (fault := missing(FILES[name])) is not None}
    for found in of_all_ranks(world, here):
        faults |= found
    for name, fault in faults.items():
        log.warning("validation does not measure %s: %s", name, fault)
        if world.is_main:
            tell(f"validation does not measure {name}: {fault}")
    return [name for name in METRICS if name not in faults]


class HeldOutCodes:
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
