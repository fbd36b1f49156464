"""A run from its config: directory, logs, task, trainer."""

from __future__ import annotations

import json
import logging
import os
import platform
import sys
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from ibq_scale.checkpoint.mirror import Mirror
from ibq_scale.checkpoint.reading import Checkpoint
from ibq_scale.checkpoint.retention import Retention
from ibq_scale.checkpoint.saving import CheckpointFolder
from ibq_scale.commit import current_commit
from ibq_scale.config.batch import accumulation_steps
from ibq_scale.config.layers import require_complete, to_yaml
from ibq_scale.config.run import AnyRun, TokenizerRun
from ibq_scale.config.secrets import masked
from ibq_scale.console import tell
from ibq_scale.data.geometry import continued
from ibq_scale.data.manifest import NAME as MANIFEST
from ibq_scale.data.manifest import Kind, Manifest
from ibq_scale.data.sets import DataSets, open_sets
from ibq_scale.data.shared_memory import ranks_of_node
from ibq_scale.data.store import open_store
from ibq_scale.distributed.agree import by_rank_0, of_all_ranks
from ibq_scale.distributed.failures import describe, follows
from ibq_scale.distributed.node_check import check_nodes
from ibq_scale.distributed.side_channel import SideChannel
from ibq_scale.distributed.waiting import set_timeouts
from ibq_scale.distributed.world import World
from ibq_scale.errors import UserError
from ibq_scale.report.compare import write_report
from ibq_scale.scaling.auto import MICRO_BATCH, machine_of, open_keys
from ibq_scale.scaling.plan import Machine
from ibq_scale.scaling.prediction import PlanRatios, Prediction
from ibq_scale.scaling.profile import this_cpu, versions
from ibq_scale.supervise.attempts import add_unnoticed
from ibq_scale.supervise.compatible import check_same_data, check_same_run
from ibq_scale.supervise.dashboards import dashboard_classes
from ibq_scale.supervise.notify import Notices
from ibq_scale.supervise.preemption import REQUEUE_EXIT_CODE, StopRequest
from ibq_scale.supervise.restart import Restart
from ibq_scale.supervise.run_lock import locked
from ibq_scale.supervise.watchdog import FIRST_STEP_FACTOR, HUNG_EXIT_CODE, Watchdog
from ibq_scale.train.determinism import fix_the_order_of_sums, settle_tiles
from ibq_scale.train.memory_pressure import MemoryPressure, settle_within_limit
from ibq_scale.train.schedule import shape_of
from ibq_scale.train.startup_summary import startup_summary
from ibq_scale.train.task import Task
from ibq_scale.train.trainer import Outcome, Trainer

# Longest wait for running uploads to the mirror after a stop signal.
STOPPED_MIRROR_SECONDS = 20.0
PACKAGES = ("torch", "torchvision", "deepspeed", "webdataset", "s3fs", "numpy", "ibq-scale")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Start:
    """A start of a run. `hosts`: of each rank."""

    world: World
    stop: StopRequest
    hosts: list[str]
    machine: Machine
    pressure: MemoryPressure
    notices: Notices


def run_training(config: AnyRun, world: World, stop: StopRequest, command: Sequence[str] = ()) -> int:
    """Trains `config` to its end, from the newest whole checkpoint of its run directory if there is one.

    `command`: of this process, to start again with half of an open micro-batch after an out-of-memory in the first
    steps. Without it the run ends, and the next start has the smaller one.

    Returns the exit code: 0 done, 75 stopped by a signal with everything saved. UserError if another job trains in the
    same run directory. Any other error has a note with the path of its traceback.
    """
    require_complete(config)
    # An extension that cannot be imported ends the run before anything is built.
    shape_of(config.schedule)
    dashboard_classes(config)
    fix_the_order_of_sums(config)
    run_dir = Path(config.run_dir)
    notices: Notices | None = None
    try:
        with locked(run_dir, world) as release, closing(Restart(world, command, release)) as restart:
            notices = Notices(config, world)
            stop.leaving = partial(notices.ended, REQUEUE_EXIT_CODE)
            try:
                code = _start(config, run_dir, world, stop, restart, notices)
            except Exception:
                # Ranks that start again break the collectives of those that are about to.
                restart.hold()
                raise
    except UserError as e:
        if notices is not None:
            notices.ended(e.exit_code, str(e))
        raise
    except Exception as e:
        stop.leave_if_due()
        if isinstance(e, torch.OutOfMemoryError):
            e.add_note(f"('ibq-scale plan {run_dir}/config.yaml --device GPU --gpus N' names settings that would fit)")
        if (path := _log_path(run_dir, world)).is_file():
            log.exception("the run ends")
            e.add_note(f"(traceback in {path})")
        if notices is not None:
            notices.ended(1, describe(e), follows=follows(e))
        raise
    if world.is_main:
        notices.ended(code, "stopped by a signal, saved" if code else f"{config.train.total_steps} steps")
    return code


def _start(config: AnyRun, run_dir: Path, world: World, stop: StopRequest, restart: Restart, notices: Notices) -> int:
    if world.is_main:
        # A full disk is reported later, by a save.
        with suppress(OSError):
            add_unnoticed(run_dir)
    # Before any other read, write or collective.
    named = config.data.cache_dir
    cache_dir = None if named in (None, "auto") else Path(str(named))
    hosts = check_nodes(world, SideChannel(world), run_dir, cache_dir, partial(_ask_stores, config))
    notices.share()
    machine = machine_of(world)
    settled, choices = settle_within_limit(config, run_dir, machine, world)
    accumulation_steps(settled.train, world.size)
    if choices:
        # The settings that the config leaves open.
        _say(world, "auto: " + "; ".join(f"{c.key}={c.value} ({c.reason})" for c in choices))
    is_open = MICRO_BATCH in open_keys(config)
    pressure = MemoryPressure(run_dir, machine, world, restart, stop, is_open=is_open)
    return _train_locked(settled, run_dir, _Start(world, stop, hosts, machine, pressure, notices))


def _train_locked(config: AnyRun, run_dir: Path, start: _Start) -> int:
    world = start.world
    with closing(
        CheckpointFolder(run_dir / "checkpoints", world, Retention.of(config.train), Mirror.of(config.train.mirror))
    ) as checkpoints:
        resume_from = checkpoints.newest(config.train.check_hashes)
        start.stop.standing = checkpoints.standing
        if resume_from is not None:
            check_same_run(config, resume_from)
            data = continued(config.data, resume_from.manifest["config"]["data"])
            config = config.model_copy(update={"data": data})
        _prepare_run_dir(run_dir, config, world)
        if isinstance(config, TokenizerRun):
            settle_tiles(run_dir, config.quantizer, world)
        if resume_from is not None and resume_from.step >= config.train.total_steps:
            _say(world, f"{run_dir}: all {config.train.total_steps} steps are done; nothing to do")
            checkpoints.tidy(resume_from)
            checkpoints.start_mirror()
            checkpoints.finish_mirror()
            return 0
        outcome = _train_watched(config, start, checkpoints, resume_from)
        # Without the watchdog, since it may take long. After a signal time is short: the next start uploads the rest.
        checkpoints.finish_mirror(STOPPED_MIRROR_SECONDS if outcome.stopped else None)
    if not outcome.saved:
        raise UserError(
            f"{run_dir}/checkpoints: step {outcome.step} could not be saved (see above): make room, then the same "
            f"command goes on from the newest whole checkpoint"
        )
    # A run stopped during its start has nothing to report.
    if world.is_main and (run_dir / "metrics.jsonl").is_file():
        _report(run_dir)
    if outcome.stopped:
        _say(world, f"stopped at step {outcome.step} by a signal, saved; the same command goes on from there")
        return REQUEUE_EXIT_CODE
    _say(world, f"done: {outcome.step} steps; {run_dir}/checkpoints/latest, {run_dir}/metrics.jsonl")
    return 0


def _report(run_dir: Path) -> None:
    """Writes report.html. A failure only prints a line: the run is trained and saved."""
    try:
        write_report([run_dir], run_dir / "report.html")
    except Exception as e:
        tell(f"{run_dir}/report.html could not be written ({describe(e)}): 'ibq-scale report {run_dir}' tries again")


def _train_watched(
    config: AnyRun, start: _Start, checkpoints: CheckpointFolder, resume_from: Checkpoint | None
) -> Outcome:
    run_dir, timeout, world = Path(config.run_dir), config.train.hang_timeout, start.world
    step = resume_from.step if resume_from is not None else 0
    # 1.5 × the watchdog's longest patience, also for the engines' groups.
    patience = timedelta(seconds=1.5 * FIRST_STEP_FACTOR * timeout)
    set_timeouts(patience)
    stop, hung = start.stop, partial(start.notices.ended, HUNG_EXIT_CODE)
    with closing(Watchdog(run_dir, world, start.hosts, timeout, step, stop.stand_down, hung)) as watchdog:
        if stop.agreed(world):
            return Outcome(step, stopped=True, saved=True)
        kind: Kind = "images" if isinstance(config, TokenizerRun) else "codes"
        sets = _open_sets(config, kind, world)
        if resume_from is not None:
            check_same_data(config, resume_from, sets.hash)
        data = config.data.model_copy(update=sets.layout._asdict())
        config = config.model_copy(update={"data": data})
        if world.is_main:
            _write_config(run_dir, config)
        watchdog.report("building")
        begin = f"resuming from {resume_from.path}" if resume_from else "starting"
        said = startup_summary(config, world, start.hosts, sets, begin)
        predicted = Prediction.for_run(config, start.machine) if world.is_main else Prediction()
        task = _make_task(config, world, sets, patience)
        _say(world, said)
        trainer = Trainer(config, task, world, sets, checkpoints, watchdog, PlanRatios(predicted))
        with start.pressure.relieved(config, watchdog):
            return trainer.run(resume_from, stop)


def _open_sets(config: AnyRun, kind: Kind, world: World) -> DataSets:
    """The run's data. Rank 0 and one rank of every other node read the manifests, since a node may have its own copies.

    UserError, on every rank, if a node's copy differs from rank 0's.
    """
    opened: list[DataSets] = []

    def read() -> tuple[str, list[Manifest]]:
        opened.append(open_sets(config.data, kind, config.train.global_batch))
        return opened[0].hash, [part.manifest for part in opened[0].parts]

    found, manifests = by_rank_0(world, read)
    hashes = of_all_ranks(world, found if world.local_rank or world.is_main else read()[0])
    others = [rank for rank, its in enumerate(hashes) if its != found]
    if others:
        raise UserError(
            f"rank {others[0]} sees other data in {', '.join(config.data.sources)} than rank 0 does (the manifests "
            f"differ): give all nodes the same"
        )
    return opened[0] if opened else open_sets(config.data, kind, config.train.global_batch, manifests)


def _ask_stores(config: AnyRun) -> None:
    """UserError if this node finds no manifest in the data."""
    for url in config.data.sources:
        if not open_store(url).exists(MANIFEST):
            raise UserError(f"{url} has no {MANIFEST}")


def _make_task(config: AnyRun, world: World, sets: DataSets, patience: timedelta) -> Task:
    """The run's task. `patience`: how long collectives wait, those of the groups that it makes too."""
    if isinstance(config, TokenizerRun):
        from ibq_scale.train.tokenizer_task import TokenizerTask

        task: Task = TokenizerTask(config, world, sets)
    else:
        from ibq_scale.train.ar_task import ARTask

        task = ARTask(config, world, sets)
    set_timeouts(patience)
    return task


def _prepare_run_dir(run_dir: Path, config: AnyRun, world: World) -> None:
    if world.is_main:
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
        # A kill or a full disk leaves the old file or the new one, never an empty one.
        _write_config(run_dir, config)
        open_store(str(run_dir)).write("environment.json", (json.dumps(environment(world), indent=2) + "\n").encode())
    dist.barrier()
    # No traceback per line for a log on a full disk.
    logging.raiseExceptions = False
    handler = logging.FileHandler(_log_path(run_dir, world))
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    logging.getLogger("ibq_scale").setLevel(logging.INFO)


def _write_config(run_dir: Path, config: AnyRun) -> None:
    open_store(str(run_dir)).write("config.yaml", to_yaml(config).encode())


def _log_path(run_dir: Path, world: World) -> Path:
    return run_dir / "logs" / f"rank-{world.rank:05d}.log"


def environment(world: World) -> dict[str, object]:
    """Versions, git commit and devices, to reproduce a result."""
    cuda = torch.cuda.is_available()
    more: dict[str, object] = {"cpu": this_cpu(torch.get_num_threads())}
    if cuda:
        more = {"gpu_memory": torch.cuda.get_device_properties(world.device).total_memory}
    return {
        "python": platform.python_version(),
        "packages": versions(PACKAGES),
        "git": current_commit(),
        "world_size": world.size,
        "ranks_per_node": ranks_of_node(),
        "device": torch.cuda.get_device_name(world.device) if cuda else platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "command": [masked(word) if word.startswith("notify=") else word for word in sys.argv],
        **more,
    }


def _say(world: World, message: str) -> None:
    log.info("%s", message)
    if world.is_main:
        tell(message)
