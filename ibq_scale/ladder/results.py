"""The results of a ladder's rungs in one JSON file, enough for fits and report without the runs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ibq_scale.errors import UserError
from ibq_scale.experiments.results import load_rows, save_rows
from ibq_scale.ladder.run import is_finished
from ibq_scale.ladder.rungs import Rung
from ibq_scale.report.runs import RunLog, load_run
from ibq_scale.scaling import networks

RESULTS = "results.json"
# Without a held-out loss: the last part of the logged training losses.
LAST = 0.1


@dataclass(frozen=True)
class Result:
    """One finished rung. `loss`: nats a code, held out (`held_out`) or at the end of training. `flops`: of the whole
    training. `epochs`: passes over its data, None if unknown. `seconds`: of training, over all attempts.
    """

    name: str
    size: str
    codebook: int
    seed: int
    parameters: int
    tokens: int
    epochs: float | None
    flops: float
    lr: float
    steps: int
    loss: float
    held_out: bool
    seconds: float
    ranks: int
    device: str
    torch: str
    commit: str


def collect(rungs: Sequence[Rung]) -> tuple[list[Result], list[str]]:
    """Every finished rung, and the names of the others. UserError without a finished one."""
    done = [rung for rung in rungs if is_finished(rung)]
    if not done:
        raise UserError(f"no rung is finished in {rungs[0].folder.parent}: train them with 'ibq-scale scale run'")
    results = [_read(rung) for rung in done]
    return results, [rung.name for rung in rungs if rung not in done]


def save(results: Sequence[Result], path: Path) -> None:
    save_rows(path, "rungs", results)


def load(path: Path) -> list[Result]:
    return load_rows(path, "rungs", Result, "write it with 'ibq-scale scale collect'")


def _read(rung: Rung) -> Result:
    log = load_run(rung.folder)
    loss, held_out = _loss(log, rung)
    facts = log.environment
    return Result(
        name=rung.name,
        size=rung.size,
        codebook=rung.codebook,
        seed=rung.seed,
        parameters=networks.transformer(rung.run).parameters,
        tokens=rung.tokens,
        epochs=_epochs(rung),
        flops=rung.flops,
        lr=rung.run.optimizer.lr,
        steps=rung.run.train.total_steps,
        loss=loss,
        held_out=held_out,
        seconds=float(log.curve("time").seconds[-1]),
        ranks=int(facts.get("world_size", 1)),
        device=str(facts.get("device", "")),
        torch=str(facts.get("packages", {}).get("torch", "")),
        commit=str(facts.get("git") or ""),
    )


def _loss(log: RunLog, rung: Rung) -> tuple[float, bool]:
    """The last held-out loss, else the mean of the last lines' training loss."""
    if rung.run.validation.data is not None:
        found = log.points("validation_loss")
        if found and found[-1].step == rung.run.train.total_steps:
            return found[-1].value, True
        raise UserError(
            f"{rung.folder}/metrics.jsonl lacks the held-out loss of its last step: remove it, run it again"
        )
    losses = [point.value for point in log.points("loss")]
    if not losses:
        raise UserError(f"{rung.folder}/metrics.jsonl holds no loss: set a smaller train.log_every")
    return statistics.fmean(losses[-max(1, round(LAST * len(losses))) :]), False


def _epochs(rung: Rung) -> float | None:
    """From the data's manifest. None if it is out of reach."""
    from ibq_scale.data.sets import open_sets

    try:
        sets = open_sets(rung.run.data.model_copy(update={"cache_dir": None}), "codes")
    except UserError:
        return None
    return rung.run.train.total_samples / sets.samples
