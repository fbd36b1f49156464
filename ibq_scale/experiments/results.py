"""The results of finished runs in one JSON file, enough for every figure and table without the runs."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from ibq_scale.config.layers import load_resolved
from ibq_scale.config.run import TokenizerRun
from ibq_scale.documents import read_json
from ibq_scale.errors import UserError
from ibq_scale.experiments.plan import CONFIGURATIONS, Configuration
from ibq_scale.experiments.run import EVALUATION
from ibq_scale.report.runs import RunLog, load_run

RESULTS = "experiments.json"
VERSION = 1
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
    """One line per run, so a diff shows the changed runs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(asdict(result), ensure_ascii=False) for result in results)
    path.write_text(f'{{"version": {VERSION}, "runs": [\n{lines}\n]}}\n', encoding="utf-8")


def load(path: Path) -> list[Result]:
    """Reads the file of `save`. UserError if it is missing or of another version."""
    if not path.is_file():
        raise UserError(f"{path} is missing: collect runs into it with 'ibq-scale experiments report --runs DIR'")
    values = read_json(path)
    names = {field.name for field in fields(Result)}
    if values.get("version") != VERSION or any(set(run) != names for run in values["runs"]):
        raise UserError(f"{path} was written by another version: collect the runs again (--runs DIR)")
    return [Result(**run) for run in values["runs"]]


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
