"""Ranks that do not come, or come to a node that is broken, are named before a collective waits for them."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ibq_scale.distributed import rendezvous
from ibq_scale.distributed.rendezvous import Arrival, judge, look
from ibq_scale.distributed.world import World
from ibq_scale.errors import PortTakenError
from tests.nursery import Forked, program
from tests.ports import free_port


def _came(rank: int, a_node: int = 2, **more: object) -> Arrival:
    node, first = rank // a_node, rank // a_node * a_node
    mine = Arrival(f"host{node}", f"node{node}", tuple(range(first, first + a_node)), a_node, f"GPU-{rank}", 0.98)
    return replace(mine, **more)  # type: ignore[arg-type]


NAMES = ("node0", "node1", "node2")


def test_all_is_well() -> None:
    verdict = judge([_came(rank) for rank in range(6)], NAMES)
    assert (verdict.faults, verdict.failed, verdict.misuse) == ([], {}, "")
    assert verdict.hosts == ["host0", "host0", "host1", "host1", "host2", "host2"]
    assert verdict.of == 3


def test_a_rank_that_did_not_come_is_on_the_node_that_its_neighbour_tells() -> None:
    verdict = judge([*(_came(rank) for rank in range(5)), None], NAMES)
    assert verdict.faults == ["rank 5 on host2 failed its start-up check: did not come within 600 s"]
    assert (verdict.failed, verdict.of) == ({"node2": "rank 5: did not come within 600 s"}, 3)


def test_a_node_of_which_nobody_came_is_the_one_that_the_job_has_and_nobody_named() -> None:
    verdict = judge([_came(0), _came(1), None, None, _came(4), _came(5)], NAMES)
    assert [*verdict.failed] == ["node1"]
    assert verdict.faults[0].startswith("rank 2 on node1 failed")
    assert judge([_came(0), _came(1), None, None], ()).failed == {}, "without Slurm its name is not known"


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        ({"gpu": None, "free": None}, "sees no GPU, where others do"),
        ({"gpu": "GPU-2"}, "shares its GPU with rank 2: fewer than the 2 that were asked for"),
        ({"free": 0.3}, "30% of its GPU's memory is free, of the others' 98%"),
        ({"faults": ("cuda:1 cannot be used (ECC)",)}, "cuda:1 cannot be used (ECC)"),
    ],
)
def test_a_broken_node_is_named(harm: dict[str, object], said: str) -> None:
    verdict = judge([_came(rank, **(harm if rank == 3 else {})) for rank in range(6)], NAMES)
    assert [*verdict.failed] == ["node1"]
    assert said in verdict.failed["node1"]
    assert verdict.misuse == ""


def test_more_ranks_than_gpus_were_asked_for_is_no_nodes_fault() -> None:
    for asked in (1, None):
        verdict = judge([_came(rank, gpu=f"GPU-{rank // 2}", asked=asked) for rank in range(4)], NAMES[:2])
        assert verdict.faults == []
        assert verdict.misuse.startswith("2 ranks on host0, which has")


def test_gpus_that_all_are_small_or_taken_are_nobodys_fault() -> None:
    assert judge([_came(rank, free=0.03) for rank in range(4)], NAMES[:2]).faults == []


def test_a_rank_looks_at_its_device_and_its_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_GPUS_ON_NODE", raising=False)
    assert look(World(0, 1, 0, torch.device("cpu"))).faults == ()
    (fault,) = look(World(0, 1, 0, torch.device("cuda", 99))).faults
    assert fault.startswith("cuda:99 cannot be used")
    monkeypatch.setattr(rendezvous, "LEAST_HOST_BYTES", 1 << 60)
    (fault,) = look(World(0, 1, 0, torch.device("cpu"))).faults
    assert fault.endswith("GB of memory free")


PROGRAM = """
import os, signal, sys
from pathlib import Path
from ibq_scale.distributed import rendezvous
from ibq_scale.distributed.environment import join
from ibq_scale.errors import UserError
rendezvous.RENDEZVOUS_SECONDS, rendezvous.ALL_REDUCE_SECONDS, rendezvous.BEAT_SECONDS = 4.0, 2.0, 0.3
if os.environ["HOW"] == "stops":
    import time, torch.distributed
    def stop(*_, **__):
        # When the others have heard that all came.
        time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGSTOP)
    torch.distributed.init_process_group = stop
try:
    with join(Path({run!r})):
        pass
except UserError as e:
    print(e, file=sys.stderr, flush=True)
    os._exit(e.exit_code)
"""


def _ranks(run: Path, how: Sequence[str], port: int | None = None) -> list[Forked]:
    """As srun starts a rank a node; ``absent``: it does not."""
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port or free_port()),
        "WORLD_SIZE": str(len(how)),
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "SLURM_STEP_NODELIST": f"node[0-{len(how) - 1}]",
    }
    code = PROGRAM.format(run=str(run))
    return [
        program(code, os.environ | shared | {"RANK": str(rank), "SLURMD_NODENAME": f"node{rank}", "HOW": what})
        for rank, what in enumerate(how)
        if what != "absent"
    ]


def _ended(ranks: Sequence[Forked], code: int = 71) -> list[str]:
    """What they said; each ends with `code` by itself."""
    try:
        said = [rank.communicate()[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [code] * len(ranks), "\n".join(said)
    return said


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("how", "said"),
    [
        (("comes", "comes", "absent"), "rank 2 on node2 failed its start-up check: did not come within 4 s"),
        (("absent", "comes", "comes"), "rank 0 on node0 does not answer, where the ranks meet"),
    ],
)
def test_ranks_that_come_name_one_that_does_not(tmp_path: Path, how: tuple[str, ...], said: str) -> None:
    for text in _ended(_ranks(tmp_path / "run", how)):
        assert said in text
    written = json.loads((tmp_path / "run/failed_nodes.json").read_text())
    assert ([*written["nodes"]], written["of"]) == ([f"node{how.index('absent')}"], 3)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_port_that_is_taken_is_no_nodes_fault(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        (rank,) = _ranks(tmp_path / "run", ("comes", "absent"), port=port)
        (said,) = _ended([rank], PortTakenError.exit_code)
    assert f"port {port} of 127.0.0.1, where the ranks are to meet, is another program's" in said
    assert not (tmp_path / "run/failed_nodes.json").exists()


@pytest.mark.slow
@pytest.mark.distributed
def test_a_rank_that_is_alone_needs_no_port_of_its_own(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        _ended(_ranks(tmp_path / "run", ("comes",), port=taken.getsockname()[1]), 0)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("victim", [0, 2])
def test_a_first_all_reduce_that_does_not_end_names_who_is_missing(tmp_path: Path, victim: int) -> None:
    how = ["stops" if rank == victim else "comes" for rank in range(3)]
    ranks = _ranks(tmp_path / "run", how)
    stopped = ranks.pop(victim)
    try:
        said = "".join(_ended(ranks))
    finally:
        stopped.kill()
    assert f"a first all-reduce has not ended in 2 s. rank {victim} on" in said
    assert said.count("has not ended") == 1, "one tells for all"
    written = json.loads((tmp_path / "run/failed_nodes.json").read_text())
    assert [*written["nodes"]] == [f"node{victim}"]
