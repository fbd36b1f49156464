"""A node that fails its start-up check is named on every rank."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ibq_scale.distributed import node_check
from ibq_scale.distributed.node_check import check_nodes
from ibq_scale.distributed.side_channel import SideChannel
from ibq_scale.distributed.world import World
from ibq_scale.errors import UserError
from tests.ranks import run_ranks

HOST = socket.gethostname()


def _ask(refuse: str) -> None:
    if refuse == "silent":
        time.sleep(3600)
    elif refuse:
        raise UserError(refuse)


def _check(rank: int, size: int, folder: Path) -> dict[str, str]:
    """For each fault, which rank 1 meets: what this rank was told."""
    node_check.VISIBLE_SECONDS, node_check.STORE_SECONDS = 2.0, 3.0
    found = {}
    for attempt, fault in enumerate(CASES):
        # As torchrun counts: words of an earlier attempt are not taken for this one's.
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(attempt)
        with pytest.MonkeyPatch.context() as patch:
            run = folder / "run"
            if rank == 1 and fault == "clock":
                patch.setattr(node_check, "_now", lambda: time.time() + 90.0)
            if rank == 1 and fault == "disk":
                patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20))
            if rank == 1 and fault == "not shared":
                run = folder / "another"
            if rank == 0 and fault == "full":
                patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20))
            if fault == "no store" or (rank == 1 and fault == "store"):
                refuse = "cannot reach it"
            elif rank == 1 and fault == "store is silent":
                refuse = "silent"
            else:
                refuse = ""
            patch.setenv("SLURMD_NODENAME", f"node-of-rank-{rank}")
            world = World(rank, size, 0, torch.device("cpu"))
            try:
                said = ", ".join(check_nodes(world, SideChannel(world), run, None, partial(_ask, refuse)))
            except UserError as e:
                said = str(e)
            found[fault] = said
    return found


FAILED = f"^rank 1 on {HOST} failed its start-up check"
CASES = {
    "none": f"^{HOST}, {HOST}$",
    "clock": rf"{FAILED}: its clock is (89|90) s before rank 0's\. Leave that node out",
    "disk": f"{FAILED}: .* has 1.05 MB free",
    "not shared": f"{FAILED}: .*another is another folder there than on rank 0's node",
    "full": "run has 1.05 MB free, too little to save: make room",
    "no store": f"^{HOST}, {HOST}$",
    "store is silent": rf"{FAILED}: does not reach the data: no answer within 3 s",
    "store": rf"{FAILED}: does not reach the data \(cannot reach it\)",
}


@pytest.mark.slow
@pytest.mark.distributed
def test_all_ranks_are_told_which_failed_and_why(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    first, second = run_ranks(_check, 2, tmp_path)
    for fault, pattern in CASES.items():
        said = first[fault]
        assert second[fault] == said
        assert re.search(pattern, said), said
    written = json.loads((tmp_path / "run/failed_nodes.json").read_text())
    assert [*written["nodes"]] == ["node-of-rank-1"]
    assert len(list((tmp_path / "run").iterdir())) == 1, "the tokens are gone"


def test_a_rank_that_does_not_come_is_named() -> None:
    came = {"faults": [], "store": "", "skew": 0.0}
    verdict = node_check._judge([came, None], [["host0", "node0"], ["host1", "node1"]])
    assert verdict["faults"] == ["rank 1 on host1 did not come to the start-up check within 60 s"]
    assert [*verdict["nodes"]] == ["node1"]
    assert verdict["of"] == 2
