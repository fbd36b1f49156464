"""Lists the samples of a training step and their ranks, e.g. to examine a spike of the loss."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ibq_scale.config.layers import load_resolved
from ibq_scale.config.run import AnyRun, TokenizerRun
from ibq_scale.data.images import shard_index
from ibq_scale.data.sets import DataSets, open_sets
from ibq_scale.errors import UserError


@dataclass(frozen=True)
class Traced:
    """One sample of the step. `key` and `source` (the original file) are known for images only."""

    rank: int
    position: int
    epoch: int
    shard: str
    row: int
    label: int | None
    key: str | None
    source: str | None


def trace(run_dir: Path, step: int, ranks: int) -> list[Traced]:
    """The samples of optimizer step `step` (the first is 1), by position, for a run on `ranks` ranks.

    Reads only the run's config and the data's manifests and indices. UserError if they cannot be read, the step is
    outside the run, or `ranks` times the micro-batch does not divide the global batch.
    """
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run_dir} is no run directory: it has no config.yaml")
    config = load_resolved(path)
    train = config.train
    if not 1 <= step <= train.total_steps:
        raise UserError(f"--step {step}: the run has steps 1 to {train.total_steps}")
    if train.global_batch % (train.micro_batch * ranks):
        raise UserError(f"--ranks {ranks} does not divide the run's batches of {train.global_batch}")
    return _trace(config, step, ranks)


def _trace(config: AnyRun, step: int, ranks: int) -> list[Traced]:
    images = isinstance(config, TokenizerRun)
    # No cache: it belongs to the training machine.
    data = config.data.model_copy(update={"cache_dir": None})
    sets = open_sets(data, "images" if images else "codes", config.train.global_batch)
    order = sets.order(config.train.seed)
    index_of = lru_cache(maxsize=None)(lambda source, shard: shard_index(sets.parts[source], shard))
    found = []
    first, micro = (step - 1) * config.train.global_batch, config.train.micro_batch
    starts = range(first, first + config.train.global_batch, micro * ranks)
    rank_of = {p: rank for start in starts for rank in range(ranks) for p in order.share(start, rank, ranks, micro)}
    for position in range(first, first + config.train.global_batch):
        place = order.locate(position)
        member = index_of(place.source, place.shard).members[place.row] if images else None
        found.append(
            Traced(
                rank=rank_of[position],
                position=position,
                epoch=place.epoch,
                shard=_shard_name(sets, place.source, place.shard),
                row=place.row,
                label=None if member is None else member.label,
                key=None if member is None else member.key,
                source=None if member is None else member.source,
            )
        )
    return found


def _shard_name(sets: DataSets, source: int, shard: int) -> str:
    part = sets.parts[source]
    return f"{part.store.url}/{part.manifest.shards[shard].name}"
