"""Trains and evaluates the experiments, one after the other, by ordinary commands."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ibq_scale.checkpoint.files import write_whole
from ibq_scale.checkpoint.reading import newest_or_this
from ibq_scale.config.base import AUTO
from ibq_scale.config.layers import flatten, load_resolved, resolve
from ibq_scale.config.run import AnyRun
from ibq_scale.console import output_of
from ibq_scale.data.geometry import Layout
from ibq_scale.distributed.launch import launch
from ibq_scale.errors import UserError
from ibq_scale.experiments.plan import PRESET, Trial
from ibq_scale.experiments.tiles import prepare_tiles

# Keys of paths and of the machine.
PLACES = {"out", "data.train", "data.cache_dir", "data.cache_bytes", "data.workers", "validation.data"}
# Keys that the data choose where they are null.
LAYOUT = {f"data.{field}" for field in Layout._fields}
EVALUATION = "evaluation.json"
EVALUATION_BATCH = 64


def run_trials(pictures: Path, to: Path, trials: Sequence[Trial]) -> int:
    """Trains and evaluates every trial under `to`. Finished trials are skipped, unfinished ones resume.

    Returns 0, or the exit code of the first failed command (75: stopped by a signal, everything saved). UserError for a
    folder with a run of another config.
    """
    if not pictures.is_dir():
        raise UserError(f"{pictures} is not a folder: give one with photographs")
    for number, trial in enumerate(trials, 1):
        run = to / trial.name
        data = prepare_tiles(trial.configuration.pictures, pictures, to / "data" / trial.configuration.pictures)
        words = trial_overrides(trial, data["train"], run)
        config = resolve(PRESET, words, "tokenizer").config
        if is_finished(run, config):
            continue
        print(f"\n[{number}/{len(trials)}] {trial.name}", file=sys.stderr, flush=True)
        code = launch(["train", "tokenizer", PRESET, *words, "--ranks", "1"], ranks=1)
        code = code or _evaluate(run, config.train.total_steps, data["held-out"])
        if code:
            return code
    return 0


def trial_overrides(trial: Trial, train: str, run: Path) -> list[str]:
    """A trial's overrides of the preset, with its data at the URL `train`."""
    own = [f"name={trial.configuration.name}", f"train.seed={trial.seed}", f"data.train={train}", f"out={run}"]
    return [*trial.configuration.overrides, *own]


def is_finished(run: Path, config: AnyRun) -> bool:
    """Whether `run` is trained and evaluated. UserError if its config differs."""
    if not (run / "config.yaml").is_file():
        return False
    if not same_training(load_resolved(run / "config.yaml"), config):
        raise UserError(f"{run} is a run of another config: remove it, or give another folder with --to")
    return (run / EVALUATION).is_file()


def same_training(run: AnyRun, asked: AnyRun) -> bool:
    """Whether `run`, as it was trained, is what `asked` says. Keys of paths and of the machine may differ.

    Values that `asked` leaves open may be any: a run's config has those that were chosen at its start.
    """
    found, wanted = (flatten(config.model_dump(mode="json")) for config in (run, asked))
    chosen = {key for key, value in wanted.items() if value == AUTO or (value is None and key in LAYOUT)}
    return all(found.get(key) == wanted.get(key) for key in {*found, *wanted} - PLACES - chosen)


def _evaluate(run: Path, steps: int, held_out: str) -> int:
    reached = newest_or_this(run).step
    if reached < steps:
        # A partial run must not count as whole, whatever the exit code.
        print(f"ibq-scale: {run} ended at step {reached} of {steps}; run it again to go on", file=sys.stderr)
        return 1
    options = ["--batch", str(EVALUATION_BATCH), "--ranks", "1", "--json"]
    done = output_of(["evaluate", "reconstruction", str(run), held_out, *options])
    if done.returncode == 0:
        write_whole(run / EVALUATION, json.dumps(json.loads(done.stdout), indent=1) + "\n")
    return done.returncode
