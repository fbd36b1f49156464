"""Checks of a training job before submission, so that a fault shows at once and not after hours in the queue."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from ibq_scale.checkpoint.reading import Checkpoint, newest_or_this, whole_checkpoints
from ibq_scale.cluster import slurm
from ibq_scale.cluster.render import Script
from ibq_scale.cluster.room import can_hold, nearest
from ibq_scale.cluster.runs import jobs_of
from ibq_scale.config.batch import accumulation_steps, codebook_group_size
from ibq_scale.config.deepspeed import deepspeed_config, zero_words
from ibq_scale.config.run import AnyRun, TokenizerRun
from ibq_scale.config.secrets import has_wandb_login, wandb_host
from ibq_scale.console import gigabytes
from ibq_scale.errors import UserError
from ibq_scale.findings import Finding, Level
from ibq_scale.supervise.run_lock import read_lock

if TYPE_CHECKING:
    from ibq_scale.data.sets import DataSets
    from ibq_scale.scaling.auto import Choice
    from ibq_scale.scaling.plan import Machine, Plan

# sbatch may send a signal so much earlier (man sbatch).
SIGNAL_SECONDS = 60


@dataclass(frozen=True)
class Job:
    """The job to check. `script`: the text to submit. `queue`: submit it now. `failed`: names of failed checks."""

    script: Script
    queue: bool = field(default=True, kw_only=True)
    failed: set[str] = field(default_factory=set, kw_only=True)


@dataclass(frozen=True)
class Submission(Job):
    """A run, with the kind of GPU where it is known."""

    config: AnyRun
    gpu: str | None

    @property
    def nodes(self) -> int:
        return number(self.script, "nodes")

    @property
    def ranks(self) -> int:
        return self.nodes * number(self.script, "ntasks-per-node")

    @property
    def run_dir(self) -> Path:
        return Path(self.config.run_dir)

    @cached_property
    def machine(self) -> Machine:
        from ibq_scale.scaling.plan import Machine
        from ibq_scale.scaling.profile import read_profile

        cpus = number(self.script, "cpus-per-task") if self.script.option("cpus-per-task") else None
        return Machine(self.ranks // self.nodes, self.nodes, self.gpu, profile=read_profile(self.gpu), cpus=cpus)

    @cached_property
    def settled(self) -> tuple[AnyRun, tuple[Choice, ...]]:
        """The config as the job will have it on these GPUs, and the choices for what is ``auto``."""
        from ibq_scale.scaling.auto import settle

        return settle(self.config, self.machine)

    @cached_property
    def plan(self) -> Plan:
        from ibq_scale.scaling.plan import make_plan

        # The time is not needed, so any MFU is right.
        return make_plan(self.settled[0], self.machine, mfu=0.45)

    @cached_property
    def sets(self) -> DataSets:
        from ibq_scale.data.sets import open_sets

        kind: Literal["images", "codes"] = "images" if isinstance(self.config, TokenizerRun) else "codes"
        # The nodes read the shards. This host needs no folder for them.
        data = self.config.data.model_copy(update={"cache_dir": None})
        return open_sets(data, kind, self.config.train.global_batch)

    @cached_property
    def newest(self) -> Checkpoint | None:
        whole = whole_checkpoints(self.run_dir / "checkpoints")
        return whole[-1] if whole else None


Outcome = tuple[Level, str]
J = TypeVar("J", bound=Job)
# The name of a check, the checks it depends on, and its function.
Checks = Sequence[tuple[str, tuple[str, ...], Callable[[J], Outcome | None]]]


def run_checks(job: J, checks: Checks[J]) -> Iterator[Finding]:
    """Findings as they come. A check is left out after a failure of a check it needs. None: it does not apply."""
    for name, needs, check in checks:
        if job.failed & set(needs):
            continue
        try:
            found = check(job)
        except UserError as e:
            found = "FAIL", " ".join(str(e).split())
        if found is None:
            continue
        if found[0] == "FAIL":
            job.failed.add(name)
        yield Finding(found[0], name, found[1])


def _config(job: Submission) -> Outcome:
    train = job.config.train
    return "ok", f"{job.config.name}: {job.config.task}, {train.total_steps:,} steps of {train.global_batch}"


def _batch(job: Submission) -> Outcome:
    config, choices = job.settled
    train, chosen = config.train, ", ".join(f"{choice.key}={choice.value}" for choice in choices)
    accumulation = accumulation_steps(train, job.ranks)
    words = f"{train.global_batch} = {train.micro_batch} micro × {accumulation} accumulation × {job.ranks} ranks"
    return "ok", words + (f"; auto: {chosen}" if chosen else "")


def _codebook(job: Submission) -> Outcome | None:
    config = job.settled[0]
    if not isinstance(config, TokenizerRun):
        return None
    from ibq_scale.quantize.quantizer import rows_of

    group, rows = codebook_group_size(config, job.ranks), config.quantizer.codebook_size
    rows_of(0, group, rows)
    return "ok", f"{rows} codes over {group} ranks, {rows // group} on each"


def _deepspeed(job: Submission) -> Outcome:
    config = job.settled[0]
    stage = deepspeed_config(config, job.ranks).get("zero_optimization", {}).get("stage", 0)
    return "ok", f"{config.deepspeed.config}: {zero_words(stage, job.ranks)}"


def _memory(job: Submission) -> Outcome:
    if (wrong := ranks_without_gpu(job.script)) is not None:
        return wrong
    plan = job.plan
    needs = f"{gigabytes(plan.memory.peak)} a GPU"
    if not gpus_per_node(job.script):
        return "ok", f"{gigabytes(plan.memory.peak)} a rank, counted as for a GPU: this job asks for none"
    if plan.fits is None and job.gpu is not None:
        return "warn", f"needs {needs}; the memory of a {job.gpu} is not known (ibq-scale plan --memory GB)"
    if plan.fits is None:
        return "warn", f"needs {needs}; give --gpu (h100, a100-40gb …) to check the fit"
    memory = plan.machine.gpu_memory or 0.0
    if plan.fits:
        return "ok", f"{needs} of {gigabytes(memory)}"
    return "FAIL", (
        f"needs {needs}, a {job.gpu} has {gigabytes(memory)}: a smaller train.micro_batch, another deepspeed.config or "
        f"model.activation_checkpointing (ibq-scale plan shows each line)"
    )


def _data(job: Submission) -> Outcome:
    from ibq_scale.supervise.compatible import check_codes, open_held_out

    sets = job.sets
    validates = job.config.validation.data is not None
    if isinstance(job.config, TokenizerRun):
        if validates:
            open_held_out(job.config, sets, "images")
    else:
        check_codes(job.config, sets)
        if validates:
            check_codes(job.config, open_held_out(job.config, sets, "codes"))
    here = [part.store.url for part in sets.parts if part.store.local]
    seen = f"; {', '.join(here)} must be visible on all nodes" if here else ""
    return "ok", f"{sets.samples:,} samples in {', '.join(job.config.data.sources)}{seen}"


def _resume(job: Submission) -> Outcome:
    from ibq_scale.supervise.compatible import check_same_data, check_same_run

    newest, total = job.newest, job.config.train.total_steps
    if newest is None:
        mirror = job.config.train.mirror
        if mirror is None and job.config.init is not None:
            newest_or_this(Path(job.config.init))
        begins = f"goes on from {mirror} if there is a checkpoint" if mirror else "starts from step 0"
        return "ok", f"{job.run_dir} {begins}"
    check_same_run(job.config, newest)
    if "data" not in job.failed:
        check_same_data(job.config, newest, job.sets.hash)
    if newest.step >= total:
        return "warn", f"all {total} steps are done: the job will end at once (set train.steps for more)"
    return "ok", f"goes on from step {newest.step} of {total}"


def _weights(job: Submission) -> Outcome | None:
    from ibq_scale.losses.weights import files_of_run, missing

    files = files_of_run(job.config)
    faults = [fault for name in files if (fault := missing(name)) is not None]
    if faults:
        return "FAIL", "; ".join(faults)
    return ("ok", f"{', '.join(files)}: there") if files else None


def _wandb(job: Submission) -> Outcome | None:
    mode = os.environ.get("WANDB_MODE", job.config.wandb.mode)
    if job.config.wandb.mode == "off" or mode != "online":
        return None
    host = wandb_host()
    if has_wandb_login(host):
        return "ok", f"logged in to {host}; nodes must reach it"
    return "warn", f"not logged in to {host}, the run would go on without: 'wandb login', or wandb.mode=offline"


def _disk(job: Submission) -> Outcome:
    train, each = job.config.train, job.plan.checkpoint_bytes
    folder = nearest(job.run_dir)
    there = sum(c.bytes for c in whole_checkpoints(job.run_dir / "checkpoints"))
    # During a save, one checkpoint more than the kept ones.
    soon = each * (train.keep_checkpoints + 1 + (train.keep_best is not None)) - there
    in_the_end = soon + each * (train.total_steps // train.keep_every if train.keep_every else 0)
    free = shutil.disk_usage(folder).free
    if free < soon or can_hold(folder, max(soon, 1)) is False:
        return "FAIL", (
            f"checkpoints of {gigabytes(each)} need {gigabytes(soon)} more in {folder}, of {gigabytes(free)} "
            f"free (or of your quota): make room, give another out=…, or a smaller train.keep_checkpoints"
        )
    if free < in_the_end:
        needs = f"train.keep_every={train.keep_every} will take {gigabytes(in_the_end)}"
        return "warn", f"{needs}, of {gigabytes(free)} free"
    return "ok", f"{gigabytes(in_the_end)} for checkpoints of {gigabytes(each)}, of {gigabytes(free)} free"


def _cancel(job: Submission) -> str:
    return f"'ibq-scale cancel {shlex.quote(str(job.run_dir))}', or another out=…"


def _alone(job: Submission) -> Outcome:
    mine = jobs_of(job.run_dir, slurm.my_jobs())
    if mine:
        which = ", ".join(f"{other.id} ({other.state.lower()})" for other in mine)
        return "FAIL", f"{job.run_dir} has job {which} already: {_cancel(job)}"
    held = read_lock(job.run_dir)
    holder = held.holder if held is not None else None
    if holder is not None and holder.is_alive():
        return "FAIL", f"{job.run_dir} is trained by {holder}: {_cancel(job)}"
    if holder is not None and holder.is_alive() is None:
        return "warn", f"{job.run_dir} was held by {holder}; if that process lives, the job will be refused"
    return "ok", f"no other run in {job.run_dir}"


def _time(job: Submission) -> Outcome:
    text = job.script.option("time")
    limit = seconds(text or "")
    signal = re.fullmatch(r"(?:[BR]+:)?(?:SIG)?USR1@(\d+)", job.script.option("signal") or "")
    if signal is None:
        return "FAIL", "--signal must be USR1@SECONDS: a time limit would lose all steps after the last checkpoint"
    lead, grace = int(signal[1]), job.config.train.grace
    if lead <= grace:
        return "FAIL", f"--signal=USR1@{lead} leaves less than train.grace={grace:.0f} s: Slurm would kill the save"
    if limit is not None and limit <= lead + SIGNAL_SECONDS:
        return "FAIL", (
            f"--time={text} is no longer than the {lead} s for the final save: give more time, or a smaller train.grace"
        )
    return "ok", f"{text}; saves {lead} s before, within {grace:.0f} s (train.grace)"


def slurm_takes(job: Job) -> Outcome:
    try:
        return "ok", slurm.rehearse(job.script.text)
    except slurm.NoSlurmError as e:
        return "FAIL" if job.queue else "warn", str(e)


CHECKS: Checks[Submission] = (
    ("config", (), _config),
    ("batch", (), _batch),
    ("codebook", ("batch",), _codebook),
    ("deepspeed", ("batch",), _deepspeed),
    ("memory", ("batch", "codebook", "deepspeed"), _memory),
    ("data", (), _data),
    ("resume", (), _resume),
    ("weights", (), _weights),
    ("wandb", (), _wandb),
    ("disk", ("batch", "codebook", "deepspeed"), _disk),
    ("run", (), _alone),
    ("time", (), _time),
    ("slurm", (), slurm_takes),
)


def seconds(text: str) -> float | None:
    """Seconds of a time limit as sbatch reads it (``30``, ``30:00``, ``24:00:00``, ``2-12``, ``2-12:00``).

    None for no limit. UserError for anything else.
    """
    if text.upper() in ("UNLIMITED", "INFINITE", "NONE"):
        return None
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if found is None:
        raise UserError(f"--time={text} is not a time limit: write HH:MM:SS or DAYS-HH:MM:SS")
    days, *parts = (None if part is None else int(part) for part in found.groups())
    first, second, third = parts
    if days is not None or third is not None:
        return (days or 0) * 86400.0 + (first or 0) * 3600.0 + (second or 0) * 60.0 + (third or 0)
    return (first or 0) * 60.0 + (second or 0)


def ranks_without_gpu(script: Script) -> Outcome | None:
    """A failure unless each rank has one GPU. None if so, or on CPUs."""
    gpus, ranks = gpus_per_node(script), number(script, "ntasks-per-node")
    if not gpus or gpus == ranks:
        return None
    return "FAIL", f"{ranks} ranks on {gpus} GPUs of a node: a rank takes one GPU, set ntasks-per-node to {gpus}"


def gpus_per_node(script: Script) -> int:
    """0 for CPU ranks."""
    return number(script, "gpus-per-node") if script.option("gpus-per-node") else 0


def number(script: Script, key: str) -> int:
    """The number of an option, at least 1. UserError otherwise."""
    text = script.option(key) or ""
    # gpus-per-node may have a type before the number.
    last = text.rpartition(":")[2]
    if not last.isdigit() or int(last) < 1:
        raise UserError(f"--{key}={text} is not a positive whole number: write one")
    return int(last)
