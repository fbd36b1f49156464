"""The training loop: rates, step, log, signals, checkpoints. It is the same for both stages."""

from __future__ import annotations

import gc
import logging
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ibq_scale.checkpoint.reading import Checkpoint
from ibq_scale.checkpoint.saving import CheckpointFolder
from ibq_scale.config.batch import accumulation_steps
from ibq_scale.config.run import AnyRun
from ibq_scale.data.sets import DataSets
from ibq_scale.distributed.world import World
from ibq_scale.profiling import part
from ibq_scale.scaling.prediction import PlanRatios
from ibq_scale.supervise.alarms import Alarms
from ibq_scale.supervise.budgets import SkippedSteps
from ibq_scale.supervise.epoch_audit import EpochAudit
from ibq_scale.supervise.garbage import collect_young, collected_together
from ibq_scale.supervise.metrics import MetricsLog
from ibq_scale.supervise.preemption import StopRequest
from ibq_scale.supervise.profile import StepProfile
from ibq_scale.supervise.stragglers import Stragglers
from ibq_scale.supervise.watchdog import Watchdog
from ibq_scale.train.task import StepMetrics, Task, Validation
from ibq_scale.train.utilization import Utilization

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """How a call of `Trainer.run` ended."""

    step: int
    stopped: bool
    saved: bool
    """Whether the last step is on disk."""


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite. Nothing is saved after it."""


class _CountedBatches:
    """Measures the step's wait for data and notes its samples. `requests`: those since the last call."""

    def __init__(self, batches: Iterator[Any], once: EpochAudit, watchdog: Watchdog) -> None:
        self._batches = batches
        self._once = once
        self._watchdog = watchdog
        self._requests: list[Tensor] = []
        self.waited = 0.0

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        begin = time.perf_counter()
        self._watchdog.report("waiting for data")
        with part("wait for data"):
            batch = next(self._batches)
        self._watchdog.report("step")
        self.waited += time.perf_counter() - begin
        self._once.note(batch.requests)
        self._requests.append(batch.requests)
        return batch

    def requests(self) -> list[list[int]]:
        """(position, source, epoch, shard, row) of every sample since the last call."""
        rows = [row for part in self._requests for row in part.tolist()]
        self._requests.clear()
        return rows


class Trainer:
    """Runs a task from its newest whole checkpoint to the end of the config, or to a signal."""

    def __init__(
        self,
        config: AnyRun,
        task: Task,
        world: World,
        sets: DataSets,
        checkpoints: CheckpointFolder,
        watchdog: Watchdog,
        plan: PlanRatios,
    ) -> None:
        self.config = config
        self.run_dir = Path(config.run_dir)
        self.task = task
        self.world = world
        self.sets = sets
        self.checkpoints = checkpoints
        self.watchdog = watchdog
        self.once = EpochAudit(sets, config.train.seed, world)
        self.skipped = SkippedSteps(config.train.skipped_steps, world)
        self.alarms = Alarms(task.alarms)
        self.utilization = Utilization.of(config, world)
        self.plan = plan
        self._logged: dict[str, float] = {}
        self._stall = 0.0
        self._micro_batches = accumulation_steps(config.train, world.size)

    def run(self, resume_from: Checkpoint | None, stop: StopRequest) -> Outcome:
        """Trains. Collective, with the same outcome on every rank."""
        start = resume_from.step if resume_from is not None else 0
        with ExitStack() as stack:
            if resume_from is not None:
                self.watchdog.report("loading")
                self.task.load(resume_from.path)
                self.once.load(resume_from.path)
                self.skipped.load(resume_from.path)
            stack.callback(self.checkpoints.settle)
            self.checkpoints.start_mirror()
            metrics = None
            if self.world.is_main:
                metrics = stack.enter_context(closing(MetricsLog(self.run_dir, self.config, start)))
            stragglers = stack.enter_context(closing(Stragglers(self.world, self.watchdog.hosts)))
            self.watchdog.report("step")
            if stop.agreed(self.world):
                return Outcome(start, stopped=True, saved=True)
            train = self.config.train
            self.profile = StepProfile(self.run_dir, train.profile, train.profile_ranks, self.world)
            stack.callback(self.profile.close)
            with collected_together(), self.profile.out_of_memory():
                return self._loop(start, metrics, stop, stragglers)

    def _loop(self, start: int, metrics: MetricsLog | None, stop: StopRequest, stragglers: Stragglers) -> Outcome:
        train, total, watchdog = self.config.train, self.config.train.total_steps, self.watchdog
        batches = _CountedBatches(self.task.batches(start * train.global_batch), self.once, watchdog)
        window = _Window(batches)
        save_due = False
        for step in range(start + 1, total + 1):
            rates = self.task.set_rates((step - 1) * train.global_batch)
            with self.profile.step(step), stragglers.step():
                applied = self._train_step(step, batches, window)
            watchdog.step_ended(step)
            collect_young(step)
            stopping = stop.agreed_before(self.world)
            # The time left after a signal is for the checkpoint.
            validation = Validation() if stopping and step < total else self._validate(step, window)
            if step % train.log_every == 0 or step == total or validation.values:
                spread, alarms = stragglers.compare(batches.waited)
                values = window.close(self.world, train.global_batch) | rates | self.task.log_metrics() | spread
                values |= validation.values
                if self.utilization is not None:
                    values["mfu"] = self.utilization.mfu(values["samples_per_s"])
                values |= self.plan.of(values)
                values["save_stall_s"], self._stall = self._stall, 0.0
                _check_finite(values, step)
                self._logged = values
                self.once.check(step * train.global_batch)
                if metrics is not None:
                    alarms += self.alarms.check(values)
                    metrics.write(
                        step, step * train.global_batch, values, self.task.shown, alarms, self.task.histograms()
                    )
            if metrics is not None:
                metrics.show(step, validation.pictures)
            save_due |= step % train.checkpoint_every == 0
            # Bad weights skip every step from then on. They must not replace a good checkpoint.
            if stopping or step == total or (save_due and applied):
                watchdog.report("save")
                self._save(step, window, metrics)
                gc.collect()
                watchdog.report("step")
                save_due = False
            if stopping:
                return Outcome(step, stopped=step < total, saved=self.checkpoints.finish())
        return Outcome(total, stopped=False, saved=self.checkpoints.finish())

    def _train_step(self, number: int, batches: _CountedBatches, window: _Window) -> bool:
        """One step. Returns whether it was applied. A skipped step is left out of the metrics' means."""
        if self.config.train.skips(number):
            for _ in range(self._micro_batches):
                next(batches)
            batches.requests()
            window.add({})
            return False
        step = self.task.train_step(batches)
        requests = batches.requests()
        window.add(step.metrics if step.applied else {})
        if not step.applied:
            spike = step.spike
            named = spike.here if spike is not None else not bool(step.finite)
            samples = [self.sets.name(*row[1:2], *row[3:]) for row in requests] if named else []
            self.skipped.note(number, samples, None if spike is None else spike.text)
        return step.applied

    def _validate(self, step: int, window: _Window) -> Validation:
        begin = time.perf_counter()
        validation = self.task.validate(step, lambda: self.watchdog.report("validation"))
        window.leave_out(time.perf_counter() - begin)
        self.watchdog.report("step")
        return validation

    def _save(self, step: int, window: _Window, metrics: MetricsLog | None) -> None:
        """Saves, unless the loss so far is not finite: a diverged state must not replace the last good checkpoint.

        A failed write, perhaps on a full disk, does not end the run. The checkpoint before stands.
        """
        _check_finite(window.peek(self.world), step)
        self.once.check(step * self.config.train.global_batch)
        facts = {
            "step": step,
            "samples": step * self.config.train.global_batch,
            "world_size": self.world.size,
            "data_hash": self.sets.hash,
            "config": self.config.model_dump(mode="json"),
            "metrics": self._logged,
        }
        begin = time.perf_counter()
        state = [*self.task.state(), *self.once.state(), *self.skipped.state()]
        self.checkpoints.save(facts, state)
        self._stall += time.perf_counter() - begin
        if metrics is not None:
            metrics.show(step, self.task.draw())


class _Window:
    """Step metrics since the last log line, kept on the device. Closing it averages the ranks' means."""

    def __init__(self, batches: _CountedBatches) -> None:
        self._batches = batches
        self._sums: StepMetrics = {}
        self._steps = self._applied = 0
        self._begin = time.perf_counter()

    def add(self, metrics: StepMetrics) -> None:
        """A step's metrics, empty for a skipped step."""
        for name, value in metrics.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._steps += 1
        self._applied += bool(metrics)

    def peek(self, world: World) -> dict[str, float]:
        """Means over the window's applied steps and all ranks so far. Empty without an applied step."""
        if not self._applied:
            return {}
        names = sorted(self._sums)
        means = torch.stack([self._sums[name] for name in names]) / self._applied
        dist.all_reduce(means)
        return dict(zip(names, (means / world.size).tolist(), strict=True))

    def leave_out(self, seconds: float) -> None:
        """Leaves time outside of training out of the rates."""
        self._begin += seconds

    def close(self, world: World, global_batch: int) -> dict[str, float]:
        """`peek` with rates. A new window begins."""
        values = self.peek(world)
        seconds = time.perf_counter() - self._begin
        values["skipped"] = float(self._steps - self._applied)
        values["step_s"] = seconds / self._steps
        values["samples_per_s"] = global_batch * self._steps / seconds
        values["data_wait"] = self._batches.waited / seconds
        self._sums, self._steps, self._applied = {}, 0, 0
        self._begin, self._batches.waited = time.perf_counter(), 0.0
        return values


def _check_finite(values: dict[str, float], step: int) -> None:
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    if bad:
        raise NonFiniteLossError(
            f"{', '.join(bad)} became non-finite before step {step}; nothing was saved since. The newest whole "
            f"checkpoint stands: resume from it with a lower optimizer.lr"
        )
