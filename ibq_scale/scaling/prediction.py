"""A plan beside the run: predicted step time and peak memory, measured ones, and their ratios."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ibq_scale.config.run import AnyRun
from ibq_scale.documents import json_object, read_json_lines
from ibq_scale.errors import UserError
from ibq_scale.scaling.budget import FIXED
from ibq_scale.scaling.devices import BOARDS
from ibq_scale.scaling.plan import Machine, Plan, make_plan
from ibq_scale.scaling.profile import read_profile

TIME_RATIO, MEMORY_RATIO = "plan_time_ratio", "plan_memory_ratio"
# Newest log lines of the median.
LINES = 20

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prediction:
    """Seconds of a step, and peak bytes of a GPU's allocator. None where nothing is known of the device."""

    step_s: float | None = None
    peak_bytes: float | None = None

    @staticmethod
    def of(plan: Plan) -> Prediction:
        """CUDA's context and NCCL's channels are not the allocator's, so the peak is without them."""
        known = plan.machine.gpu_memory is not None
        return Prediction(plan.predicted_s, plan.memory.peak - FIXED if known else None)

    @staticmethod
    def for_run(run: AnyRun, machine: Machine) -> Prediction:
        """An empty one for a device without a data sheet or a measured rate, and where no plan can be made."""
        if machine.gpu_memory is None and (machine.profile is None or not machine.profile.rates):
            return Prediction()
        try:
            return Prediction.of(make_plan(run, machine, mfu=0.5))
        except Exception as e:  # of any type: a run does not end for want of its plan
            log.warning("no plan to compare this run with: %s", e)
            return Prediction()

    def ratios(self, step_s: float, peak_bytes: float) -> dict[str, float]:
        """Measured over predicted, for what is predicted."""
        ratios = {}
        if self.step_s is not None:
            ratios[TIME_RATIO] = step_s / self.step_s
        if self.peak_bytes is not None:
            ratios[MEMORY_RATIO] = peak_bytes / self.peak_bytes
        return ratios


class PlanRatios:
    """The ratios of each log line after the first, which includes compiling and the warming of caches."""

    def __init__(self, predicted: Prediction) -> None:
        self._predicted = predicted
        self._began = False

    def of(self, values: dict[str, float]) -> dict[str, float]:
        """From a line's `step_s` and `memory_bytes`."""
        began, self._began = self._began, True
        return self._predicted.ratios(values["step_s"], values["memory_bytes"]) if began else {}


@dataclass(frozen=True)
class RunMeasured:
    """What a run measured: the median seconds of a step in the newest lines, steps `first` to `last`, and its peak."""

    step_s: float
    peak_bytes: float
    first: int
    last: int


def machine_of_run(run_dir: Path) -> Machine:
    """The machine of a run's newest start, by its environment.json. UserError without one."""
    found = json_object(run_dir / "environment.json")
    world, device = found.get("world_size"), found.get("device")
    if not isinstance(world, int) or world < 1 or not isinstance(device, str):
        raise UserError(f"{run_dir}/environment.json tells no devices: the run has not started yet")
    node, memory = found.get("ranks_per_node"), found.get("gpu_memory")
    node = node if isinstance(node, int) and 0 < node <= world and world % node == 0 else world
    if device in BOARDS or isinstance(memory, int):
        own = memory if isinstance(memory, int) else None
        return Machine(node, world // node, BOARDS.get(device, device), own, profile=read_profile(device))
    cpu = found.get("cpu")
    return Machine(node, world // node, profile=read_profile(cpu if isinstance(cpu, str) else None))


def measured_of_run(run_dir: Path) -> RunMeasured | None:
    """From metrics.jsonl, without the first line. None for fewer than two lines."""
    path = run_dir / "metrics.jsonl"
    lines = [line for _, line in read_json_lines(path)] if path.is_file() else []
    lines = [line for line in lines if _is_whole(line)][1:][-LINES:]
    if not lines:
        return None
    seconds = statistics.median(float(line["step_s"]) for line in lines)
    return RunMeasured(seconds, float(lines[-1]["memory_bytes"]), _steps(lines)[0], _steps(lines)[-1])


def _is_whole(line: dict[str, Any]) -> bool:
    return all(isinstance(line.get(key), (int, float)) for key in ("step", "step_s", "memory_bytes"))


def _steps(lines: Sequence[dict[str, Any]]) -> list[int]:
    return [int(line["step"]) for line in lines]
