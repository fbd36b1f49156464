"""Small training runs as real processes, to be signalled, stopped and broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from ibq_scale.distributed.environment import free_port

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
# Of a start, on a machine with other things to do.
PATIENCE = 300.0
PROGRAM = """
import sys
{before}
from ibq_scale.cli.main import main
sys.exit(main())
"""


def words(data: str, out: Path, *more: str) -> list[str]:
    """A command line of ``ibq-scale``."""
    return ["train", "tokenizer", "tiny", f"data.train={data}", f"out={out}", *SMALL, *more]


@contextmanager
def launched(data: str, out: Path, *more: str) -> Iterator[subprocess.Popen[str]]:
    """Two ranks under the package's own launcher."""
    command = [sys.executable, "-m", "ibq_scale", *words(data, out, *more), "--ranks", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@contextmanager
def each_rank(data: str, out: Path, *more: str, before: str = "") -> Iterator[list[subprocess.Popen[str]]]:
    """Two ranks as srun starts them, so that each one's exit code is seen; code `before` runs in both at first."""
    environ = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM.format(before=before), *words(data, out, *more)],
            env=environ | {"RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def wait_until(condition: Callable[[], bool], *processes: subprocess.Popen[str], seconds: float = PATIENCE) -> None:
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
