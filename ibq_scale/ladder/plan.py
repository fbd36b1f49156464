"""The cost of a ladder, rung by rung, before training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ibq_scale.console import aligned, gigabytes, short
from ibq_scale.ladder.rungs import Rung
from ibq_scale.scaling.plan import Plan

Planned = Sequence[tuple[Rung, Plan]]
_HEAD = ("rung", "N", "tokens", "steps", "lr", "FLOPs", "memory", "checkpoint", "GPU hours")


def documents(planned: Planned) -> list[dict[str, Any]]:
    """As JSON. `command`: the training command of the rung."""
    return [
        {
            "rung": rung.name,
            "run": str(rung.folder),
            "parameters": sum(plan.parameters.values()),
            "tokens": rung.tokens,
            "steps": plan.steps,
            "lr": rung.run.optimizer.lr,
            "flops": rung.flops,
            "peak_memory": plan.memory.peak,
            "fits": plan.fits,
            "checkpoint_bytes": plan.checkpoint_bytes,
            "gpu_hours": plan.time.gpu_hours,
            "command": ["ibq-scale", "train", "ar", rung.preset, *rung.words],
        }
        for rung, plan in planned
    ]


def table(planned: Planned) -> list[str]:
    lines = aligned([_HEAD, *(_row(rung, plan) for rung, plan in planned)])
    plans = [plan for _, plan in planned]
    hours = [plan.time.gpu_hours for plan in plans if plan.time.gpu_hours is not None]
    kept = sum(plan.checkpoint_bytes * rung.run.train.keep_checkpoints for rung, plan in planned)
    cost = f"{sum(hours):,.1f} GPU hours" if len(hours) == len(plans) else "hours unknown"
    flops = sum(rung.flops for rung, _ in planned)
    lines.append(f"together: {len(plans)} rungs, {flops:.3g} FLOPs, {cost}, {gigabytes(kept)} of checkpoints")
    bases = dict.fromkeys(plan.time.basis for plan in plans)
    notes = dict.fromkeys(note for plan in plans for note in plan.notes)
    return [*lines, *bases, *(f"note: {note}" for note in notes)]


def _row(rung: Rung, plan: Plan) -> tuple[str, ...]:
    fits = {None: "", True: "", False: " DOES NOT FIT"}[plan.fits]
    hours = plan.time.gpu_hours
    return (
        rung.name,
        short(sum(plan.parameters.values()), 3),
        short(rung.tokens, 3),
        f"{plan.steps:,}",
        f"{rung.run.optimizer.lr:.3g}",
        f"{rung.flops:.3g}",
        f"{gigabytes(plan.memory.peak)}{fits}",
        gigabytes(plan.checkpoint_bytes),
        "–" if hours is None else f"{hours:,.1f}",
    )
