"""Converts positions to batches on a rank.

W·m consecutive positions are divided among the micro-batches (m samples) of W ranks, by their places in the order
(data/order.py). So an optimizer step covers one contiguous range of positions for any number of ranks, and a run's
whole data state is one integer.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import count
from multiprocessing import forkserver, resource_tracker
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from ibq_scale.config.base import OPEN
from ibq_scale.config.run import DataConfig
from ibq_scale.data.buckets import Buckets
from ibq_scale.data.codes import LARGE, CodeDataset, CodeSample
from ibq_scale.data.fetching import MOST_OF, Fetcher, FetchingSampler
from ibq_scale.data.images import ImageDataset, ImageSample, Request
from ibq_scale.data.order import Mixture, Place
from ibq_scale.data.sets import DataSets, open_sets
from ibq_scale.data.shared_memory import (
    USUAL_WORKERS,
    SharedMemoryError,
    cpus_of_rank,
    ranks_of_node,
    require_room,
    share,
    workers_within,
)
from ibq_scale.errors import UserError
from ibq_scale.malloc import keep_freed_memory

log = logging.getLogger(__name__)

# Batches prefetched by each worker, or by the reader of an evaluation.
PREFETCH = 4


class DataWorkerDiedError(RuntimeError):
    """A data worker process was killed."""


class ImageBatch(NamedTuple):
    images_u8: Tensor
    """uint8 (B, 3, H, W), channels last in memory, as decoded."""
    labels: Tensor
    """int64 (B,)."""
    requests: Tensor
    """int64 (B, 5), a `Request` each: position, source, epoch, shard, row."""
    faults: tuple[str, ...] = ()
    """Faults of samples replaced by others."""


class CodeBatch(NamedTuple):
    codes: Tensor
    """int64 (B, T), raster order."""
    labels: Tensor
    """int64 (B,)."""
    requests: Tensor
    """int64 (B, 5), a `Request` each: position, source, epoch, shard, row."""
    vectors: Tensor | None = None
    """float16 (B, L, C), if conditions are read. L is the manifest's."""
    lengths: Tensor | None = None
    """int64 (B,): vectors of each sample that count."""


Batch = TypeVar("Batch")


def to_float(images_u8: Tensor) -> Tensor:
    """uint8 0 … 255 → float32 -1 … 1, on the tensor's device. On a GPU channels stay last (for convolutions)."""
    layout = torch.preserve_format if images_u8.is_cuda else torch.contiguous_format
    return images_u8.to(torch.float32, memory_format=layout).div_(127.5).sub_(1.0)


def rank_positions(order: Mixture, start: int, rank: int, world_size: int, micro_batch: int) -> Iterator[list[int]]:
    """The positions of a rank's micro-batches, without end. `start` is a multiple of micro_batch · world_size."""
    for first in count(start, world_size * micro_batch):
        yield order.share(first, rank, world_size, micro_batch)


def image_stream(
    sets: DataSets,
    *,
    resolution: int,
    seed: int,
    rank: int,
    world_size: int,
    micro_batch: int,
    start: int,
    crops: Sequence[tuple[int, int]] = (),
) -> Iterator[ImageBatch]:
    """This rank's micro-batches from absolute position `start` on, without end. UserError for unusable data.

    `crops`: width and height for each of ``data.aspects``.
    """
    data = sets.config
    workers = _workers(data)
    if workers:
        require_room(micro_batch * 3 * resolution**2, workers * (PREFETCH + 1))
    dataset = ImageDataset(
        sets,
        resolution=resolution,
        random_crop=data.augment == "random_crop",
        flip=data.flip,
        seed=seed,
        training=True,
        shards_in_memory=sets.shards_in_use,
        crops=crops,
    )
    share = {"rank": rank, "world_size": world_size, "micro_batch": micro_batch, "start": start}
    sampler = _sampler(sets, dataset, seed=seed, first=_before_fetching(workers), **share)
    return _load(dataset, sampler, _stack_images, workers)


def code_stream(
    sets: DataSets, *, seed: int, rank: int, world_size: int, micro_batch: int, start: int, conditions: bool = False
) -> Iterator[CodeBatch]:
    """As `image_stream`, for code shards. `conditions`: with the vectors stored there."""
    workers = _workers(sets.config)
    dataset = CodeDataset(sets, seed=seed, shards_in_memory=sets.shards_in_use, conditions=conditions, training=True)
    large = any((part.manifest.shards.bytes > LARGE).any() for part in sets.parts)
    share = {"rank": rank, "world_size": world_size, "micro_batch": micro_batch, "start": start}
    sampler = _sampler(sets, sets, seed=seed, first=_before_fetching(workers) if large else 0, **share)
    return _load(dataset, sampler, _stack_codes, workers)


def evaluation_codes(
    sets: DataSets, *, rank: int, world_size: int, batch: int, limit: int, conditions: bool = False
) -> Iterator[tuple[CodeBatch, Tensor]]:
    """The first `limit` samples of a fixed shuffled order, divided among the ranks, with weights float (B,).

    All ranks get equally many batches of equal size. Places beyond the end repeat a sample with weight 0.
    """
    dataset = CodeDataset(sets, seed=0, shards_in_memory=sets.shards_in_use, conditions=conditions)

    def read(requests: list[Request]) -> CodeBatch:
        return _stack_codes([dataset[request] for request in requests])

    return _read_shares(read, _shuffled(sets, limit), rank, world_size, batch)


def evaluation_images(
    url: str,
    *,
    resolution: int | None,
    rank: int,
    world_size: int,
    batch: int,
    limit: int | None = None,
    multiple: int = 1,
) -> Iterator[tuple[ImageBatch, Tensor]]:
    """Every image once, divided among the ranks, in natural order, centre-cropped, with weights float (B,).

    All ranks get equally many batches of equal size. Places beyond the end repeat a sample with weight 0. With
    `resolution` None images keep their size, except for a crop to sides divisible by `multiple`. Then `batch` is 1.
    """
    sets = open_sets(DataConfig(train=url), "images")
    ends = np.cumsum(sets.parts[0].manifest.shard_sizes)

    def request(place: int) -> Request:
        shard = int(np.searchsorted(ends, place, side="right"))
        return Request(place, 0, 0, shard, place - (int(ends[shard - 1]) if shard else 0))

    requests = Requests(sets.samples if limit is None else min(limit, sets.samples), request)
    return _image_shares(_centre_cropped(sets, resolution, multiple), requests, rank, world_size, batch)


def validation_images(
    sets: DataSets,
    *,
    resolution: int,
    rank: int,
    world_size: int,
    batch: int,
    limit: int,
    crops: Sequence[tuple[int, int]] = (),
) -> Iterator[tuple[ImageBatch, Tensor]]:
    """As `evaluation_images`, for the first `limit` images of a fixed shuffled order.

    `crops` as for `image_stream`: of each aspect its share of `limit`, in batches of their own.
    """
    dataset = _centre_cropped(sets, resolution, crops=crops)
    for requests in _by_aspect(sets, limit):
        yield from _image_shares(dataset, requests, rank, world_size, batch)


def shares(count: int, rank: int, world_size: int, batch: int) -> Iterator[tuple[range, list[int], Tensor]]:
    """A rank's batches of the places 0 … count − 1. Batch b goes to rank b mod W, so its content is the same for any W.

    Yields for each batch its places, the places to read (the last one replaces all beyond the end), and weights float
    (B,), 0 beyond the end. All ranks get equally many batches of equal size.
    """
    for first in range(0, count, batch * world_size):
        places = range(first + rank * batch, first + (rank + 1) * batch)
        yield places, [min(place, count - 1) for place in places], torch.tensor([float(p < count) for p in places])


class Requests(NamedTuple):
    """`total` requests, each created on demand. `first`: the position of the first one."""

    total: int
    at: Callable[[int], Request]
    first: int = 0


def _shuffled(sets: DataSets, limit: int) -> Requests:
    order = sets.order(seed=0)
    return Requests(min(limit, sets.samples), lambda place: Request(place, *order.locate(place)))


def _by_aspect(sets: DataSets, limit: int) -> Iterator[Requests]:
    """`_shuffled`, in parts of one aspect where the data has them."""
    order = sets.order(seed=0)
    if not isinstance(order, Buckets):
        yield _shuffled(sets, limit)
        return
    first = 0
    for samples, locate in order.alone():
        count = min(samples, -(-limit * samples // sets.samples))
        yield Requests(count, lambda place, locate=locate: Request(place, *locate(place)), first)  # type: ignore[misc]
        first += count


def _image_shares(
    dataset: ImageDataset, requests: Requests, rank: int, world_size: int, batch: int
) -> Iterator[tuple[ImageBatch, Tensor]]:
    def read(requests: list[Request]) -> ImageBatch:
        return _stack_images(dataset.__getitems__(requests))

    return _read_shares(read, requests, rank, world_size, batch)


def _read_shares(
    read: Callable[[list[Request]], Batch], requests: Requests, rank: int, world_size: int, batch: int
) -> Iterator[tuple[Batch, Tensor]]:
    """A rank's `shares`, read. A sample's position is its place in `requests`, from their first on.

    A thread prefetches some batches, so that neither the store nor the device is idle.
    """

    def share(places: range, taken: list[int], weights_B: Tensor) -> tuple[Batch, Tensor]:
        own = [requests.at(t)._replace(position=requests.first + p) for p, t in zip(places, taken, strict=True)]
        return read(own), weights_B

    keep_freed_memory()
    waiting: deque[Future[tuple[Batch, Tensor]]] = deque()
    reader = ThreadPoolExecutor(1)
    try:
        for own in shares(requests.total, rank, world_size, batch):
            waiting.append(reader.submit(share, *own))
            if len(waiting) > PREFETCH:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        reader.shutdown(wait=False, cancel_futures=True)


def single_images(
    url: str, rows: Iterable[tuple[int, int]], *, resolution: int | None, multiple: int = 1
) -> Iterator[ImageBatch]:
    """Chosen images (shard, row) in batches of one, cropped as in `evaluation_images`."""
    dataset = _centre_cropped(open_sets(DataConfig(train=url), "images"), resolution, multiple)
    for place, (shard, row) in enumerate(rows):
        yield _stack_images([dataset[Request(place, 0, 0, shard, row)]])


def shard_images(url: str, shard: int, *, resolution: int, batch: int) -> Iterator[ImageBatch]:
    """One shard's images in its own order, centre-cropped. The last batch may be smaller."""
    dataset = _centre_cropped(open_sets(DataConfig(train=url), "images"), resolution)
    size = dataset.sets.parts[0].manifest.shards[shard].samples
    for first in range(0, size, batch):
        rows = range(first, min(first + batch, size))
        yield _stack_images(dataset.__getitems__([Request(row, 0, 0, shard, row) for row in rows]))


def _centre_cropped(
    sets: DataSets, resolution: int | None, multiple: int = 1, crops: Sequence[tuple[int, int]] = ()
) -> ImageDataset:
    return ImageDataset(
        sets,
        resolution=resolution,
        random_crop=False,
        flip=False,
        seed=0,
        training=False,
        multiple=multiple,
        crops=crops,
    )


def _requests(order: Mixture, start: int, rank: int, world_size: int, micro_batch: int) -> Iterator[list[Request]]:
    for positions in rank_positions(order, start, rank, world_size, micro_batch):
        yield [Request(p, *order.locate(p)) for p in positions]


def _sampler(
    sets: DataSets, fetcher: Fetcher, *, seed: int, rank: int, world_size: int, micro_batch: int, start: int, first: int
) -> Iterable[list[Request]]:
    """The order's requests for a rank. Its node fetches shards mostly inside its part of the line."""
    order, local = sets.order(seed), min(ranks_of_node(), world_size)
    requests = _requests(order, start, rank, world_size, micro_batch)
    if all(part.cache is None for part in sets.parts):
        return requests
    node, nodes = rank // local, -(-world_size // local)

    def whole(request: Request) -> bool:
        return order.part(Place(*request[1:]), node / nodes, (node + 1) / nodes) >= MOST_OF

    return FetchingSampler(requests, fetcher, first, whole)


def _workers(data: DataConfig) -> int:
    """The run's number of workers. Outside of a training nothing settles it."""
    return data.workers if data.workers != OPEN else workers_within(cpus_of_rank(), USUAL_WORKERS)


def _before_fetching(workers: int) -> int:
    """Batches requested by the workers before the first one arrives."""
    return max(1, workers * PREFETCH)


def _load(dataset: Any, sampler: Iterable[list[Request]], stack: Callable[[Any], Any], workers: int) -> Iterator[Any]:
    # No fork, because threads of torch and of S3 clients do not survive it.
    context = "forkserver" if workers else None
    if workers:
        _start_fork_server()
    else:
        keep_freed_memory()
    batches = iter(
        DataLoader(
            _Batches(dataset, stack),
            sampler=sampler,
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=workers,
            multiprocessing_context=context,
            prefetch_factor=PREFETCH if workers else None,
            worker_init_fn=partial(_start_worker, os.getpid()),
            # Otherwise it would draw from the model's generator, and a resumed run's dropout would differ.
            generator=torch.Generator(),
            pin_memory=torch.cuda.is_available(),
        )
    )
    return _raise_errors(_until_a_worker_dies(batches) if workers else batches)


class _Batches(Dataset[Any]):
    """A dataset by lists of requests. Our errors are returned as batches: torch would add a worker's traceback."""

    def __init__(self, dataset: Any, stack: Callable[[Any], Any]) -> None:
        self._dataset = dataset
        self._stack = stack

    def __getitem__(self, requests: list[Request]) -> Any:
        try:
            batch = self._stack(self._dataset.__getitems__(requests))
            if get_worker_info() is not None:
                share(batch)
            return batch
        except (UserError, SharedMemoryError) as e:
            return e


def _as_it_is(batch: Any) -> Any:
    return batch


def _raise_errors(batches: Iterator[Any]) -> Iterator[Any]:
    for batch in batches:
        if isinstance(batch, Exception):
            raise batch
        yield batch


def _until_a_worker_dies(batches: Iterator[Any]) -> Iterator[Any]:
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except (RuntimeError, OSError, EOFError) as e:
            if not _tells_of_a_dead_worker(e):
                raise
            why = str(e) or type(e).__name__
            text = f"a data worker on {socket.gethostname()} died ({why}): killed for want of memory, perhaps"
            log.error("%s", text)
            raise DataWorkerDiedError(f"{text}. Run it again, with fewer data.workers if that comes back") from e
        yield batch


def _tells_of_a_dead_worker(error: Exception) -> bool:
    """Judged by torch's message, or by the type of error for the lost shared memory of the worker's last batch.

    An error inside a living worker may have the same type, but its message begins with "Caught".
    """
    words = str(error)
    if words.startswith("Caught "):
        return False
    torch_says = ("exited unexpectedly", "is killed by signal")
    return isinstance(error, (ConnectionError, EOFError)) or any(w in words for w in torch_says)


# Signals for a save reach the run's whole process group. A helper process ended by one would end the run.
ASKING = {signal.SIGTERM, signal.SIGUSR1}


def _start_fork_server() -> None:
    """Starts the fork server, if there is none yet, with the `ASKING` signals blocked. Its workers inherit the mask.

    It imports torch once for all workers. Each import takes seconds and 300 MB.
    """
    forkserver.set_forkserver_preload([__name__])
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ASKING)
    try:
        # The server needs the tracker. Its start unblocks SIGTERM here (the tracker itself ignores SIGTERM).
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, ASKING)
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(trainer: int, worker: int) -> None:
    """Lets a worker end with its trainer, or by the trainer's SIGTERM, sent at exit to remaining workers.

    A worker also ends after a kill of its trainer. torch's own watchdog only checks the parent, here the fork server,
    alive as long as any worker.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_follow, args=(trainer,), daemon=True).start()
    torch.set_num_threads(1)
    keep_freed_memory()


def _follow(trainer: int) -> None:
    """Ends this process when the trainer has ended, or sends SIGTERM."""
    try:
        handle = os.pidfd_open(trainer)
        while not select.select([handle], [], [], 0.0)[0]:
            told = signal.sigtimedwait({signal.SIGTERM}, 0.5)
            if told is not None and told.si_pid == trainer:
                break
    finally:
        os._exit(1)


def _stack_images(samples: Sequence[ImageSample]) -> ImageBatch:
    # A single copy, from the crops of decoded pictures into the batch.
    pixels_BHW3 = np.stack([s.pixels for s in samples])
    return ImageBatch(
        torch.from_numpy(pixels_BHW3).permute(0, 3, 1, 2),
        torch.tensor([s.label for s in samples]),
        torch.tensor([s.request for s in samples]),
        tuple(s.fault for s in samples if s.fault),
    )


def _stack_codes(samples: Sequence[CodeSample]) -> CodeBatch:
    codes = torch.stack([s.codes for s in samples])
    batch = CodeBatch(codes, torch.tensor([s.label for s in samples]), torch.tensor([s.request for s in samples]))
    vectors = [s.vectors for s in samples if s.vectors is not None]
    if not vectors:
        return batch
    return batch._replace(vectors=torch.stack(vectors), lengths=torch.tensor([s.length for s in samples]))
