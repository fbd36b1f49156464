"""Learning rate and weight decay as functions of samples seen. Neither depends on a loader's length or the ranks."""

from __future__ import annotations

import math
from collections.abc import Callable

from ibq_scale import extensions
from ibq_scale.config.optimizer import OptimizerConfig, ScheduleConfig, TokenizerOptimizerConfig
from ibq_scale.config.run import ARRun
from ibq_scale.errors import UserError

Shape = Callable[[ScheduleConfig, int, int], float]


def lr_factor(schedule: ScheduleConfig, samples: int, total_samples: int) -> float:
    """Factor on the optimizer's lr for the step that begins after `samples` of `total_samples`."""
    warmup = schedule.warmup_samples
    if samples < warmup:
        return schedule.warmup_factor + (1 - schedule.warmup_factor) * samples / warmup
    return shape_of(schedule)(schedule, samples, total_samples)


def shape_of(schedule: ScheduleConfig) -> Shape:
    """The factor after warm-up: (schedule, samples, total_samples) → factor. UserError if it cannot be imported."""
    if schedule.kind in SHAPES:
        return SHAPES[schedule.kind]
    loaded: Shape = extensions.load(extensions.SCHEDULES, schedule.kind)

    def checked(schedule: ScheduleConfig, samples: int, total_samples: int) -> float:
        factor = float(loaded(schedule, samples, total_samples))
        if not 0 <= factor < math.inf:
            raise UserError(f"schedule.kind={schedule.kind}: a factor of {factor} after {samples} samples")
        return factor

    return checked


def codebook_lr(optimizer: TokenizerOptimizerConfig, schedule: ScheduleConfig, samples: int, total: int) -> float:
    """The rate of the codebook, or of SimVQ's layer, for the step that begins after `samples` of `total`.

    `schedule`: the run's, for a codebook without its own. StableVQ (arXiv 2609.26774) holds this rate constant.
    """
    rate = optimizer.lr if optimizer.codebook_lr is None else optimizer.codebook_lr
    return rate * lr_factor(optimizer.codebook_schedule or schedule, samples, total)


def weight_decay(optimizer: OptimizerConfig, samples: int, total_samples: int) -> float:
    """The decay of the groups with a decay: constant, or a cosine from `weight_decay` to `weight_decay_end`."""
    start, end = optimizer.weight_decay, optimizer.weight_decay_end
    if end is None:
        return start
    progress = min(1.0, samples / total_samples)
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * progress))


def random_order_share(run: ARRun, position: int) -> float:
    """Probability of a random order (0 to 1) for the sample at this position: r of arXiv 2411.00776, section 3.3."""
    if run.model.order != "annealed":
        return float(run.model.order == "random")
    start, end = run.schedule.order_anneal_start, run.schedule.order_anneal_end
    progress = position / run.train.total_samples
    if progress >= end:
        return 0.0
    return 1.0 if progress <= start else (end - progress) / (end - start)


def _steps(schedule: ScheduleConfig, samples: int, total_samples: int) -> float:
    return float(schedule.decay_factor ** sum(samples >= edge for edge in schedule.decay_at))


def _linear(schedule: ScheduleConfig, samples: int, total_samples: int) -> float:
    progress, flat = _progress(schedule, samples, total_samples), schedule.constant_fraction
    if progress <= flat:
        return 1.0
    return 1.0 + (schedule.final_factor - 1.0) * (progress - flat) / (1.0 - flat)


def _cosine(schedule: ScheduleConfig, samples: int, total_samples: int) -> float:
    """Loshchilov and Hutter 2017, eq. 5, without restarts."""
    progress, flat = _progress(schedule, samples, total_samples), schedule.constant_fraction
    if progress <= flat:
        return 1.0
    turned = math.cos(math.pi * (progress - flat) / (1.0 - flat))
    return schedule.final_factor + (1.0 - schedule.final_factor) * 0.5 * (1.0 + turned)


def _progress(schedule: ScheduleConfig, samples: int, total_samples: int) -> float:
    """The part of the run after warm-up that is done, 0 … 1."""
    rest = max(1, total_samples - schedule.warmup_samples)
    return min(1.0, (samples - schedule.warmup_samples) / rest)


SHAPES: dict[str, Shape] = {
    "steps": _steps,
    "linear": _linear,
    "wsd": _linear,
    "cosine": _cosine,
    "constant": lambda *_: 1.0,
}
