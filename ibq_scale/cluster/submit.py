"""From a config and a cluster's profile to jobs in the queue."""

from __future__ import annotations

import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ibq_scale.cluster import slurm, snapshot
from ibq_scale.cluster.profile import Profile
from ibq_scale.cluster.render import Script, environment_lines, parse_option
from ibq_scale.cluster.snapshot import Snapshot
from ibq_scale.config.run import AnyRun
from ibq_scale.errors import UserError

# Between the end of the grace time and Slurm's kill.
SPARE_SECONDS = 30


@dataclass(frozen=True)
class Request:
    """What is to be submitted. `profile`: with flags on top; `config.out` is absolute."""

    config: AnyRun
    nodes: int
    profile: Profile
    cwd: Path

    @property
    def run_dir(self) -> Path:
        return Path(self.config.run_dir)

    @property
    def log(self) -> str:
        """The job's log, for Slurm to fill in its id."""
        return str(self.run_dir / "logs" / "job-%j.log")


def make_request(config: AnyRun, nodes: int, profile: Profile, flags: dict[str, Any], sbatch: list[str]) -> Request:
    """Flags that are not None win over the profile; lines for sbatch come after its own."""
    given = {key: value for key, value in flags.items() if value is not None}
    merged = profile.model_copy(update=given | {"sbatch": (*profile.sbatch, *sbatch)})
    out = str(Path(config.run_dir).absolute())
    if "%" in out:
        raise UserError(f"out={out}: Slurm reads a % in the path of a log as its own: choose a path without")
    return Request(config.model_copy(update={"out": out}), nodes, merged, Path.cwd())


def render(request: Request, snapped: Snapshot) -> Script:
    """slurm/train_*.sbatch for this job. What neither flags nor profile say stays as the file has it."""
    profile, config = request.profile, request.config
    script = Script.of(f"train_{config.task}").with_options(_options(request))
    script = script.with_options(dict(map(parse_option, profile.sbatch)))
    script = script.with_command(profile.ibq_scale or _own_command())
    container = []
    if profile.srun:
        container.append(f"SRUN+=({' '.join(map(_word, profile.srun))})")
    if profile.inside:
        container.append(f"INSIDE=({' '.join(map(_word, profile.inside))})")
    environment = environment_lines(profile.env)
    if snapped.pythonpath is not None:
        # A folder that a job is submitted from may hold another copy, which `python -m` would take.
        variables = {"PYTHONPATH": f"{snapped.pythonpath}${{PYTHONPATH:+:$PYTHONPATH}}", "PYTHONSAFEPATH": "1"}
        environment += ["# The code as it was when this was submitted.", *environment_lines(variables)]
    script = script.with_block("modules", profile.setup).with_block("container", container)
    return script.with_block("environment", environment)


def words(request: Request, snapped: Snapshot) -> list[str]:
    """Arguments of the script."""
    return [str(snapped.config), f"out={request.run_dir}"]


def submit(request: Request, *, chain: int, cluster: str | None) -> tuple[Snapshot, list[str]]:
    """Takes the snapshot and queues `chain` jobs, each behind the one before. UserError where Slurm refuses the first;
    of a chain that breaks later, the jobs so far stay.
    """
    snapped = snapshot.take(snapshot.next_folder(request.run_dir), request.config)
    jobs: list[str] = []
    try:
        snapped.script.write_text(render(request, snapped).text)
        for _ in range(chain):
            jobs.append(slurm.submit(str(snapped.script), words(request, snapped), jobs[-1] if jobs else None))
    except UserError as e:
        if not jobs:
            snapped.forget()
            raise
        raise UserError(f"{e}; submitted before that: {', '.join(jobs)} (ibq-scale cancel {request.run_dir})") from None
    except OSError as e:
        snapped.forget()
        raise UserError(f"cannot write {snapped.script} ({e.strerror}): make room") from None
    finally:
        if jobs:
            snapped.record(jobs=jobs, words=words(request, snapped), cwd=str(request.cwd), cluster=cluster)
    return snapped, jobs


def _options(request: Request) -> dict[str, str | None]:
    profile, config = request.profile, request.config
    options: dict[str, str | None] = {
        "job-name": "ibq-" + re.sub(r"[^\w.-]+", "-", config.name),
        "nodes": str(request.nodes),
        "signal": f"USR1@{math.ceil(config.train.grace) + SPARE_SECONDS}",
        "output": request.log,
        "chdir": str(request.cwd),
        "comment": f"{slurm.COMMENT}{request.run_dir}",
    }
    for key in ("partition", "account", "qos", "constraint", "time", "mem"):
        value = getattr(profile, key)
        options |= {key: value} if value is not None else {}
    gpus, ranks = profile.gpus_per_node, profile.ntasks_per_node
    if gpus is not None:
        options["gpus-per-node"] = str(gpus) if gpus else None
    if ranks is None and gpus is not None:
        ranks = max(1, gpus)
    if ranks is not None:
        options["ntasks-per-node"] = str(ranks)
    if profile.cpus_per_task is not None:
        options["cpus-per-task"] = str(profile.cpus_per_task)
    return options


def _own_command() -> str:
    path = Path(sys.executable).parent / "ibq-scale"
    if not path.is_file():
        raise UserError(f"there is no {path}: write 'ibq_scale: PATH' into the cluster's profile")
    return str(path)


def _word(text: str) -> str:
    """For an array of the shell; variables are left to it."""
    return '"' + re.sub(r'(["\\`])', r"\\\1", text) + '"' if re.search(r"[^\w@%+=:,./$-]", text) else text
