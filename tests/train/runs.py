"""Small training runs as real processes, to be signalled, stopped and broken."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from tests.nursery import PATIENCE, Forked, command, commands

SMALL = (
    "model.channel_multipliers=[1,1]",
    "model.resolution=16",
    "model.attention_resolutions=[8]",
    "model.z_channels=8",
    "quantizer.dim=8",
    "quantizer.codebook_size=64",
    "train.global_batch=8",
    "train.micro_batch=4",
    "train.log_every=1",
)
ENDLESS = ("train.steps=100000", "data.workers=0")


def words(data: str, out: Path, *more: str) -> list[str]:
    """A command line of ``ibq-scale``."""
    return ["train", "tokenizer", "tiny", f"data.train={data}", f"out={out}", *SMALL, *more]


@contextmanager
def launched(data: str, out: Path, *more: str) -> Iterator[Forked]:
    """Two ranks under the package's own launcher."""
    process = command([*words(data, out, *more), "--ranks", "2"])
    try:
        yield process
    finally:
        process.kill()


@contextmanager
def each_rank(data: str, out: Path, *more: str, before: str = "") -> Iterator[list[Forked]]:
    """Two ranks as srun starts them, so that each one's exit code is seen; code `before` runs in both at first."""
    ranks = commands(words(data, out, *more), 2, before)
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.kill()


def told_by(ranks: Sequence[Forked], begin: str) -> list[str]:
    """The one line of each rank's output that begins so, when all have ended."""
    found = []
    for said in [rank.communicate()[0] for rank in ranks]:
        (line,) = [line for line in said.splitlines() if line.startswith(begin)]
        found.append(line)
    return found


def wait_until(condition: Callable[[], bool], *processes: Forked, seconds: float = PATIENCE) -> None:
    """Looks often; fails where a process ends before."""
    deadline = time.monotonic() + seconds
    while not condition():
        for process in processes:
            assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def data_workers(trainer: int) -> list[psutil.Process]:
    """Processes that read and decode for a rank, or for the ranks of a launcher."""
    helpers = psutil.Process(trainer).children(recursive=True)
    return [p for p in helpers if "forkserver" in " ".join(p.cmdline()) and not p.children()]


def lines(run: Path) -> list[dict[str, Any]]:
    """Logged lines, without one that is being written."""
    path = run / "metrics.jsonl"
    text = path.read_text() if path.is_file() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
