"""Start-up checks on every rank. They name a bad node before it hangs all others."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ibq_scale.console import gigabytes
from ibq_scale.distributed.failed_nodes import Faults, NodeFaultError, node_name
from ibq_scale.distributed.side_channel import NoAnswerError, SideChannel, within
from ibq_scale.distributed.world import World
from ibq_scale.errors import UserError

# A cluster's file system may show a new file to other nodes some seconds late.
VISIBLE_SECONDS = 10.0
ANSWER_SECONDS = 60.0
# For one small answer. The store's own retries last longer than the other ranks wait here.
STORE_SECONDS = 30.0
LEAVE_SECONDS = 10.0
SKEW_SECONDS = 60.0
LEAST_FREE_BYTES = 256 * 2**20


def check_nodes(
    world: World, channel: SideChannel, run_dir: Path, cache_dir: Path | None, ask_store: Callable[[], object]
) -> list[str]:
    """Checks this rank's disk, clock, view of `run_dir` and access to the data. All ranks call it.

    `ask_store` returns or raises. Returns each rank's host name. NodeFaultError, the same on all ranks, has host, rank
    and fault of each failed rank. Rank 0 writes the names of the nodes into `run_dir`. UserError if `run_dir` is full.
    A store out of reach of all nodes is no node's fault: the opening of the data reports it.
    """
    # First, so the host of a rank that stops later is known.
    channel.put(f"node_check/node/{world.rank}", [socket.gethostname(), node_name()])
    token = run_dir / f".shared-{secrets.token_hex(8)}"
    if world.is_main:
        full = _full(run_dir)
        token.touch()
        channel.put("node_check/token", [token.name, full])
    try:
        name, full = channel.wait("node_check/token", ANSWER_SECONDS)
        if full:
            raise UserError(full)
        faults = [*_disk_faults(cache_dir), *_shared_faults(run_dir, name)]
        # One rank per node, since a thousand requests at once overload a store.
        store = _store_fault(ask_store) if world.local_rank == 0 else ""
        # Rank 0 publishes its time after all ranks have come, and each rank reads it at once.
        of_main = channel.gather("node_check/time", True, lambda _: _now(), ANSWER_SECONDS)
        mine = {"faults": faults, "store": store, "skew": _now() - of_main}

        def decide(found: list[dict[str, Any] | None]) -> dict[str, Any]:
            verdict = _judge(found, channel.of_each_rank("node_check/node"))
            if verdict["faults"]:
                # Before the other ranks get the answer: the first exit ends all ranks.
                Faults(verdict["nodes"], verdict["of"]).record(run_dir)
            return verdict

        verdict = channel.gather("node_check/rank", mine, decide, ANSWER_SECONDS)
    except NoAnswerError as e:
        raise UserError(f"start-up check of the nodes: rank 0 does not answer ({e}); see its log") from None
    finally:
        if world.is_main:
            token.unlink(missing_ok=True)
    if verdict["faults"]:
        channel.all_have_read("node_check/rank", verdict["came"], LEAVE_SECONDS)
        raise NodeFaultError(verdict["faults"])
    hosts: list[str] = verdict["hosts"]
    return hosts


def _now() -> float:
    return time.time()


def _judge(ranks: list[dict[str, Any] | None], places: list[list[str] | None]) -> dict[str, Any]:
    """`places`: host name and node name of each rank, None for a rank without a report."""
    faults: list[str] = []
    nodes: dict[str, str] = {}
    of = {place[1] for place in places if place}
    cut_off = {place[1] for found, place in zip(ranks, places, strict=True) if found and found["store"] and place}
    for rank, (found, place) in enumerate(zip(ranks, places, strict=True)):
        host, node = place or ("?", None)
        if found is None:
            own = [f"did not come to the start-up check within {ANSWER_SECONDS:.0f} s"]
            faults.append(f"rank {rank} on {host} {own[0]}")
        else:
            own = list(found["faults"])
            if found["store"] and cut_off != of:
                own.append(found["store"])
            if abs(found["skew"]) > SKEW_SECONDS:
                side = "after" if found["skew"] < 0 else "before"
                own.append(f"its clock is {abs(found['skew']):.0f} s {side} rank 0's")
            if own:
                faults.append(f"rank {rank} on {host} failed its start-up check: {', '.join(own)}")
        if own and node is not None:
            nodes.setdefault(node, f"rank {rank}: {', '.join(own)}")
    hosts = [place[0] if place else "?" for place in places]
    came = sum(found is not None for found in ranks)
    return {"faults": faults, "hosts": hosts, "nodes": nodes, "of": len(of), "came": came}


def _full(run_dir: Path) -> str:
    """The fault of a full run directory. It is the same on all nodes, so no node is at fault."""
    free = shutil.disk_usage(run_dir).free
    if free >= LEAST_FREE_BYTES:
        return ""
    return f"{run_dir} has {gigabytes(free)} free, too little to save: make room, or give another out=…"


def _disk_faults(cache_dir: Path | None) -> list[str]:
    folder = cache_dir or Path(os.environ.get("SLURM_TMPDIR") or tempfile.gettempdir())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_byte(folder)
        free = shutil.disk_usage(folder).free
    except OSError as e:
        return [f"cannot write to {folder} ({e.strerror})"]
    return [f"{folder} has {gigabytes(free)} free"] if free < LEAST_FREE_BYTES else []


def _shared_faults(run_dir: Path, name: str) -> list[str]:
    deadline = time.monotonic() + VISIBLE_SECONDS
    while not (run_dir / name).is_file():
        if time.monotonic() > deadline:
            return [f"{run_dir} is another folder there than on rank 0's node: out=… must be on a shared file system"]
        # A listing makes clients of network file systems ask the server again.
        next(run_dir.iterdir(), None) if run_dir.is_dir() else None
        time.sleep(0.1)
    try:
        _write_byte(run_dir)
    except OSError as e:
        return [f"cannot write to {run_dir} ({e.strerror})"]
    return []


def _write_byte(folder: Path) -> None:
    with tempfile.TemporaryFile(dir=folder) as f:
        f.write(b"\0")


def _store_fault(ask_store: Callable[[], object]) -> str:
    """The error between this node and the data. Empty if the store answers."""

    def ask() -> str:
        try:
            ask_store()
        except (UserError, OSError) as e:
            return f"does not reach the data ({' '.join(str(e).split())})"
        return "well"

    try:
        said = within(STORE_SECONDS, ask, "the data")
    except NoAnswerError:
        return f"does not reach the data: no answer within {STORE_SECONDS:.0f} s"
    return "" if said == "well" else said
