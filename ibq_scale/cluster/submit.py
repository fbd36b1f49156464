"""Turns a config or a command into jobs in the queue, with the settings of a cluster's profile."""

from __future__ import annotations

import math
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ibq_scale.cluster import slurm, snapshot
from ibq_scale.cluster.profile import Profile
from ibq_scale.cluster.render import Script, double_quoted, environment_lines, parse_option, python_path_line
from ibq_scale.cluster.snapshot import Snapshot, Source
from ibq_scale.config.run import AnyRun
from ibq_scale.config.secrets import masked, refuse_secrets
from ibq_scale.errors import UserError

# Between the end of the grace time and Slurm's kill.
SPARE_SECONDS = 30
# Commands with work for an array of jobs.
IN_PARTS = ("tokenize", "sample")


@dataclass(frozen=True)
class Work:
    """The work of a job: slurm/FILE.sbatch with `words`, or with the snapshot's `config`. `folder`: for snapshots and
    logs, None if the output is no folder. `options`: sbatch options for this work.
    """

    file: str
    name: str
    folder: Path | None
    options: Mapping[str, str | None]
    words: tuple[str, ...] = ()
    config: AnyRun | None = None


def training(config: AnyRun) -> Work:
    """A training run. UserError for a log path unfit for Slurm, or an address in `notify`."""
    if any(masked(target) != target for target in config.notify):
        raise UserError(
            "notify: the job's config keeps no address, since others can read it. Export the address in the "
            "submitting shell (Slurm passes it on) and give its name: notify='$NAME'"
        )
    folder = Path(config.run_dir).absolute()
    _check_percent(f"out={folder}")
    options = {
        "signal": f"USR1@{math.ceil(config.train.grace) + SPARE_SECONDS}",
        "comment": f"{slurm.COMMENT}{folder}",
        "output": f"{folder}/logs/job-%j.log",
    }
    absolute = config.model_copy(update={"out": str(folder)})
    return Work(f"train_{config.task}", config.name, folder, options, config=absolute)


def other_command(name: str, words: Sequence[str], to: str | None, tasks: int | None) -> Work:
    """``ibq-scale NAME WORDS`` in `tasks` jobs of an array. `to`: its output, in a file system or in a store.

    UserError for an array of an indivisible command, or for a log path unfit for Slurm.
    """
    if tasks is not None and name not in IN_PARTS:
        raise UserError(f"--array is for {' and '.join(IN_PARTS)}: {name} takes more nodes")
    number = "%j" if tasks is None else "%A_%a"
    folder = Path(to).absolute() if to is not None and "://" not in to and not to.endswith(".npz") else None
    _check_percent(f"--to {to}")
    output = f"ibq-{name}-{number}.log" if folder is None else f"{folder}/{snapshot.FOLDER}/job-{number}.log"
    options = {"output": output} | ({} if tasks is None else {"array": f"0-{tasks - 1}"})
    return Work(name, name, folder, options, words=tuple(words))


def _check_percent(text: str) -> None:
    if "%" in text:
        raise UserError(f"{text}: Slurm reads a % in the path of a log as its own: choose a path without")


@dataclass(frozen=True)
class Request:
    """The work to submit, and its settings. `profile`: with flags on top."""

    work: Work
    nodes: int
    profile: Profile
    cwd: Path

    @property
    def log(self) -> str:
        """The path of the job's log, with Slurm's placeholder for the id."""
        return str(self.cwd / str(self.work.options["output"]))


def make_request(work: Work, nodes: int, profile: Profile, flags: dict[str, Any], sbatch: list[str]) -> Request:
    """Flags other than None override the profile. sbatch lines come after the profile's own."""
    given = {key: value for key, value in flags.items() if value is not None}
    merged = profile.model_copy(update=given | {"sbatch": (*profile.sbatch, *sbatch)})
    return Request(work, nodes, merged, Path.cwd())


def next_snapshot(request: Request) -> Snapshot | None:
    """The snapshot of the next submission. None for work without a folder: its job runs the code of its start time."""
    folder = request.work.folder
    return None if folder is None else Snapshot(snapshot.next_folder(folder), Source.here())


def render(request: Request, snapped: Snapshot | None) -> Script:
    """The work's file for this job. The file's own values stand where flags and profile are silent."""
    profile = request.profile
    script = Script.of(request.work.file).with_options(_options(request))
    script = script.with_options(dict(map(parse_option, profile.sbatch)))
    script = script.with_command(profile.ibq_scale or _own_command())
    container = []
    if profile.srun:
        container.append(f"SRUN+=({' '.join(map(_word, profile.srun))})")
    if profile.inside:
        container.append(f"INSIDE=({' '.join(map(_word, profile.inside))})")
    environment = environment_lines(profile.env)
    if snapped is not None and snapped.pythonpath is not None:
        # The submission folder may hold another copy, and `python -m` would import it.
        environment += ["# The code as it was when this was submitted.", python_path_line(str(snapped.pythonpath))]
        environment += environment_lines({"PYTHONSAFEPATH": "1"})
    script = script.with_block("modules", profile.setup).with_block("container", container)
    script = script.with_block("environment", environment)
    refuse_secrets({}, (*script.text.splitlines(), *request.work.words), "the job's script")
    return script


def words(request: Request, snapped: Snapshot | None) -> list[str]:
    if request.work.config is None or snapped is None:
        return list(request.work.words)
    return [str(snapped.config), f"out={request.work.folder}"]


def submit(request: Request, *, chain: int, cluster: str | None) -> tuple[Snapshot | None, list[str]]:
    """Takes the snapshot and queues `chain` jobs, each after the one before. UserError if Slurm refuses the first. If a
    later one fails, the earlier ones stay.
    """
    folder = request.work.folder
    snapped = None if folder is None else snapshot.take(snapshot.next_folder(folder), request.work.config)
    jobs: list[str] = []
    try:
        with _script_file(render(request, snapped), snapped) as path:
            for _ in range(chain):
                jobs.append(slurm.submit(str(path), words(request, snapped), jobs[-1] if jobs else None))
    except (UserError, OSError) as e:
        if snapped is not None and not jobs:
            snapped.forget()
        if isinstance(e, OSError):
            raise UserError(f"cannot write the job's script ({e.strerror}): make room") from None
        if not jobs:
            raise
        run = request.work.config is not None
        ends = f"ibq-scale cancel {shlex.quote(str(folder))}" if run else f"scancel {' '.join(jobs)}"
        raise UserError(f"{e}; submitted before that: {', '.join(jobs)} ({ends})") from None
    finally:
        if jobs and snapped is not None:
            snapped.record(jobs=jobs, words=words(request, snapped), cwd=str(request.cwd), cluster=cluster)
    return snapped, jobs


@contextmanager
def _script_file(script: Script, snapped: Snapshot | None) -> Iterator[Path]:
    """The script's file. sbatch makes its own copy."""
    with tempfile.TemporaryDirectory() as folder:
        path = snapped.script if snapped is not None else Path(folder) / snapshot.SCRIPT
        path.write_text(script.text, encoding="utf-8")
        yield path


def _options(request: Request) -> dict[str, str | None]:
    profile, work = request.profile, request.work
    options: dict[str, str | None] = {
        "job-name": "ibq-" + re.sub(r"[^\w.-]+", "-", work.name),
        "nodes": str(request.nodes),
        "chdir": str(request.cwd),
    }
    options |= work.options
    gpus, ranks = profile.gpus_per_node, profile.ntasks_per_node
    if gpus is not None:
        options["gpus-per-node"] = str(gpus) if gpus else None
        ranks = ranks or max(1, gpus)
    given = {key: getattr(profile, key) for key in ("partition", "account", "qos", "constraint", "time", "mem")}
    given |= {"ntasks-per-node": ranks, "cpus-per-task": profile.cpus_per_task}
    return options | {key: str(value) for key, value in given.items() if value is not None}


def _own_command() -> str:
    path = Path(sys.executable).parent / "ibq-scale"
    if not path.is_file():
        raise UserError(f"there is no {path}: write 'ibq_scale: PATH' into the cluster's profile")
    return str(path)


def _word(text: str) -> str:
    """A word of a shell array, with its variables."""
    return double_quoted(text) if re.search(r"[^\w@%+=:,./-]", text) else text
