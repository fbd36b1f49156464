"""Validation of a tokenizer: reconstructions of `validation.data`."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from ibq_scale.config.run import TokenizerRun
from ibq_scale.console import tell
from ibq_scale.data.sets import DataSets
from ibq_scale.data.stream import validation_images
from ibq_scale.distributed.agree import of_all_ranks
from ibq_scale.distributed.world import World
from ibq_scale.evaluate.reconstruction import FILES, Networks, measure
from ibq_scale.losses.weights import missing
from ibq_scale.pretrained.models import Tokenizer
from ibq_scale.supervise.compatible import open_held_out

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
