"""Joins the process group described in the environment by torchrun, srun or the deepspeed launcher.

Every launcher's variables are mapped to torch's own (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT). A process
without a launcher is rank 0 of 1.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from ibq_scale.distributed.signals import unblock
from ibq_scale.distributed.world import World
from ibq_scale.errors import UserError

TIMEOUT = timedelta(minutes=30)
FLIGHT_RECORD_ENTRIES = "2000"
ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
# torch's variables for a process without a launcher.
ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


def is_launched(environ: MutableMapping[str, str] | None = None) -> bool:
    """Whether a launcher already gave this process a rank (torchrun, deepspeed, or srun with several tasks)."""
    env = os.environ if environ is None else environ
    return "RANK" in env or ("SLURM_PROCID" in env and "SLURM_STEP_ID" in env)


def map_slurm(environ: MutableMapping[str, str]) -> None:
    """Fills torch's variables from srun's. Explicit torch variables win, so torchrun inside srun still joins.

    MASTER_ADDR must come from the sbatch file (the first name of the node list): a task cannot know it, except when all
    tasks share one node.
    """
    if "RANK" in environ or "SLURM_PROCID" not in environ or "SLURM_STEP_ID" not in environ:
        return
    environ["RANK"] = environ["SLURM_PROCID"]
    environ["WORLD_SIZE"] = environ["SLURM_NTASKS"]
    environ["LOCAL_RANK"] = environ["SLURM_LOCALID"]
    if "SLURM_GTIDS" in environ:
        environ.setdefault("LOCAL_WORLD_SIZE", str(len(environ["SLURM_GTIDS"].split(","))))
    if environ.get("SLURM_NNODES", "1") == "1":
        environ.setdefault("MASTER_ADDR", "127.0.0.1")
    # Jobs on one node need different ports. A restart needs another port, since the first may be taken. The kernel
    # gives ports from 32768 on to connections.
    job, restart = int(environ.get("SLURM_JOB_ID", "0")), int(environ.get("SLURM_RESTART_COUNT", "0"))
    environ.setdefault("MASTER_PORT", str(10000 + (job + 7919 * restart) % 20000))


def prepare_allocator(environ: MutableMapping[str, str]) -> None:
    """Sets expandable segments for torch's CUDA allocator, unless the user set it. Call it before the first GPU tensor.

    Freed blocks then hold tensors of other sizes, so fragmentation wastes less memory.
    """
    if not any(name in environ for name in ALLOCATOR_SETTINGS):
        environ[ALLOCATOR_SETTINGS[0]] = "expandable_segments:True"


@contextmanager
def join(run_dir: Path | None = None) -> Iterator[World]:
    """Initialises torch.distributed (nccl on CUDA, else gloo) and leaves it at the end. A lone process is a world of 1.

    PortTakenError if another program has the port. NodeFaultError if a rank does not come or cannot compute (see
    `rendezvous`). `run_dir` then holds the names of the nodes.

    An exception skips the barrier and the teardown: both could block, while the other ranks wait for this one. After a
    UserError, raised by no collective, only the group is destroyed. Its threads may turn an exit into an abort with
    another exit code.
    """
    import torch
    import torch.distributed as dist

    from ibq_scale.distributed.rendezvous import together

    unblock()
    env = os.environ
    map_slurm(env)
    prepare_allocator(env)
    # Torch's record of the last collectives. The watchdog writes it after a hang. It is off by default in some
    # versions.
    env.setdefault("TORCH_FR_BUFFER_SIZE", env.get("TORCH_NCCL_TRACE_BUFFER_SIZE", FLIGHT_RECORD_ENTRIES))
    alone = "RANK" not in env
    if alone:
        env |= ALONE
    local_rank = int(env.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
    else:
        device = torch.device("cpu")
        env.setdefault("DS_ACCELERATOR", "cpu")
    world = World(int(env["RANK"]), int(env["WORLD_SIZE"]), local_rank, device)
    # Given the device, NCCL connects at once: a node without a connection fails here, not in the first collective.
    backend = {"backend": "nccl", "device_id": device} if device.type == "cuda" else {"backend": "gloo"}
    with together(world, run_dir):
        dist.init_process_group(**backend, timeout=TIMEOUT)
    try:
        yield world
        dist.barrier()
        dist.destroy_process_group()
    except UserError:
        dist.destroy_process_group()
        raise
    finally:
        # Processes started later are no ranks of this world.
        for name in ALONE if alone else ():
            env.pop(name, None)
