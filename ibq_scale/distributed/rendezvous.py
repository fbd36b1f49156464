"""Rendezvous: every rank reports its host and GPU before the first collective.

All messages go through torch's key-value store. A missing rank, a GPU that is broken, occupied or used twice, and a
hanging first all-reduce are reported by node, and recorded for the restart of the job.
"""

from __future__ import annotations

import os
import re
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from ibq_scale.console import gigabytes, tell
from ibq_scale.distributed.failed_nodes import Faults, NodeFaultError, names_of_nodes, node_name
from ibq_scale.distributed.heartbeats import Heartbeats, Place, find_missing, leave
from ibq_scale.distributed.side_channel import NoAnswerError, SideChannel, open_store
from ibq_scale.distributed.waiting import collective_in_progress
from ibq_scale.distributed.world import World
from ibq_scale.errors import UserError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore

# Imports from a slow disk by a thousand ranks take minutes.
RENDEZVOUS_SECONDS = 600.0
# NCCL connects a thousand GPUs in less time.
ALL_REDUCE_SECONDS = 180.0
BEAT_SECONDS = 5.0
LEAVE_SECONDS = 10.0
LEAST_HOST_BYTES = 1 << 30
# Of the ranks' median share of free GPU memory at the start.
LEAST_SHARE = 0.9


@dataclass(frozen=True)
class Arrival:
    """A rank's report.

    `ranks`: the ranks of its node, as far as its launcher tells. `asked`: the number of GPUs given by Slurm on its
    node. `gpu`: the UUID of its GPU, None on a CPU. `free`: the free share of the GPU's memory. `faults`: ends of a
    sentence.
    """

    host: str
    node: str
    ranks: tuple[int, ...]
    asked: int | None = None
    gpu: str | None = None
    free: float | None = None
    faults: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """Rank 0's result for all ranks.

    `hosts`, `nodes`: by rank, ``?`` and None for a missing rank. `of`: the number of nodes. `faults`: a line per failed
    rank. `failed`: a line per failed node. `misuse`: a user's mistake, the same on any nodes.
    """

    hosts: list[str]
    nodes: list[str | None]
    of: int
    faults: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    misuse: str = ""


@contextmanager
def together(world: World, run_dir: Path | None) -> Iterator[None]:
    """Runs the rendezvous, lets the body make the process group, and tests the group with an all-reduce.

    NodeFaultError, the same on all ranks, if a rank does not come or its node is at fault. `run_dir` then holds the
    names. If the group or its all-reduce is not done after `ALL_REDUCE_SECONDS`, this process ends with the same exit
    code.
    """
    # The process group uses the same store, so this reference may go then.
    _store, channel, verdict = _meet(world, run_dir)
    with _in_time(world, channel, verdict, run_dir):
        yield
        ones_N = torch.ones(1, device=world.device)
        torch.distributed.all_reduce(ones_N)
        if int(ones_N.item()) != world.size:
            raise RuntimeError(f"an all-reduce of ones over {world.size} ranks gives {ones_N.item():g}")


def _meet(world: World, run_dir: Path | None) -> tuple[TCPStore, SideChannel, Verdict]:
    try:
        store = open_store(world, timedelta(seconds=RENDEZVOUS_SECONDS))
        channel = SideChannel(world)
        mine = asdict(look(world))
        answer = channel.gather("arrival", mine, lambda found: asdict(_decide(found, run_dir)), RENDEZVOUS_SECONDS)
        verdict = Verdict(**answer)
    except RuntimeError as e:
        raise _lost(world, run_dir, e) from None
    if verdict.misuse or verdict.faults:
        channel.all_have_read("arrival", sum(node is not None for node in verdict.nodes), LEAVE_SECONDS)
    if verdict.misuse:
        raise UserError(verdict.misuse)
    if verdict.faults:
        raise NodeFaultError(verdict.faults)
    return store, channel, verdict


def _lost(world: World, run_dir: Path | None, error: RuntimeError) -> NodeFaultError:
    """The fault of an unreachable store. Rank 0 hosts it. Without it no messages pass, so each rank decides alone."""
    names = names_of_nodes()
    node = names[0] if names else os.environ["MASTER_ADDR"]
    said = str(error).splitlines()[0]
    if world.is_main:
        fault = f"the ranks cannot meet at {os.environ['MASTER_ADDR']}, port {os.environ['MASTER_PORT']} ({said})"
    else:
        fault = f"rank 0 on {node} does not answer, where the ranks meet ({said})"
    # Rank 0 records the fault. So does the first rank of the second node, or rank 1 without a known second node.
    second = (world.local_rank == 0 and node_name() == names[1]) if len(names) > 1 else world.rank == 1
    if world.is_main or second:
        Faults({node: fault} if names else {}, len(names)).record(run_dir)
    if second:
        tell(f"ibq-scale: {fault}")
    return NodeFaultError([fault])


def look(world: World) -> Arrival:
    """This rank's report. Only the device can hang here."""
    faults: list[str] = []
    gpu = free = None
    if world.device.type == "cuda":
        try:
            torch.cuda.set_device(world.device)
            gpu = str(torch.cuda.get_device_properties(world.device).uuid)
            free_bytes, all_bytes = torch.cuda.mem_get_info(world.device)
            free = free_bytes / all_bytes
        except (RuntimeError, AssertionError) as e:
            faults.append(f"{world.device} cannot be used ({str(e).splitlines()[0]})")
    faults = faults or device_faults(world.device)
    given = os.environ.get("SLURM_GPUS_ON_NODE", "")
    asked = int(given) if given.isdigit() else None
    if asked and torch.version.cuda is not None and gpu is None and not faults:
        faults.append(f"no GPU can be used, of {asked} that were asked for")
    if (memory := _host_memory()) < LEAST_HOST_BYTES:
        faults.append(f"the host has {gigabytes(memory)} of memory free")
    return Arrival(socket.gethostname(), node_name(), _ranks_here(world), asked, gpu, free, tuple(faults))


def device_faults(device: torch.device) -> list[str]:
    """Faults of the device, as ends of a sentence. Empty if it multiplies correctly."""
    try:
        a_NN = torch.arange(64.0, device=device).repeat(64, 1)
        # Every entry of 1·a is the sum of a column. Integers of this size are exact in any precision of products.
        found = torch.ones(64, 64, device=device) @ a_NN
        wrong = not torch.equal(found, 64 * a_NN)
    except (RuntimeError, AssertionError) as e:
        return [f"{device} cannot be used ({str(e).splitlines()[0]})"]
    return [f"{device} multiplies wrongly"] if wrong else []


def _ranks_here(world: World) -> tuple[int, ...]:
    if "SLURM_GTIDS" in os.environ and os.environ.get("SLURM_PROCID") == str(world.rank):
        return tuple(map(int, os.environ["SLURM_GTIDS"].split(",")))
    first = world.rank - world.local_rank
    return tuple(range(first, first + int(os.environ.get("LOCAL_WORLD_SIZE", world.local_rank + 1))))


def _host_memory() -> int:
    """Bytes available to programs without swapping."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="utf-8"), re.MULTILINE)
    return int(found[1]) << 10 if found else LEAST_HOST_BYTES


def _decide(found: Sequence[dict[str, Any] | None], run_dir: Path | None) -> Verdict:
    arrivals = [None if a is None else Arrival(**a | {"ranks": tuple(a["ranks"])}) for a in found]
    verdict = judge(arrivals, names_of_nodes())
    if verdict.faults and not verdict.misuse:
        # Before the other ranks get the answer: the first exit ends all ranks.
        Faults(verdict.failed, verdict.of).record(run_dir)
    return verdict


def judge(arrivals: Sequence[Arrival | None], names: Sequence[str]) -> Verdict:
    """`arrivals`: by rank, None for a missing rank. `names`: the job's nodes, if known."""
    came = {rank: a for rank, a in enumerate(arrivals) if a is not None}
    # A report also gives the place of the rank's neighbours.
    places = {rank: a for a in came.values() for rank in a.ranks} | came
    seen = {a.node for a in came.values()}
    silent = [name for name in names if name not in seen]
    sharing, misuse = _sharing(came)
    gpus = any(a.gpu for a in came.values())
    usual = median([a.free for a in came.values() if a.free is not None] or [0])
    faults: list[str] = []
    failed: dict[str, str] = {}
    for rank, arrival in enumerate(arrivals):
        if arrival is None:
            own = [f"did not come within {RENDEZVOUS_SECONDS:.0f} s"]
        else:
            own = [*arrival.faults, *sharing.get(rank, [])]
            if not own and arrival.gpu is None and gpus:
                own = ["sees no GPU, where others do"]
            if arrival.free is not None and arrival.free < LEAST_SHARE * usual:
                own += [f"{arrival.free:.0%} of its GPU's memory is free, of the others' {usual:.0%}: who is there?"]
        if own:
            nodes = [places[rank].node] if rank in places else silent
            on = places[rank].host if rank in places else " or ".join(silent) or "an unknown node"
            faults.append(f"rank {rank} on {on} failed its start-up check: {', '.join(own)}")
            failed = {node: f"rank {rank}: {', '.join(own)}" for node in nodes} | failed
    hosts = [places[rank].host if rank in places else "?" for rank in range(len(arrivals))]
    nodes_of_ranks = [a.node if a is not None else None for a in arrivals]
    return Verdict(hosts, nodes_of_ranks, len({*seen, *silent}), faults, failed, misuse)


def _sharing(came: dict[int, Arrival]) -> tuple[dict[int, list[str]], str]:
    """Faults of ranks on a GPU of another rank of their node.

    Misuse instead, if the job asked for fewer GPUs than ranks, or Slurm gives no number.
    """
    faults: dict[int, list[str]] = {}
    owners: dict[tuple[str, str], int] = {}
    for rank, a in came.items():
        if a.gpu is None:
            continue
        owner = owners.setdefault((a.node, a.gpu), rank)
        if owner == rank:
            continue
        ranks = sum(other.node == a.node for other in came.values())
        if a.asked is None or a.asked < ranks:
            has = f"{a.asked} GPUs" if a.asked is not None else f"GPUs for {len({*owners.values()})}"
            return {}, f"{ranks} ranks on {a.host}, which has {has}: a rank takes one GPU, start one for each"
        faults[rank] = [f"shares its GPU with rank {owner}: fewer than the {a.asked} that were asked for are there"]
    return faults, ""


@contextmanager
def _in_time(world: World, channel: SideChannel, verdict: Verdict, run_dir: Path | None) -> Iterator[None]:
    """Ends this process if the body takes too long, and reports the missing ranks."""
    if world.size == 1:
        yield
        return
    done = threading.Event()

    def watch() -> None:
        if not done.wait(ALL_REDUCE_SECONDS):
            _give_up(world, channel, verdict, run_dir)

    def place() -> Place:
        return Place(0, "joining", collective_in_progress())

    with closing(Heartbeats(channel, BEAT_SECONDS, place)):
        threading.Thread(target=watch, name="first all-reduce", daemon=True).start()
        try:
            yield
        finally:
            done.set()


def _give_up(world: World, channel: SideChannel, verdict: Verdict, run_dir: Path | None) -> None:
    missing = find_missing(channel, verdict.hosts, BEAT_SECONDS)
    teller = next((rank for rank in range(world.size) if rank not in missing.ranks), 0)
    if world.rank == teller:
        failed = {str(verdict.nodes[rank]): missing.why for rank in missing.ranks}
        Faults(failed, verdict.of).record(run_dir)
        # If no rank is missing, the network is the suspect.
        todo = "" if failed else ": the network between them? NCCL_DEBUG=INFO tells more"
        tell(f"ibq-scale: a first all-reduce has not ended in {ALL_REDUCE_SECONDS:.0f} s. {missing.why}{todo}")
    # Ranks later than this are ignored.
    with suppress(NoAnswerError):
        leave(channel, missing, LEAVE_SECONDS)
    os._exit(NodeFaultError.exit_code)
