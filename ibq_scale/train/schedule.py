"""Learning rate and weight decay as functions of samples seen, so that no loader's length or rank count matters."""

from __future__ import annotations

import math

from ibq_scale.config.run import OptimizerConfig, ScheduleConfig


def lr_factor(schedule: ScheduleConfig, samples: int, total_samples: int) -> float:
    """Factor on the optimizer's lr for the step that begins after `samples` of `total_samples`."""
    warmup = schedule.warmup_samples
    if samples < warmup:
        return schedule.warmup_factor + (1 - schedule.warmup_factor) * samples / warmup
    if schedule.kind == "steps":
        return float(schedule.decay_factor ** sum(samples >= edge for edge in schedule.decay_at))
    rest = max(1, total_samples - warmup)
    progress = min(1.0, (samples - warmup) / rest)
    flat = schedule.constant_fraction
    if progress <= flat:
        return 1.0
    return 1.0 + (schedule.final_factor - 1.0) * (progress - flat) / (1.0 - flat)


def weight_decay(optimizer: OptimizerConfig, samples: int, total_samples: int) -> float:
    """The decay of the groups that decay: constant, or a cosine from `weight_decay` to `weight_decay_end`."""
    start, end = optimizer.weight_decay, optimizer.weight_decay_end
    if end is None:
        return start
    progress = min(1.0, samples / total_samples)
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * progress))
