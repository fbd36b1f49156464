"""What every rank looks at before it trains, so that a bad node is named instead of hanging all the others."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from ibq_scale.distributed.environment import World
from ibq_scale.distributed.failed_nodes import NodeFaultError, node_name, record
from ibq_scale.distributed.side_channel import NoAnswerError, SideChannel
from ibq_scale.errors import UserError

# A file system of a cluster may show a new file to other nodes some seconds late.
VISIBLE_SECONDS = 10.0
ANSWER_SECONDS = 60.0
SKEW_SECONDS = 60.0
LEAST_FREE_BYTES = 256 * 2**20


def check_nodes(world: World, channel: SideChannel, run_dir: Path, cache_dir: Path | None) -> list[str]:
    """Checks this rank's device, disk, clock and view of `run_dir`; all ranks call it. Returns each rank's host name.

    NodeFaultError, the same on all ranks, that names host and rank of each that failed, and what did; rank 0 writes the
    names of the nodes into `run_dir`. Through the side channel: a broken device could not take part in a collective.
    """
    # First: who does not come any further must be known by name.
    channel.put(f"node_check/node/{world.rank}", [socket.gethostname(), node_name()])
    token = run_dir / f".shared-{secrets.token_hex(8)}"
    if world.is_main:
        token.touch()
        channel.put("node_check/token", token.name)
    try:
        name = channel.wait("node_check/token", ANSWER_SECONDS)
        faults = [*device_faults(world.device), *_disk_faults(cache_dir), *_shared_faults(run_dir, name)]
        # Rank 0 says what time it is when all have come, and each reads it within a moment.
        of_main = channel.gather("node_check/time", True, lambda _: _now(), ANSWER_SECONDS)
        mine = {"faults": faults, "skew": _now() - of_main}
        verdict = channel.gather(
            "node_check/rank",
            mine,
            lambda found: _judge(found, channel.of_each_rank("node_check/node")),
            ANSWER_SECONDS,
        )
    except NoAnswerError as e:
        raise UserError(f"start-up check of the nodes: rank 0 does not answer ({e}); see its log") from None
    finally:
        if world.is_main:
            token.unlink(missing_ok=True)
    if verdict["faults"]:
        if world.is_main:
            record(run_dir, verdict["nodes"], verdict["of"])
        raise NodeFaultError("; ".join(verdict["faults"]) + ". Leave that node out (sbatch --exclude) or mend it")
    hosts: list[str] = verdict["hosts"]
    return hosts


def _now() -> float:
    return time.time()


def _judge(ranks: list[dict[str, Any] | None], places: list[list[str] | None]) -> dict[str, Any]:
    """`places`: host name, and name of the node, of each rank; None for one that did not even say that."""
    faults: list[str] = []
    nodes: dict[str, str] = {}
    for rank, (found, place) in enumerate(zip(ranks, places, strict=True)):
        host, node = place or ("?", None)
        if found is None:
            own = [f"did not come to the start-up check within {ANSWER_SECONDS:.0f} s"]
            faults.append(f"rank {rank} on {host} {own[0]}")
        else:
            own = list(found["faults"])
            if abs(found["skew"]) > SKEW_SECONDS:
                side = "after" if found["skew"] < 0 else "before"
                own.append(f"its clock is {abs(found['skew']):.0f} s {side} rank 0's")
            if own:
                faults.append(f"rank {rank} on {host} failed its start-up check: {', '.join(own)}")
        if own and node is not None:
            nodes.setdefault(node, f"rank {rank}: {', '.join(own)}")
    of = len({place[1] for place in places if place})
    return {"faults": faults, "hosts": [place[0] if place else "?" for place in places], "nodes": nodes, "of": of}


def device_faults(device: torch.device) -> list[str]:
    """What is wrong with it, as ends of a sentence; nothing where it multiplies as it should."""
    try:
        a_NN = torch.arange(64.0, device=device).repeat(64, 1)
        # Every entry of 1·a is the sum of a column; whole numbers of this size are exact in any precision of products.
        found = torch.ones(64, 64, device=device) @ a_NN
        wrong = not torch.equal(found, 64 * a_NN)
    except (RuntimeError, AssertionError) as e:
        return [f"{device} cannot be used ({str(e).splitlines()[0]})"]
    return [f"{device} multiplies wrongly"] if wrong else []


def _disk_faults(cache_dir: Path | None) -> list[str]:
    folder = cache_dir or Path(os.environ.get("SLURM_TMPDIR") or tempfile.gettempdir())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as f:
            f.write(b"\0")
        free = shutil.disk_usage(folder).free
    except OSError as e:
        return [f"cannot write to {folder} ({e.strerror})"]
    return [f"{folder} has {free / 2**20:.0f} MiB free"] if free < LEAST_FREE_BYTES else []


def _shared_faults(run_dir: Path, name: str) -> list[str]:
    deadline = time.monotonic() + VISIBLE_SECONDS
    while time.monotonic() < deadline:
        if (run_dir / name).is_file():
            return []
        # Listing makes clients of network file systems ask the server again.
        next(run_dir.iterdir(), None) if run_dir.is_dir() else None
        time.sleep(0.1)
    return [f"{run_dir} is another folder there than on rank 0's node: out=… must be on a shared file system"]
