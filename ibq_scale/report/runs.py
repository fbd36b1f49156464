"""Run directories for reports: curves of several runs together, and differences of their configs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ibq_scale.config.layers import flatten
from ibq_scale.console import tell
from ibq_scale.documents import DocumentError, json_object, parse_yaml, read_text
from ibq_scale.errors import UserError
from ibq_scale.report.metrics import Curve, Metrics, read_metrics
from ibq_scale.report.page import Block, Chart, Point, Series, Table, extremes

# Metrics in reading order: title, unit, advice, upper end.
METRICS: dict[str, tuple[str, str, str, float | None]] = {
    "loss": ("Loss", "", "what the optimizer minimises", None),
    "validation_loss": ("Loss on held-out codes", "nats a code", "of the averaged weights", None),
    "validation_rfid": ("rFID on held-out images", "", "of few images it is larger than of 50,000", None),
    "validation_lpips": ("LPIPS on held-out images", "", "VGG", None),
    "validation_lpips_alex": ("LPIPS on held-out images, AlexNet", "", "", None),
    "validation_psnr": ("PSNR on held-out images", "dB", "", None),
    "validation_ssim": ("SSIM on held-out images", "", "", None),
    "validation_usage": ("Codebook usage on held-out images", "share of codes", "", 1.0),
    "validation_perplexity": ("Perplexity on held-out images", "codes", "", None),
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
    "codebook_lr": ("Learning rate of the codebook", "", "", None),
    "samples_per_s": ("Speed", "images/s", "whole world, data and logging included", None),
    "bad_samples": ("Damaged samples", "so far", "each replaced by a neighbour", None),
    "own_step_s_p50": ("The median rank's own time", "s a step", "outside of collectives", None),
    "own_step_s_max": ("The slowest rank's own time", "s a step", "the others wait for it", None),
    "save_stall_s": ("Standing still for a save", "s", "since the line before: the former save and the copy", None),
    "data_wait": ("Waiting for data", "share of time", "", None),
}


# The plural name of a kind of run, and the metrics of its state.
KINDS = {
    "tokenizer": ("tokenizers", ("loss", "l1", "usage", "validation_psnr", "validation_rfid", "samples_per_s")),
    "ar": ("transformers", ("loss", "validation_loss", "grad_norm", "samples_per_s")),
}


@dataclass(frozen=True)
class RunLog:
    """A run directory, as read for a report."""

    path: Path
    name: str
    config: dict[str, Any]
    environment: dict[str, Any]
    metrics: Metrics

    def curve(self, metric: str) -> Curve:
        """The metric's logged values. Empty if never logged."""
        return self.metrics.curve(metric)

    def points(self, metric: str) -> list[Point]:
        return [Point(*at) for at in zip(*(column.tolist() for column in self.curve(metric)), strict=True)]

    def series(self, metric: str, slot: int) -> Series:
        """As a line of a chart, with at most the shown number of points."""
        curve = self.curve(metric)
        kept_S = extremes(curve.values)
        columns = (column[kept_S].tolist() for column in curve)
        return Series(self.name, [Point(*at) for at in zip(*columns, strict=True)], slot)

    @property
    def kind(self) -> str:
        """A key of `KINDS`."""
        return str(self.config.get("task"))

    def last(self, metric: str) -> str:
        """The metric's newest value as text. Shares are in percent."""
        values = self.curve(metric).values
        if not len(values):
            return "–"
        return f"{100 * values[-1]:.3g} %" if METRICS[metric][3] == 1.0 else f"{values[-1]:.4g}"

    def pictures(self, name: str) -> list[Path]:
        """The run's pictures of a name, by step."""
        return sorted((self.path / "images").glob(f"{name}-{'[0-9]' * 8}.png"))


def load_run(path: Path, name: str | None = None) -> RunLog:
    """Reads a run directory. UserError if it is none. Damaged lines of metrics are left out (`read_metrics`)."""
    try:
        metrics = read_metrics(path / "metrics.jsonl")
        config = parse_yaml(read_text(path / "config.yaml"))
    except FileNotFoundError as e:
        raise UserError(f"{path} is no run directory with metrics: {Path(e.filename).name} is missing") from None
    except OSError as e:
        raise UserError(f"cannot read {e.filename}: {e.strerror}") from None
    except DocumentError:
        config = None
    if not isinstance(config, dict):
        raise UserError(
            f"{path}/config.yaml is damaged: copy the config of the run's submission or of a like run there"
        )
    return RunLog(path, name or str(path), config, json_object(path / "environment.json"), metrics)


def metric_chart(metric: str, runs: Sequence[RunLog], first_slot: int = 0) -> Chart | None:
    """One chart with a line per run. None if no run logged the metric. A run keeps its colour everywhere."""
    series = [run.series(metric, slot) for slot, run in enumerate(runs, first_slot)]
    series = [s for s in series if s.points]
    if not series:
        return None
    title, unit, note, top = METRICS.get(metric, (metric, "", "", None))
    return Chart(title, series, unit, note, top)


def curves(runs: Sequence[RunLog], metrics: Sequence[str] = tuple(METRICS), first_slot: int = 0) -> list[Block]:
    """Charts of the logged metrics. Runs have the colours from `first_slot` on."""
    return [chart for metric in metrics if (chart := metric_chart(metric, runs, first_slot)) is not None]


def runs_of(paths: Sequence[Path]) -> list[RunLog]:
    """Reads run directories. A run is named by its folder, or by more of its path if folders share a name.

    An unreadable run is reported and left out. UserError as `load_run` if all are unreadable.
    """
    names = [path.resolve().name for path in paths]
    runs, faults = [], []
    for path, name in zip(paths, names, strict=True):
        try:
            runs.append(load_run(path, name if names.count(name) == 1 else str(path)))
        except UserError as e:
            faults.append(e)
    if not runs:
        raise faults[0]
    for fault in faults:
        tell(f"ibq-scale: left out: {fault}")
    return runs


def by_kind(runs: Sequence[RunLog]) -> dict[str, list[RunLog]]:
    """Groups runs with comparable metrics and keys, by the plural name of their kind."""
    groups: dict[str, list[RunLog]] = {}
    for run in runs:
        groups.setdefault(KINDS.get(run.kind, ("runs", ()))[0], []).append(run)
    return groups


def standing(runs: Sequence[RunLog]) -> Table:
    shown = [
        name for name in KINDS.get(runs[0].kind, ("", ("loss",)))[1] if any(len(run.curve(name).values) for run in runs)
    ]
    rows = []
    for run in runs:
        log = run.curve("time")
        step, minutes = (str(log.steps[-1]), f"{log.seconds[-1] / 60:.1f} min") if len(log.steps) else ("0", "–")
        rows.append([run.name, step, minutes, *(run.last(name) for name in shown)])
    heads = [
        title if top == 1.0 or not unit else f"{title}, {unit}"
        for title, unit, _, top in map(METRICS.__getitem__, shown)
    ]
    return Table(["run", "step", "time", *heads], rows)


def differences(runs: Sequence[RunLog]) -> Table:
    """Keys of the configs with more than one value."""
    flat = [flatten(run.config) for run in runs]
    keys = sorted({key for values in flat for key in values})
    rows = [
        [key, *(str(values.get(key, "–")) for values in flat)]
        for key in keys
        if len({str(values.get(key)) for values in flat}) > 1
    ]
    return Table(["key", *(run.name for run in runs)], rows)


def environments(runs: Sequence[RunLog]) -> Table:
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
