"""An epoch of the same JPEGs from the same store by ibq-scale, webdataset, mosaicml-streaming and litdata, by turns.

Each turn is a process of its own, without workers: an empty cache folder, then the same folder again. Compared are
medians of images a CPU second, imports left out. The others read as their pages say: Pillow, the shorter side resized
by bicubic, a centre crop. The two that are no part of this project's environment come from FOLDER (``pip install
--target FOLDER --no-deps litdata mosaicml-streaming boto3 botocore s3transfer …``). Without obstore there, litdata
reads by boto3: with it, it refuses http. With the environment of ``python -m tests.services.radosgw``:

``python -m tests.tools.stream_peers PICTURES s3://bucket/prefix --peers FOLDER [--size 256]``
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ibq_scale.bench.data import _CentreCrop, _know_s3

SIDE, BATCH, COPIES, SHARD_BYTES = 256, 64, 8, 8_000_000
PEERS = {"mosaic": "streaming", "litdata": "litdata"}
"""Their modules, found in --peers."""
decode = _CentreCrop(SIDE)


def ours(url: str, cache: str) -> Iterable[Any]:
    from ibq_scale.config.run import DataConfig
    from ibq_scale.data.sets import open_sets
    from ibq_scale.data.stream import image_stream

    sets = open_sets(DataConfig(train=f"{url}/ours", workers=0, cache_dir=cache), "images")
    stream = image_stream(sets, resolution=SIDE, seed=0, rank=0, world_size=1, micro_batch=BATCH, start=0)
    return itertools.islice((batch.images_u8 for batch in stream), sets.samples // BATCH)


def webdataset(url: str, cache: str) -> Iterable[Any]:
    import fsspec
    import webdataset as wds

    _know_s3()
    files, path = fsspec.url_to_fs(f"{url}/ours")
    names = sorted(f"s3://{name}" for name in files.ls(path) if name.endswith(".tar"))
    dataset = wds.WebDataset(names, shardshuffle=len(names), empty_check=False, cache_dir=cache).shuffle(500)
    samples = dataset.to_tuple("jpg;jpeg", "cls").map_tuple(decode, int).batched(BATCH, partial=False)
    return (images for images, _ in wds.WebLoader(samples, batch_size=None, num_workers=0))


def mosaic(url: str, cache: str) -> Iterable[Any]:
    from streaming import StreamingDataset

    class Decoded(StreamingDataset):
        def __getitem__(self, at: int) -> Tensor:
            return decode(super().__getitem__(at)["jpg"])

    os.environ["S3_ENDPOINT_URL"] = os.environ["AWS_ENDPOINT_URL"]
    dataset = Decoded(remote=f"{url}/mosaic", local=cache, shuffle=True, batch_size=BATCH)
    return torch.utils.data.DataLoader(dataset, batch_size=BATCH, num_workers=0, drop_last=True)


def litdata(url: str, cache: str) -> Iterable[Any]:
    from litdata import StreamingDataLoader, StreamingDataset
    from litdata.streaming.resolver import Dir

    class Decoded(StreamingDataset):
        def __getitem__(self, at: Any) -> Tensor:
            return decode(super().__getitem__(at)["jpg"])

    options = {"endpoint_url": os.environ["AWS_ENDPOINT_URL"]}
    place = Dir(path=cache, url=f"{url}/litdata")
    dataset = Decoded(input_dir=place, shuffle=True, drop_last=True, storage_options=options, max_cache_size="10GB")
    batches: Iterable[Any] = StreamingDataLoader(dataset, batch_size=BATCH, num_workers=0)
    return batches


READERS: dict[str, Callable[[str, str], Iterable[Any]]] = {
    reader.__name__: reader for reader in (ours, webdataset, mosaic, litdata)
}


def read(name: str, url: str, cache: str) -> float:
    """Images a CPU second of an epoch."""
    torch.set_num_threads(1)
    # Imports the reader's client and its classes, which the measurement leaves out.
    from ibq_scale.data.store import open_store

    open_store(f"{url}/ours").read("manifest.json")
    if name in PEERS:
        importlib.import_module("boto3").client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"]).list_buckets()
        importlib.import_module(PEERS[name])
    begin = time.process_time()
    images = sum(len(batch) for batch in READERS[name](url, cache))
    return images / (time.process_time() - begin)


def write(name: str, folder: Path) -> None:
    """Writes the pictures of FOLDER/ours in a peer's format beside it."""
    to = folder / name
    to.mkdir()
    if name == "mosaic":
        from streaming import MDSWriter

        with MDSWriter(out=str(to), columns={"jpg": "bytes", "cls": "int"}, size_limit=SHARD_BYTES) as mds:
            for sample in samples(folder / "ours"):
                mds.write(sample)
    else:
        from litdata.streaming.writer import BinaryWriter

        chunks = BinaryWriter(str(to), chunk_bytes=SHARD_BYTES)
        for number, sample in enumerate(samples(folder / "ours")):
            chunks.add_item(number, sample)
        chunks.done()
        chunks.merge()


def samples(folder: Path) -> Iterator[dict[str, Any]]:
    """The JPEGs and labels of a prepared set."""
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            content = {member.name: tar.extractfile(member).read() for member in tar}
        for name in sorted(content):
            if not name.endswith(".cls"):
                yield {"jpg": content[name], "cls": int(content[f"{name.rpartition('.')[0]}.cls"])}


def prepare(pictures: Path, url: str, folder: Path, size: int | None, child: Callable[..., str]) -> None:
    """Writes `COPIES` of the pictures as three sets, and uploads them."""
    from ibq_scale.data.prepare import prepare_images
    from ibq_scale.data.store import open_store

    for path in sorted(p for p in pictures.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg")):
        for copy in range(COPIES):
            to = folder / "pictures" / path.parent.name / f"{copy}-{path.name}"
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, to)
    prepare_images(str(folder / "pictures"), str(folder / "ours"), workers=1, size=size, shard_bytes=SHARD_BYTES)
    for name in PEERS:
        child(name, "--write", folder)
    for name in ("ours", *PEERS):
        store = open_store(f"{url}/{name}")
        for path in sorted((folder / name).iterdir(), key=lambda path: path.suffix == ".json"):
            store.upload(path, path.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pictures", help="a folder of JPEGs in folders of classes")
    parser.add_argument("url")
    parser.add_argument("--peers", default="")
    parser.add_argument("--size", type=int)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--write", help=argparse.SUPPRESS)
    parser.add_argument("--read", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.write:
        write(args.pictures, Path(args.write))
        return
    if args.read:
        print(json.dumps(read(args.pictures, args.url, args.read)), flush=True)
        # Interpreters of peers end with threads that hang.
        os._exit(0)

    def child(name: str, *words: object) -> str:
        path = os.pathsep.join(filter(None, (args.peers if name in PEERS else "", str(Path.cwd()))))
        command = [sys.executable, "-m", "tests.tools.stream_peers", name, args.url, *map(str, words)]
        done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(f"{name} failed")
        return done.stdout

    rates: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(args.pictures), args.url, Path(folder), args.size, child)
        for turn, name in itertools.product(range(args.turns), READERS):
            cache = Path(folder, f"cache-{name}-{turn}")
            cache.mkdir()
            for state in ("cold", "warm"):
                rates.setdefault((name, state), []).append(float(child(name, "--read", cache).splitlines()[-1]))
            shutil.rmtree(cache)
    for name in READERS:
        cold, warm = (statistics.median(rates[name, state]) for state in ("cold", "warm"))
        print(f"{name}: cold {cold:,.0f}, warm {warm:,.0f} images a CPU second")


if __name__ == "__main__":
    main()
