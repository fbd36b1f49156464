"""From results to laws and a page: what is fitted, what is not and why, and every warning where it is read."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ibq_scale.cli.main import main
from ibq_scale.errors import UserError
from ibq_scale.ladder.figures import draw_fit
from ibq_scale.ladder.fit import Fit, NotFitted, document, fit_ladder
from ibq_scale.ladder.report import text, write_report
from ibq_scale.ladder.results import Result, load, save
from ibq_scale.scaling.laws import Law

SIZES, DATA = (1e6, 2e6, 4e6, 8e6), (1e8, 2e8, 4e8, 8e8)


def _result(n: float, d: float, codebook: int = 1024, seed: int = 0) -> Result:
    noise = np.random.default_rng((int(n), int(d), seed)).normal(0, 0.0005)
    loss = (3.0 + 200 / n**0.4 + 900 / d**0.35) * float(np.exp(noise))
    name = f"{n:.0e}-{d:.0e}-k{codebook}-seed{seed}"
    return Result(
        name,
        f"{n:.0e}",
        codebook,
        seed,
        int(n),
        int(d),
        1.0,
        6 * n * d,
        1e-3,
        10,
        loss,
        True,
        1.0,
        1,
        "cpu",
        "2",
        "abc",
    )


GRID = [_result(n, d) for n in SIZES for d in DATA]


def _fit(results: list[Result], **options: object) -> Fit:
    (fit,) = fit_ladder(results, replicas=50, **options)  # type: ignore[arg-type]
    return fit


@pytest.mark.slow
def test_a_grid_gives_all_three_kinds_of_law() -> None:
    fit = _fit(GRID)
    assert isinstance(fit.joint, Law)
    assert fit.joint.parameters()["alpha"].value == pytest.approx(0.4, abs=0.1)
    names = list(fit.laws)
    assert sum(name.startswith("L(N) at") for name in names) == 4
    assert sum(name.startswith("L(D) at") for name in names) == 4
    assert fit.not_fitted == []


@pytest.mark.slow
def test_budgets_nobody_trained_are_marked() -> None:
    fit = _fit(GRID)
    most = max(r.flops for r in GRID)
    assert [o.flops for o in fit.optima] == pytest.approx([most, 10 * most, 100 * most])
    assert all(any(line.startswith("EXTRAPOLATED") for line in o.warnings) for o in fit.optima[1:])
    said = "\n".join(text([fit], []))
    assert "WARNING at" in said
    assert said.count("FLOPs are 10 times above the most") == 1
    assert [o.flops for o in _fit(GRID, flops=[1e16]).optima] == [1e16]


@pytest.mark.slow
def test_codebooks_are_fitted_apart() -> None:
    """Their losses are of other units."""
    fits = fit_ladder([*GRID, *(_result(n, d, 16384) for n in SIZES for d in DATA)], replicas=10)
    assert [fit.codebook for fit in fits] == [1024, 16384]
    assert [len(fit.results) for fit in fits] == [16, 16]


def test_what_two_budgets_cannot_tell_is_said_and_not_fitted() -> None:
    fit = _fit([r for r in GRID if r.tokens in DATA[:2]])
    assert isinstance(fit.joint, NotFitted)
    assert "2 values of tokens cannot tell E from a power of D" in fit.joint.why
    assert fit.optima == ()
    assert sum(name.startswith("L(N) at") for name in fit.laws) == 2
    said = "\n".join(text([fit], []))
    assert "L(N, D): not fitted: " in said
    assert any(line.startswith("FEW RUNGS") for law in fit.laws.values() for line in law.warnings)
    assert "WARNING FEW RUNGS" in said


@pytest.mark.slow
def test_repeated_data_and_training_losses_are_warned_of() -> None:
    fit = _fit([replace(r, epochs=r.tokens / 1e8, held_out=r.tokens > 1e8) for r in GRID])
    repeated, trained = sorted(fit.warnings)
    assert repeated.startswith("REPEATED DATA: up to 8 passes")
    assert trained.startswith("TRAINING LOSS: 4 of 16")


@pytest.mark.slow
def test_the_page_holds_everything_and_needs_no_network(tmp_path: Path) -> None:
    fit = _fit([*GRID])
    page = write_report([fit], ["rung-not-done"], "mine", tmp_path).read_text()
    for part in ("<svg", "EXTRAPOLATED", "rung-not-done", "largest rung", GRID[0].name, "residual"):
        assert part in page, part
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in page


@pytest.mark.slow
def test_the_document_is_json() -> None:
    (values,) = json.loads(json.dumps(document([_fit(GRID)])))
    law = values["laws"]["L(N, D), K = 1,024"]
    assert len(law["residuals"]) == 16
    assert law["parameters"]["E"][1] <= law["parameters"]["E"][0] <= law["parameters"]["E"][2]
    assert values["optima"][1]["warnings"]


def test_results_come_back_as_they_were(tmp_path: Path) -> None:
    save(GRID, tmp_path / "results.json")
    assert load(tmp_path / "results.json") == GRID
    (tmp_path / "results.json").write_text('{"version": 0, "rungs": []}')
    with pytest.raises(UserError, match="of another version"):
        load(tmp_path / "results.json")
    with pytest.raises(UserError, match="is missing"):
        load(tmp_path / "no.json")


@pytest.mark.slow
def test_scale_fit_from_a_file_of_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(GRID, tmp_path / "results.json")
    words = ["scale", "fit", "cpu", f"out={tmp_path}", "--replicas", "20", "--flops", "1e17"]
    assert main([*words, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [o["flops"] for o in said["fits"][0]["optima"]] == [1e17]
    assert len(said["missing"]) == 8, "the ladder's own rungs are not among these"
    assert {Path(path).name for path in said["files"]} == {"fit.json", "report.html"}
    assert main([*words[:-2], "--flops", "0"]) == 2
    assert "--flops must be above 0" in capsys.readouterr().err


@pytest.mark.slow
def test_the_committed_fit_is_that_of_the_committed_results() -> None:
    """Each line of it, but for the last digits, which another machine may round otherwise."""
    docs = Path(__file__).resolve().parents[2] / "docs"
    said = (docs / "experiments.md").read_text().partition("<!-- fit -->")[2].partition("<!-- end: fit -->")[0]
    (fit,) = fit_ladder(load(docs / "scaling/results.json"))
    lines = text([fit], [])
    numbers = re.compile(r"-?\d[\d.e+-]*")
    committed = said.strip().strip("`").strip("\n").split("\n")
    assert [numbers.sub("#", line) for line in lines] == [numbers.sub("#", line) for line in committed]
    rungs = [line for line in lines if "seed0" in line]
    assert len(rungs) == 8
    assert [line in committed for line in rungs] == [True] * 8
    # Its words and numbers; of a curve the last pixel's tenth may differ.
    words = re.compile(r">([^<]+)<")
    assert words.findall(draw_fit(fit)) == words.findall((docs / "scaling/ladder.svg").read_text())
