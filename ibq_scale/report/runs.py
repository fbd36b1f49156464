"""Reports of run directories: their curves laid over one another, their pictures, how their configs differ."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ibq_scale.config.layers import flatten
from ibq_scale.errors import UserError
from ibq_scale.report.page import Block, Chart, Picture, Point, Section, Series, Table, write

# Metrics in reading order: title, unit, what to look for, upper end.
METRICS: dict[str, tuple[str, str, str, float | None]] = {
    "loss": ("Loss", "", "what the optimizer minimises", None),
    "usage": ("Codebook usage", "share of codes", "codes chosen at least once since the line before", 1.0),
    "perplexity": ("Perplexity of the codes", "codes", "1 = one code for everything, K = all equally often", None),
    "dead": ("Dead codes", "share of codes", "not chosen in the last 1,000 steps", 1.0),
    "code_age": ("Age of the oldest code", "steps", "since it was last chosen", None),
    "l1": ("Reconstruction, L1", "", "images in [-1, 1]", None),
    "perceptual": ("Reconstruction, LPIPS", "", "", None),
    "perceptual_random": ("Distance of random features", "", "no LPIPS: its backbone has random weights", None),
    "quantization": ("Quantization loss", "", "", None),
    "entropy": ("Entropy loss", "nats", "sample entropy − batch entropy", None),
    "generator": ("Generator against the discriminator", "", "", None),
    "discriminator": ("Discriminator, hinge", "", "1 = it cannot tell", None),
    "logit_gap": ("Discriminator, logits of real − fake", "", "0 = it cannot tell", None),
    "discriminator_accuracy": ("Discriminator, accuracy", "share", "0.5 = it cannot tell", 1.0),
    "adversarial_weight": ("Weight of the generator's loss", "", "", None),
    "lecam": ("LeCAM regularisation", "", "", None),
    "grad_norm": ("Gradient norm", "", "before clipping", None),
    "skipped": ("Skipped steps", "since the line before", "a loss or gradient was not finite", None),
    "lr": ("Learning rate", "", "", None),
    "samples_per_s": ("Speed", "images/s", "whole world, data and logging included", None),
    "bad_samples": ("Damaged samples", "so far", "each replaced by a neighbour", None),
    "own_step_s_p50": ("The median rank's own time", "s a step", "outside of collectives", None),
    "own_step_s_max": ("The slowest rank's own time", "s a step", "the others wait for it", None),
    "save_stall_s": ("Standing still for a save", "s", "since the line before: the former save and the copy", None),
    "data_wait": ("Waiting for data", "share of time", "", None),
}


@dataclass(frozen=True)
class RunLog:
    """A run directory as a report sees it."""

    path: Path
    name: str
    config: dict[str, Any]
    environment: dict[str, Any]
    lines: list[dict[str, Any]]

    def points(self, metric: str) -> list[Point]:
        """The metric's logged values; none where it was never logged."""
        return [
            Point(int(line["step"]), int(line["samples"]), float(line["time"]), float(line[metric]))
            for line in self.lines
            if metric in line
        ]

    def series(self, metric: str, slot: int) -> Series:
        """As a line of a chart."""
        return Series(self.name, self.points(metric), slot)

    @property
    def newest_picture(self) -> Path | None:
        """What the run drew last."""
        pictures = sorted((self.path / "images").glob("step-*.png"))
        return pictures[-1] if pictures else None


def load_run(path: Path, name: str | None = None) -> RunLog:
    """Reads a run directory. UserError where it is none. A half-written last line is left out."""
    try:
        config = yaml.safe_load((path / "config.yaml").read_text())
        text = (path / "metrics.jsonl").read_text()
    except FileNotFoundError as e:
        raise UserError(f"{path} is no run directory with metrics: {Path(e.filename).name} is missing") from None
    lines = []
    for line in text.splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    environment = path / "environment.json"
    facts = json.loads(environment.read_text()) if environment.is_file() else {}
    return RunLog(path, name or str(path), config, facts, lines)


def metric_chart(metric: str, runs: Sequence[RunLog]) -> Chart | None:
    """One chart with a line a run, or None where no run logged the metric. A run keeps its colour everywhere."""
    series = [run.series(metric, slot) for slot, run in enumerate(runs)]
    series = [s for s in series if s.points]
    if not series:
        return None
    title, unit, note, top = METRICS.get(metric, (metric, "", "", None))
    return Chart(title, series, unit, note, top)


def curves(runs: Sequence[RunLog], metrics: Sequence[str] = tuple(METRICS)) -> list[Block]:
    """Charts of those metrics that were logged."""
    return [chart for metric in metrics if (chart := metric_chart(metric, runs)) is not None]


def write_report(paths: Sequence[Path], out: Path) -> Path:
    """Writes the report of one or several runs. UserError where one of them cannot be read."""
    runs = [load_run(path) for path in paths]
    title = runs[0].config.get("name", str(paths[0])) if len(runs) == 1 else f"{len(runs)} runs"
    sections = [Section("Where they stand", "", [_standing(runs)]), Section("Curves", "", curves(runs))]
    alarms = [
        [run.name, str(line["step"]), text] for run in runs for line in run.lines for text in line.get("alarms", ())
    ]
    if alarms:
        sections.insert(1, Section("Alarms", "", [Table(["run", "step", "what was seen"], alarms)]))
    pictures = [
        Picture(found.read_bytes(), f"{run.name}, {found.stem}: originals above, reconstructions below", run.name)
        for run in runs
        if (found := run.newest_picture) is not None
    ]
    if pictures:
        sections.append(Section("Pictures", "", pictures))
    if len(runs) > 1:
        sections.append(Section("What differs", "Keys of the configs with more than one value.", [_differences(runs)]))
    sections.append(Section("Environment", "", [environments(runs)]))
    return write(out, str(title), ", ".join(str(path) for path in paths), sections)


def _standing(runs: Sequence[RunLog]) -> Table:
    shown = ("loss", "usage", "l1", "samples_per_s")
    rows = []
    for run in runs:
        last = run.lines[-1] if run.lines else {}
        values = [f"{last[name]:.4g}" if name in last else "–" for name in shown]
        minutes = f"{last['time'] / 60:.1f} min" if last else "–"
        rows.append([run.name, str(run.config.get("task", "")), str(last.get("step", 0)), minutes, *values])
    heads = ["run", "task", "step", "time", *(METRICS[name][0].lower() for name in shown)]
    return Table(heads, rows)


def _differences(runs: Sequence[RunLog]) -> Table:
    flat = [flatten(run.config) for run in runs]
    keys = sorted({key for values in flat for key in values})
    rows = [
        [key, *(str(values.get(key, "–")) for values in flat)]
        for key in keys
        if len({str(values.get(key)) for values in flat}) > 1
    ]
    return Table(["key", *(run.name for run in runs)], rows)


def environments(runs: Sequence[RunLog]) -> Table:
    """What each run ran on."""

    def packages(run: RunLog) -> str:
        found = run.environment.get("packages", {})
        return ", ".join(f"{name} {version}" for name, version in found.items() if version)

    facts: list[tuple[str, list[str]]] = [
        ("world size", [str(run.environment.get("world_size", "–")) for run in runs]),
        ("device", [str(run.environment.get("device", "–")) for run in runs]),
        ("git commit", [str(run.environment.get("git") or "–")[:12] for run in runs]),
        ("Python", [str(run.environment.get("python", "–")) for run in runs]),
        ("packages", [packages(run) for run in runs]),
    ]
    return Table(["", *(run.name for run in runs)], [[name, *values] for name, values in facts])
