"""Checks in training that each epoch holds every sample exactly once.

Each rank sums a hash of (shard, row) over its samples. At the end of an epoch, the sum over all ranks must be the sum
over the manifests. A missing or repeated sample, a rank with another's part or a lost batch changes it. A checkpoint
holds the sums so far, as one number for all ranks.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from ibq_scale.checkpoint.files import StateFile, TextFile
from ibq_scale.data.order import Pass
from ibq_scale.data.sets import DataSets
from ibq_scale.distributed.agree import of_all_ranks
from ibq_scale.distributed.world import World
from ibq_scale.documents import read_json

FILE = "epochs.json"

log = logging.getLogger(__name__)


class NotOnceError(RuntimeError):
    """An epoch did not hold every sample once. The run's results do not match its config."""


class EpochAudit:
    """Counts and hashes this rank's samples by (data set, epoch), and compares each ended epoch."""

    def __init__(self, sets: DataSets, seed: int, world: World) -> None:
        self._sets = sets
        self._order = sets.order(seed)
        self._world = world
        self._shard_keys = [
            np.array([int(shard.sha256[:16], 16) for shard in part.manifest.shards], dtype=np.uint64)
            for part in sets.parts
        ]
        # (data set, epoch): [sum of hashes mod 2^64, samples], from epoch `_checked` on.
        self._sums: dict[tuple[int, int], list[int]] = {}
        self._checked = [0] * len(self._order.passes(0))

    def note(self, requests_B5: Tensor) -> None:
        """Adds a batch: int64 (B, 5), one `Request` (position, source, epoch, shard, row) a sample."""
        requests = requests_B5.numpy()
        for source in np.unique(requests[:, 1]):
            of_source = requests[requests[:, 1] == source]
            hashes = _hashes(self._shard_keys[source][of_source[:, 3]], of_source[:, 4])
            keys = np.stack([self._order.set_of(int(source), of_source[:, 3]), of_source[:, 2]], axis=1)
            for number, epoch in np.unique(keys, axis=0).tolist():
                entry = self._sums.setdefault((number, epoch), [0, 0])
                here = hashes[(keys == (number, epoch)).all(axis=1)]
                entry[0] = (entry[0] + int(here.sum())) % 2**64
                entry[1] += len(here)

    def check(self, samples: int) -> None:
        """Compares the epochs within the run's first `samples`. Collective.

        NotOnceError on all ranks.
        """
        for number, part in enumerate(self._order.passes(samples)):
            for epoch in range(self._checked[number], part.read // part.samples):
                self._compare(number, epoch, part)
            self._checked[number] = part.read // part.samples

    def _compare(self, number: int, epoch: int, part: Pass) -> None:
        seen, count = self._sums.pop((number, epoch), [0, 0])
        # Each rank subtracts its share of the expected sum: one reduction, and no rank hashes the whole set.
        left = _total([(seen - self._expected(number, part)) % 2**64, count], self._world)
        urls = ", ".join(self._sets.parts[source].store.url for source in part.sources)
        if left != [0, part.samples]:
            raise NotOnceError(
                f"epoch {epoch} of {urls}: {left[1]} samples came, {part.samples} different ones were expected: do all "
                f"ranks read the same data? Every checkpoint since this epoch began is in doubt"
            )
        log.info("epoch %d of %s: each of its %d samples was seen once", epoch, urls, part.samples)

    def _expected(self, number: int, part: Pass) -> int:
        """Sum of the hashes of this rank's share of the data set's shards."""
        total, place = 0, 0
        for source in part.sources:
            samples = self._sets.parts[source].manifest.shards.samples
            for shard in np.flatnonzero(self._order.set_of(source, np.arange(len(samples))) == number):
                if place % self._world.size == self._world.rank:
                    total += int(_hashes(self._shard_keys[source][shard], np.arange(samples[shard])).sum())
                place += 1
        return total % 2**64

    def state(self) -> list[StateFile]:
        """Rank 0 gives the sums of the begun epochs. Collective, after `check` of the same samples."""
        sums: dict[tuple[int, int], list[int]] = {}
        for theirs in of_all_ranks(self._world, self._sums):
            for key, (seen, count) in theirs.items():
                entry = sums.setdefault(key, [0, 0])
                entry[0] = (entry[0] + seen) % 2**64
                entry[1] += count
        rows = [{"set": n, "epoch": epoch, "sum": s, "samples": c} for (n, epoch), (s, c) in sorted(sums.items())]
        text = json.dumps({"checked": self._checked, "begun": rows}) + "\n"
        return [TextFile(FILE, text)] if self._world.is_main else []

    def load(self, directory: Path) -> None:
        """Restores the sums of any number of ranks."""
        values = read_json(directory / FILE)
        self._checked = list(values["checked"])
        mine = values["begun"] if self._world.is_main else []
        self._sums = {(row["set"], row["epoch"]): [row["sum"], row["samples"]] for row in mine}


def _hashes(shard_keys: NDArray[np.uint64] | np.uint64, rows: NDArray[np.int64]) -> NDArray[np.uint64]:
    """64 bits for each (shard, row): the finalizer of splitmix64, wrapping."""
    with np.errstate(over="ignore"):
        x = shard_keys + (rows.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed: NDArray[np.uint64] = x ^ (x >> np.uint64(31))
    return mixed


def _total(values: list[int], world: World) -> list[int]:
    """Sums mod 2^64 over the ranks. The reduction is in int64, with the same wrap."""
    here = torch.from_numpy(np.array(values, dtype=np.uint64).view(np.int64)).to(world.device)
    dist.all_reduce(here)
    return [int(value) for value in here.cpu().numpy().view(np.uint64)]
