"""Fills docs/experiments.md: the figures beside it, and each table between its markers. The text stays."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from ibq_scale.errors import UserError
from ibq_scale.experiments import stability, stability_tables
from ibq_scale.experiments.results import RESULTS, Result, load
from ibq_scale.experiments.tables import TABLES, ceiling, conditions, spread_of, window_tokens
from ibq_scale.report.svg import USAGE, Axis, Panel, Series, figure, mean_of, step_axis

DOCUMENT, FIGURES, STABILITY = "experiments.md", "figures", "stability"
IBQ, VQ, ROOM = 0, 1, 4
Value = Callable[[Result], float]


def write_document(docs: Path) -> list[Path]:
    """Makes figures and tables from ``experiments.json`` and ``stability.json`` in `docs`. Returns the written files.

    UserError if the results, the document or a table's markers are missing.
    """
    results = load(docs / RESULTS)
    curves = stability.load(docs / stability.RESULTS) if (docs / stability.RESULTS).is_file() else []
    document = docs / DOCUMENT
    if not document.is_file():
        raise UserError(f"{document} is missing: --docs must be its folder")
    text = document.read_text(encoding="utf-8")
    for name, table in TABLES.items():
        text = _replaced(text, name, table.markdown(results), document)
    text = _replaced(text, STABILITY, stability_tables.markdown(curves), document)
    document.write_text(text, encoding="utf-8")
    written = [document]
    (docs / FIGURES).mkdir(exist_ok=True)
    for name, svg in (draw_all(results) | stability_tables.figures(curves)).items():
        written.append(docs / FIGURES / name)
        written[-1].write_text(svg, encoding="utf-8")
    return written


def _replaced(text: str, name: str, table: str, document: Path) -> str:
    begin, end = f"<!-- table: {name} -->", f"<!-- end: {name} -->"
    filled, count = re.subn(
        f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: f"{begin}\n{table}\n{end}", text, flags=re.DOTALL
    )
    if count != 1:
        raise UserError(f"{document} must hold '{begin}' and '{end}' once each, around the table")
    return filled


def draw_all(results: Sequence[Result]) -> dict[str, str]:
    """SVG documents by file name. A figure without runs is left out."""
    made = {
        "collapse.svg": _in_training("collapse", results, "Codebook usage in training: IBQ and VQ"),
        "long.svg": _in_training("long", results, "Codebook usage in training, three times the steps"),
        "usage.svg": _switched(results),
        "ladder.svg": _against("ladder", results, "the codebook's size", "codes K", lambda r: r.codes),
        "dimension.svg": _against("dimension", results, "the codes' dimension", "dimension D", lambda r: r.dim),
        "terms.svg": _terms(results),
    }
    return {name: svg for name, svg in made.items() if svg}


def _in_training(table: str, results: Sequence[Result], title: str) -> str:
    """A panel per codebook size: usage by window over steps, IBQ and VQ."""
    chosen = _named(results, [name for _, name in TABLES[table].rows])
    panels = []
    for codes in sorted({r.codes for r in chosen}):
        series = [
            _over_steps(kind.upper(), slot, [r for r in chosen if (r.codes, r.kind) == (codes, kind)])
            for kind, slot in (("ibq", IBQ), ("vq", VQ))
        ]
        steps = step_axis(0, max(r.steps[-1] for r in chosen))
        panels.append(Panel(f"{codes:,} codes", steps, USAGE, [s for s in series if s.line]))
    if not panels:
        return ""
    window = f"each point: {spread_of(chosen, window_tokens)}"
    return figure(title, _note(chosen, window, " (band)"), panels)


def _switched(results: Sequence[Result]) -> str:
    """Usage by window over steps, a line per row of the table."""
    rows = [(label, _named(results, [name])) for label, name in TABLES["usage"].rows]
    chosen = [r for _, runs in rows for r in runs]
    if not chosen:
        return ""
    steps = step_axis(0, max(r.steps[-1] for r in chosen))
    series = [_over_steps(label, slot, runs, dashed=slot >= 5) for slot, (label, runs) in enumerate(rows)]
    panel = Panel("16,384 codes", steps, USAGE, [s for s in series if s.line], right=240)
    window = f"each point: {spread_of(chosen, window_tokens)}"
    return figure("Codebook usage in training: rates and temperature", _note(chosen, window, " (band)"), [panel])


def _over_steps(label: str, slot: int, runs: Sequence[Result], *, dashed: bool = False) -> Series:
    usage = [run.curves["usage"] for run in runs]
    series = mean_of(label, slot, runs[0].steps if runs else (), usage, dashed=dashed)
    # A line of one point cannot be seen.
    return replace(series, dots=[(x, row[0]) for x, _ in series.line for row in usage] if len(series.line) == 1 else ())


def _against(table: str, results: Sequence[Result], title: str, label: str, x: Value) -> str:
    """Two panels over a logarithmic axis: held-out usage with its ceiling for so few tokens, and PSNR."""
    runs = _named(results, [name for _, name in TABLES[table].rows])
    if not runs:
        return ""
    places = sorted({x(r) for r in runs})
    ends = (places[0] / 1.4, places[-1] * 1.4)
    axis = Axis(label, *ends, [(p, f"{int(p):,}") for p in places], log=True)
    usage = [_means("IBQ", IBQ, runs, x, lambda r: r.usage)]
    room = _means("could be seen", ROOM, runs, x, lambda r: ceiling(r.tokens, r.codes))
    if min(y for _, y in room.line) < 0.99:
        usage.append(Series(room.label, ROOM, line=room.line, dashed=True))
    psnr = _means("IBQ", IBQ, runs, x, lambda r: r.psnr)
    low, high, ticks = _round_range([r.psnr for r in runs])
    panels = [
        Panel("Usage, held out", axis, USAGE, usage, right=112),
        Panel("PSNR, held out", axis, Axis("dB", low, high, ticks), [psnr], right=50),
    ]
    return figure(f"Usage and reconstruction against {title}", _held_out(runs), panels)


def _means(label: str, slot: int, runs: Sequence[Result], x: Value, y: Value) -> Series:
    places = sorted({x(r) for r in runs})
    line = [(p, statistics.fmean([y(r) for r in runs if x(r) == p])) for p in places]
    return Series(label, slot, line=line, dots=[(x(r), y(r)) for r in runs])


def _terms(results: Sequence[Result]) -> str:
    rows = TABLES["terms"].rows
    runs = _named(results, [name for _, name in rows])
    if not runs:
        return ""
    place = {name: len(rows) - 1 - i for i, (_, name) in enumerate(rows)}
    names = [(place[name], label) for label, name in rows]
    low, high, ticks = _round_range([r.psnr for r in runs])
    rows_with, rows_without = (
        Axis("", -0.6, len(rows) - 0.4, [(p, text if labelled else "") for p, text in names])
        for labelled in (True, False)
    )
    usage = Series("", IBQ, dots=[(r.usage, place[r.name]) for r in runs])
    psnr = Series("", IBQ, dots=[(r.psnr, place[r.name]) for r in runs])
    panels = [
        Panel("Usage, held out", replace(USAGE, label="of 1,024 codes"), rows_with, [usage], left=252, right=20),
        Panel("PSNR, held out", Axis("dB", low, high, ticks), rows_without, [psnr], left=20, right=30),
    ]
    return figure("The terms of the loss, each on and off", _held_out(runs), panels)


def _named(results: Sequence[Result], names: Sequence[str]) -> list[Result]:
    return [r for r in results if r.name in names]


def _note(runs: Sequence[Result], counted: str, drawn: str) -> str:
    seeds = spread_of(runs, lambda run: sum(1 for r in runs if r.name == run.name))
    return f"{conditions(runs)}; {counted} tokens; seeds: {seeds}{drawn}"


def _held_out(runs: Sequence[Result]) -> str:
    return _note(runs, f"held out: {spread_of(runs, lambda r: r.tokens)}", " (dots)")


def _round_range(values: Sequence[float]) -> tuple[float, float, list[tuple[float, str]]]:
    """Whole numbers around the values, and at most eight ticks."""
    low, high = int(min(values)), int(max(values)) + 1
    step = -(-(high - low) // 7)
    return low, high, [(v, f"{v}") for v in range(low, high + 1, step)]
