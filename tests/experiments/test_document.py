"""Tables and figures say what the results hold, and the committed ones are those of the committed results."""

from __future__ import annotations

import itertools
import re
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from ibq_scale.errors import UserError
from ibq_scale.experiments import stability
from ibq_scale.experiments.document import DOCUMENT, FIGURES, STABILITY, draw_all, write_document
from ibq_scale.experiments.results import RESULTS, Result, load, save
from ibq_scale.experiments.tables import TABLES, ceiling, mean_and_spread
from ibq_scale.report.svg import LABEL_STEP, Axis, Panel, Series, figure

DOCS = Path(__file__).resolve().parents[2] / "docs"


def _result(name: str, seed: int, usage: float, codes: int = 1024, dim: int = 64) -> Result:
    curves = {"usage": [usage / 2, usage], "perplexity": [1.0, 2.0], "l1": [0.5, 0.25]}
    kind = "vq" if "vq" in name else "ibq"
    return Result(
        name,
        seed,
        kind,
        codes,
        dim,
        2048,
        [32, 64],
        curves,
        200_000,
        usage,
        9.0,
        17.0 + seed,
        0.5,
        0.2,
        "cpu",
        "2",
        "abc",
    )


RESULTS_OF_TWO = [_result("ibq-1024", 0, 0.99), _result("ibq-1024", 1, 0.97), _result("vq-1024", 0, 0.05)]


def _document(folder: Path) -> Path:
    places = [f"Words.\n<!-- table: {t} -->\n<!-- end: {t} -->\n" for t in (*TABLES, STABILITY)]
    (folder / DOCUMENT).write_text("".join(places))
    save(RESULTS_OF_TWO, folder / RESULTS)
    return folder


def test_results_come_back_as_they_were(tmp_path: Path) -> None:
    save(RESULTS_OF_TWO, tmp_path / RESULTS)
    assert load(tmp_path / RESULTS) == RESULTS_OF_TWO


def test_results_that_are_missing_or_of_another_version(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is missing"):
        load(tmp_path / RESULTS)
    (tmp_path / RESULTS).write_text('{"version": 1, "runs": [{"name": "ibq-1024"}]}')
    with pytest.raises(UserError, match="another version"):
        load(tmp_path / RESULTS)


def test_a_row_states_mean_spread_and_seeds_and_a_missing_one_says_so(tmp_path: Path) -> None:
    write_document(_document(tmp_path))
    text = (tmp_path / DOCUMENT).read_text()
    rows = {row.split(" | ")[0]: row for row in text.split("<!-- end")[0].splitlines() if row.startswith("| ")}
    assert "98.0 ± 1.4 %" in rows["| IBQ, K = 1,024"]
    assert rows["| IBQ, K = 1,024"].endswith("| 2 |")
    assert "| 5.0 % |" in rows["| VQ, K = 1,024"]
    assert rows["| IBQ, K = 16,384"].count("not run") == 6
    assert "64 steps of 2,048 tokens" in text
    assert "A window of training: 65,536 tokens" in text


def test_made_anew_the_document_stays_the_same_and_keeps_its_words(tmp_path: Path) -> None:
    write_document(_document(tmp_path))
    once = (tmp_path / DOCUMENT).read_text()
    write_document(tmp_path)
    assert (tmp_path / DOCUMENT).read_text() == once
    assert once.count("Words.\n") == len(TABLES) + 1


def test_a_document_without_a_tables_place(tmp_path: Path) -> None:
    _document(tmp_path)
    (tmp_path / DOCUMENT).write_text("nothing")
    with pytest.raises(UserError, match="must hold '<!-- table: collapse -->'"):
        write_document(tmp_path)


def test_figures_state_their_conditions_and_leave_out_what_was_not_run() -> None:
    made = draw_all(RESULTS_OF_TWO)
    assert set(made) == {"collapse.svg", "dimension.svg", "terms.svg"}, "no run of the ladder"
    texts = [
        t.text or "" for t in ElementTree.fromstring(made["collapse.svg"]).iter("{http://www.w3.org/2000/svg}text")
    ]
    assert any("64 steps of 2,048 tokens" in t and "seeds: 1 to 2" in t for t in texts)
    assert {"IBQ", "VQ", "1,024 codes", "step"} <= set(texts)


def test_a_value_lies_where_its_axis_says() -> None:
    axis = Axis("", 1, 100, [], log=True)
    assert axis.place(10, 0.0, 50.0) == pytest.approx(25.0)
    assert Axis("", 0, 4, []).place(1, 100.0, 20.0) == pytest.approx(80.0)


def test_labels_of_lines_that_end_together_do_not_lie_on_one_another() -> None:
    series = [Series(f"line {i}", i, line=[(0, 0.5), (1, 0.001 * i)]) for i in range(4)]
    axis = Axis("", 0, 1, [])
    svg = figure("", "", [Panel("", axis, axis, series)])
    places = sorted(float(y) for y in re.findall(r'y="([\d.]+)"[^>]*>line', svg))
    assert len(places) == 4
    assert all(b - a >= LABEL_STEP - 0.11 for a, b in itertools.pairwise(places))


def test_an_even_draw_sees_what_chance_allows() -> None:
    assert ceiling(262_144, 262_144) == pytest.approx(1 - 0.36788, abs=1e-4)
    assert ceiling(10**7, 1024) == pytest.approx(1.0)


def test_spread_is_the_sample_standard_deviation() -> None:
    assert mean_and_spread([1.0, 2.0, 3.0], 2) == "2.00 ± 1.00"
    assert mean_and_spread([1234.5], 0) == "1,234"


def test_the_committed_document_is_what_the_committed_results_make(tmp_path: Path) -> None:
    for name in (RESULTS, stability.RESULTS, DOCUMENT):
        shutil.copy(DOCS / name, tmp_path / name)
    for path in write_document(tmp_path):
        assert path.read_text() == (DOCS / path.relative_to(tmp_path)).read_text(), path.name
    shown = set(re.findall(rf"\({FIGURES}/([\w.-]+)\)", (DOCS / DOCUMENT).read_text()))
    assert shown == {p.name for p in (tmp_path / FIGURES).iterdir()}
