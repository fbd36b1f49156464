"""Every launcher's variables lead to the same place."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist

from ibq_scale.distributed import environment, rendezvous
from ibq_scale.distributed.environment import ALLOCATOR_SETTINGS, is_launched, map_slurm, prepare_allocator

SRUN = {
    "SLURM_JOB_ID": "123",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_NNODES": "2",
}


def test_srun_is_mapped_to_torchs_variables() -> None:
    environment = SRUN | {"MASTER_ADDR": "node1"}
    map_slurm(environment)
    assert (environment["RANK"], environment["WORLD_SIZE"], environment["LOCAL_RANK"]) == ("5", "8", "1")
    assert environment["MASTER_ADDR"] == "node1"
    assert environment["MASTER_PORT"] == "10123"
    again = SRUN | {"MASTER_ADDR": "node1", "SLURM_RESTART_COUNT": "1"}
    map_slurm(again)
    assert again["MASTER_PORT"] == "18042"


def test_srun_tells_the_ranks_of_a_node() -> None:
    environment = SRUN | {"SLURM_GTIDS": "4,5,6,7"}
    map_slurm(environment)
    assert environment["LOCAL_WORLD_SIZE"] == "4"
    own = SRUN | {"SLURM_GTIDS": "4,5,6,7", "LOCAL_WORLD_SIZE": "2"}
    map_slurm(own)
    assert own["LOCAL_WORLD_SIZE"] == "2"


def test_torchrun_inside_srun_keeps_its_own() -> None:
    environment = SRUN | {"RANK": "3", "WORLD_SIZE": "4"}
    map_slurm(environment)
    assert (environment["RANK"], environment["WORLD_SIZE"]) == ("3", "4")


def test_a_batch_script_alone_is_no_rank() -> None:
    assert not is_launched({"SLURM_JOB_ID": "1", "SLURM_PROCID": "0"})
    assert not is_launched({})
    assert is_launched(dict(SRUN))
    assert is_launched({"RANK": "0"})


def test_the_allocator_grows_what_it_has_unless_the_user_set_it() -> None:
    env: dict[str, str] = {}
    prepare_allocator(env)
    assert env == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    for name in ALLOCATOR_SETTINGS:
        env = {name: "max_split_size_mb:128"}
        prepare_allocator(env)
        assert env == {name: "max_split_size_mb:128"}


@pytest.mark.parametrize(("gpus", "asked"), [(4, ("nccl", torch.device("cuda", 3))), (0, ("gloo", None))])
def test_the_group_knows_its_gpu(
    gpus: int, asked: tuple[str, torch.device | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL then connects at once, and a barrier need not guess."""
    calls = []

    def init_process_group(backend: str, *, device_id: torch.device | None = None, timeout: object) -> None:
        calls.append((backend, device_id))
        raise RuntimeError

    monkeypatch.setattr(os, "environ", os.environ | {"RANK": "7", "WORLD_SIZE": "8", "LOCAL_RANK": "3"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(rendezvous, "together", lambda *_: nullcontext())
    monkeypatch.setattr(dist, "init_process_group", init_process_group)
    with pytest.raises(RuntimeError), environment.join():
        pass
    assert calls == [asked]


PROGRAM = """
import os
import torch.distributed as dist
from ibq_scale.distributed.environment import join
from ibq_scale.errors import UserError
try:
    with join():
        raise UserError("wrong")
except UserError:
    print(dist.is_initialized(), [name for name in ("RANK", "WORLD_SIZE", "MASTER_PORT") if name in os.environ])
"""


@pytest.mark.slow
def test_wrong_use_closes_the_group_so_that_its_own_exit_code_comes_back() -> None:
    """Threads of an open one now and then turn an exit into an abort. What it starts later is no rank of it either."""
    without = {k: v for k, v in os.environ.items() if k not in ("RANK", "SLURM_PROCID")}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=without, capture_output=True, text=True, check=True)
    assert done.stdout == "False []\n"
