"""The results of finished runs in one JSON file, enough for every figure and table without the runs."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from ibq_scale.checkpoint.files import write_whole
from ibq_scale.config.layers import load_resolved
from ibq_scale.config.run import TokenizerRun
from ibq_scale.documents import read_json
from ibq_scale.errors import UserError
from ibq_scale.experiments.plan import CONFIGURATIONS, Configuration
from ibq_scale.experiments.run import EVALUATION
from ibq_scale.report.runs import RunLog, load_run

RESULTS = "experiments.json"
VERSION = 1
Row = TypeVar("Row")
CURVES = ("usage", "perplexity", "l1")


@dataclass(frozen=True)
class Result:
    """One finished run. Shares are 0 to 1, `psnr` in dB, times in seconds, `l1` of images in [-1, 1].

    `curves` are of training, with a value for each of `steps`. There, `usage` is the share of codes chosen at least
    once since the step before. The fields `usage`, `perplexity`, `psnr` and `ssim` are of the averaged weights on
    `tokens` held-out tokens. `step_s` is the median over the windows.
    """

    name: str
    seed: int
    kind: str
    codes: int
    dim: int
    batch_tokens: int
    steps: list[int]
    curves: dict[str, list[float]]
    tokens: int
    usage: float
    perplexity: float
    psnr: float
    ssim: float
    step_s: float
    device: str
    torch: str
    commit: str


def collect(runs: Path) -> list[Result]:
    """Every finished run under `runs`, in the plan's order. UserError without any."""
    found = [
        _read(configuration, run)
        for configuration in CONFIGURATIONS
        for run in sorted((runs / configuration.name).glob("seed-*"), key=_seed)
        if (run / EVALUATION).is_file()
    ]
    if not found:
        raise UserError(f"{runs} holds no finished run: make them with 'ibq-scale experiments run'")
    return found


def save(results: list[Result], path: Path) -> None:
    save_rows(path, "runs", results)


def load(path: Path) -> list[Result]:
    return load_rows(path, "runs", Result, "collect runs into it with 'ibq-scale experiments report --runs DIR'")


def save_rows(path: Path, name: str, rows: Sequence[Any]) -> None:
    """Writes dataclasses, one line each, so a diff shows the changed rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(asdict(row), ensure_ascii=False) for row in rows)
    write_whole(path, f'{{"version": {VERSION}, "{name}": [\n{lines}\n]}}\n')


def load_rows(path: Path, name: str, kind: type[Row], todo: str) -> list[Row]:
    """Reads the file of `save_rows`. UserError with `todo` if it is missing, damaged or of another version."""
    try:
        values = read_json(path)
        names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
        if values["version"] == VERSION and all(set(row) == names for row in values[name]):
            return [kind(**row) for row in values[name]]
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {todo}") from None
    except (OSError, ValueError, TypeError, KeyError):
        pass
    raise UserError(f"{path} is damaged or of another version: {todo}")


def _seed(run: Path) -> int:
    return int(run.name.removeprefix("seed-"))


def _read(configuration: Configuration, run: Path) -> Result:
    config = load_resolved(run / "config.yaml")
    assert isinstance(config, TokenizerRun)
    log, evaluation = load_run(run), read_json(run / EVALUATION)
    tokens_a_tile = config.model.tokens
    return Result(
        name=configuration.name,
        seed=_seed(run),
        kind=config.quantizer.kind,
        codes=config.quantizer.codebook_size,
        dim=config.quantizer.dim,
        batch_tokens=config.train.global_batch * tokens_a_tile,
        steps=[point.step for point in log.points("usage")],
        curves={name: [_short(point.value) for point in log.points(name)] for name in CURVES},
        tokens=evaluation["images"] * tokens_a_tile,
        usage=_short(evaluation["usage"]),
        perplexity=_short(evaluation["perplexity"]),
        psnr=_short(evaluation["psnr"]),
        ssim=_short(evaluation["ssim"]),
        step_s=_short(statistics.median(point.value for point in log.points("step_s"))),
        **_environment(log),
    )


def _environment(log: RunLog) -> dict[str, str]:
    facts = log.environment
    return {
        "device": str(facts.get("device", "")),
        "torch": str(facts.get("packages", {}).get("torch", "")),
        "commit": str(facts.get("git") or "")[:12],
    }


def _short(value: float) -> float:
    return float(f"{value:.5g}")
