"""Streams an epoch of a set with many shards of tiny pictures from a store, as 1, 2 and 4 nodes, and from a folder.

It prints bytes fetched over bytes read, bytes before the first batch, repeated downloads, and, with `--local`, images a
CPU second cold and from a folder. Without it pictures are read and checked but not decoded. The cache is to the set as
50 GB are to ImageNet. The nodes run one after another. With the environment of `python -m tests.services.radosgw`:

``python -m tests.tools.stream_at_size s3://bucket/set --local FOLDER``
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image

from ibq_scale.config.run import DataConfig
from ibq_scale.data import images, stream
from ibq_scale.data.index import write_index
from ibq_scale.data.manifest import load_manifest, save_manifest
from ibq_scale.data.prepare import prepare_images, shard_info
from ibq_scale.data.sets import open_sets
from ibq_scale.data.store import S3Store, open_store
from ibq_scale.data.verify import load_index

# ImageNet-1k in shards of 256 MB, and the default cache.
SHARDS, ROWS, CACHE_SHARE = 551, 2325, 50 / 141
SIDE, MICRO_BATCH = 16, 64


@dataclass
class Traffic:
    """Requests and bytes of a store. `indices`: bytes of tables. `shards`: downloads of each."""

    requests: int = 0
    bytes: int = 0
    indices: int = 0
    shards: Counter[str] = field(default_factory=Counter)

    def counting(self, method: str) -> Any:
        """Patches a method of all S3 stores."""
        original: Callable[..., Any] = getattr(S3Store, method)

        def counted(store: S3Store, path: str, *rest: Any) -> Any:
            found = original(store, path, *rest)
            self.requests += 1
            self.bytes += len(found) if method != "download" else rest[0].stat().st_size
            self.indices += len(found) if path.endswith(".table") else 0
            self.shards[path] += method == "download"
            return found

        return patch.object(S3Store, method, counted)


@dataclass(frozen=True)
class Epoch:
    """What one node read, and its costs. `first_batch`: bytes before it, without tables."""

    seen: set[tuple[int, int]]
    cpu_seconds: float
    first_batch: int
    traffic: Traffic


def write_set(url: str, shards: int, rows: int) -> None:
    """Writes a set of `shards` equal shards, told apart by their last bytes."""
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        for i in range(rows):
            to = Path(folder, "pictures", f"{i % 10}", f"{i}.jpg")
            to.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 256, (4, 4, 3), np.uint8)).resize((SIDE, SIDE)).save(to, quality=80)
        prepare_images(str(to.parents[1]), f"{folder}/set", workers=1)
        model, one = open_store(f"{folder}/set"), load_manifest(f"{folder}/set", "images")
        data, index = model.read(one.shards[0].name), load_index(model, one.shards[0])
    infos, store = [], open_store(url)
    for number in range(shards):
        name = f"images-{number:06d}.tar"
        content = data[:-8] + number.to_bytes(8, "big")
        changed = replace(index, sha256=hashlib.sha256(content).hexdigest())
        store.write(name, content)
        write_index(store, name, changed)
        infos.append(shard_info(name, changed))
    save_manifest(store, one.model_copy(update={"shards": type(one.shards)(infos)}))


def epoch(url: str, cache: Path | None, node: int = 0, nodes: int = 1) -> Epoch:
    """One node's part of the first epoch."""
    share = sum(shard.bytes for shard in load_manifest(url, "images").shards) * CACHE_SHARE
    sets = open_sets(DataConfig(train=url, workers=0, cache_dir=cache and str(cache), cache_bytes=int(share)), "images")
    steps = -(-sets.samples // (MICRO_BATCH * nodes))
    plain = stream._requests

    def one_epoch(*args: Any) -> Iterator[list[Any]]:
        # Nothing of the next epoch: the last batch is cut there and repeated.
        last: list[Any] = []
        for batch in islice(plain(*args), steps):
            last = [request for request in batch if not request.epoch] or last
            yield last
        yield from repeat(last)

    traffic = Traffic()
    with ExitStack() as patches:
        patches.enter_context(patch.object(stream, "_requests", one_epoch))
        for method in ("read", "read_range", "download"):
            patches.enter_context(traffic.counting(method))
        begin = time.process_time()
        batches = stream.image_stream(
            sets, resolution=SIDE, seed=0, rank=node, world_size=nodes, micro_batch=MICRO_BATCH, start=0
        )
        first = next(batches)
        first_batch = traffic.bytes - traffic.indices
        seen = list(chain([first.requests], (batch.requests for batch in islice(batches, steps - 1))))
        spent = time.process_time() - begin
    places = torch.cat(seen)
    return Epoch({(shard, row) for *_, shard, row in places.tolist()}, spent, first_batch, traffic)


def report(url: str, local: str | None, nodes: int) -> str:
    """One line for an epoch on `nodes` nodes. Raises AssertionError unless they read every sample once."""
    manifest = load_manifest(url, "images")
    found = []
    for node in range(nodes):
        with tempfile.TemporaryDirectory() as cache:
            found.append(epoch(url, Path(cache), node, nodes))
    seen = Counter(place for each in found for place in each.seen)
    assert len(seen) == manifest.samples, "some samples were not read"
    assert set(seen.values()) == {1}, "some samples were read twice"
    again = sum(n > 1 for each in found for n in each.traffic.shards.values())
    batch = MICRO_BATCH * manifest.bytes / manifest.samples
    text = (
        f"{nodes} nodes: fetched/read {sum(each.traffic.bytes for each in found) / manifest.bytes:.4f}, "
        f"{again} shards twice, before the first batch {max(each.first_batch for each in found) / batch:.2f} batches, "
        f"{sum(each.traffic.requests for each in found)} requests"
    )
    cold = sum(each.cpu_seconds for each in found)
    if local is None:
        return f"{text}, {cold:.0f} CPU seconds"
    here = epoch(local, None, 0, nodes).cpu_seconds * nodes
    return (
        f"{text}; images a CPU second: cold {manifest.samples / cold:,.0f}, local {manifest.samples / here:,.0f} "
        f"({100 * here / cold:.1f} %)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--local", help="a folder for a copy of the set")
    parser.add_argument("--shards", type=int, default=SHARDS)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 4])
    args = parser.parse_args()
    for url in filter(None, (args.url, args.local)):
        if not open_store(url).exists("manifest.json"):
            write_set(url, args.shards, args.rows)
    torch.set_num_threads(1)
    # Imports the client.
    open_store(args.url).read("manifest.json")
    if args.local is None:
        patch.object(images, "decode", lambda *_: np.zeros((SIDE, SIDE, 3), np.uint8)).start()
    for nodes in args.nodes:
        print(report(args.url, args.local, nodes), flush=True)


if __name__ == "__main__":
    main()
