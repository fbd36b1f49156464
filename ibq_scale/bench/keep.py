"""Adds a benchmark's rates to the profile of this device, for `plan` and `auto` (`scaling.profile`)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ibq_scale.errors import UserError
from ibq_scale.scaling.profile import LinkRate, StepRate, profile_to_extend, this_cpu, today, write_profile

if TYPE_CHECKING:
    from ibq_scale.bench.collectives import CollectivesReport
    from ibq_scale.bench.steps import StepReport


def keep_rate(report: StepReport, task: str, *, compiled: bool) -> Path:
    """Keeps the rate of a training step, and returns the profile's path. OSError."""
    rate = StepRate(
        task=task,
        precision=report.precision,
        compile=compiled,
        ranks=report.ranks,
        micro_batch=report.micro_batch,
        flops_per_image=report.flops_per_image,
        executed_per_image=report.executed_per_image,
        images_per_s=report.images_per_s / report.ranks,
        date=today(),
    )
    return write_profile(profile_to_extend(_device(report.device)).with_rate(rate))


def keep_link(report: CollectivesReport) -> Path:
    """Keeps the speed of the ranks' links. UserError for a single rank or wrong sums, OSError."""
    if report.ranks == 1 or not report.right:
        raise UserError("--write needs right sums of at least two ranks: nothing is kept")
    link = LinkRate(report.ranks, report.nodes, report.bus_bytes_per_s, report.latency_s, today())
    return write_profile(profile_to_extend(_device(report.device)).with_link(link))


def _device(name: str) -> str:
    return this_cpu(torch.get_num_threads()) if name == "CPU" else name
