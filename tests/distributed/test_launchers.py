"""The same command joins under torchrun, and under DeepSpeed's launcher with a hostfile and as it starts each node."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ibq_scale.distributed.failures import FOLDER
from tests.ports import free_port
from tests.samples import SMALL_AR, write_codes

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
SMALL = (
    *SMALL_AR,
    "model.depth=1",
    "data.lanes=3",
    "data.workers=0",
    "train.global_batch=4",
    "train.micro_batch=2",
    "train.log_every=1",
    "train.steps=1",
)
PYTHON = (sys.executable, "-m")


def _commands(launcher: str, folder: Path) -> list[list[str]]:
    """A command a node."""
    port = f"--master_port={free_port()}"
    if launcher == "torchrun":
        return [[*PYTHON, "torch.distributed.run", "--nproc-per-node=2", "--master-port", port[14:], "-m", "ibq_scale"]]
    if launcher == "deepspeed":
        (folder / "hostfile").write_text("localhost slots=2\n")
        hosts = f"--hostfile={folder / 'hostfile'}"
        return [
            [
                *PYTHON,
                "deepspeed.launcher.runner",
                hosts,
                "--no_ssh_check",
                "--master_addr=127.0.0.1",
                port,
                "--module",
                "ibq_scale",
            ]
        ]
    # What DeepSpeed runs on each of two nodes, by pdsh.
    hosts = base64.urlsafe_b64encode(json.dumps({"node0": [0], "node1": [0]}).encode()).decode()
    words = [*PYTHON, "deepspeed.launcher.launch", f"--world_info={hosts}", "--master_addr=127.0.0.1", port]
    return [[*words, f"--node_rank={node}", "--module", "ibq_scale"] for node in range(2)]


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed", "deepspeed on two nodes"])
def test_ranks_of_other_launchers_join(launcher: str, tmp_path: Path) -> None:
    write_codes(tmp_path / "codes")
    words = ["train", "ar", "tiny", f"data.train={tmp_path / 'codes'}", f"out={tmp_path / 'run'}", *SMALL]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "SLURM_PROCID")}
    nodes = [
        subprocess.Popen(
            [*command, *words], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for command in _commands(launcher, tmp_path)
    ]
    said = [node.communicate()[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0] * len(nodes), "\n".join(said)
    environment_json = json.loads((tmp_path / "run/environment.json").read_text())
    assert environment_json["world_size"] == 2
    assert "1 accumulation × 2 ranks" in "".join(said)


FAILING = """
import os, time
from types import SimpleNamespace
from ibq_scale.cli.main import _run
from ibq_scale.errors import UserError

def end(args):
    if os.environ["RANK"] == "1":
        raise UserError("s3://b is not to be seen from here")
    time.sleep(1.5)
    raise RuntimeError("Connection closed by peer")

raise SystemExit(_run(SimpleNamespace(distributed=True, run=end), []))
"""


def test_torchrun_names_the_first_cause(tmp_path: Path) -> None:
    """A mistake that rank 0 does not meet."""
    (tmp_path / "fails.py").write_text(FAILING)
    words = ["--nproc-per-node=2", f"--master-port={free_port()}", str(tmp_path / "fails.py")]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "SLURM_PROCID", FOLDER)}
    done = subprocess.run(
        [*PYTHON, "torch.distributed.run", *words], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    cause = done.stderr[done.stderr.index("Root Cause") :]
    assert "rank      : 1" in cause
    assert "s3://b is not to be seen from here" in cause
