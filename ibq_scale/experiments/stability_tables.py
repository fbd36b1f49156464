"""The stability bench as a table and as a figure."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from ibq_scale.console import aligned
from ibq_scale.experiments.stability import VARIANTS, Curve, Variant, ur_auc
from ibq_scale.experiments.tables import ceiling, markdown_table, mean_and_spread
from ibq_scale.report.svg import USAGE, Panel, Series, figure, mean_of, step_axis

NOTHING = "–"


def rows_of(curves: Sequence[Curve]) -> list[list[str]]:
    """The heads, then a row per size and quantizer: UR-AUC, the last usage by initial scale, seeds, CPU seconds."""
    scales = sorted({c.scale for c in curves if c.scale is not None})
    rows = [["quantizer", "K", "D", "UR-AUC", *(f"m = {scale:g}" for scale in scales), "CPU time", "seeds"]]
    for codes, variant, of_row in _grouped(curves):
        ends = [[100 * c.usage[-1] for c in of_row if c.scale in (scale, None)] for scale in scales]
        cells = [variant.label, f"{codes:,}", f"{of_row[0].dim}", mean_and_spread(ur_auc(of_row))]
        cells += [f"{mean_and_spread(end)} %" if end else NOTHING for end in ends]
        rows.append([*cells, f"{sum(c.cpu_seconds for c in of_row):,.0f} s", f"{len({c.seed for c in of_row})}"])
    return rows


def _grouped(curves: Sequence[Curve]) -> Iterator[tuple[int, Variant, list[Curve]]]:
    for codes in sorted({c.codes for c in curves}):
        for variant in VARIANTS:
            of_row = [c for c in curves if (c.codes, c.name) == (codes, variant.name)]
            if of_row:
                yield codes, variant, of_row


def text_table(curves: Sequence[Curve]) -> list[str]:
    return [conditions(curves), "", *aligned(rows_of(curves))]


def document(curves: Sequence[Curve]) -> dict[str, object]:
    """The JSON document: UR-AUC in per cent of each row and seed, and the curves."""
    rows = [
        {"name": variant.name, "codes": codes, "seeds": sorted({c.seed for c in of_row}), "ur_auc": ur_auc(of_row)}
        for codes, variant, of_row in _grouped(curves)
    ]
    return {"rows": rows, "curves": [asdict(curve) | {"area": curve.area} for curve in curves]}


def markdown(curves: Sequence[Curve]) -> str:
    if not curves:
        return "No run is finished."
    return "\n".join([conditions(curves), "", *markdown_table(rows_of(curves))])


def conditions(curves: Sequence[Curve]) -> str:
    """Sizes common to all curves, and the most that a window can show."""
    first = curves[0]
    most = ", ".join(f"{100 * ceiling(first.window, k):.1f} % of {k:,}" for k in sorted({c.codes for c in curves}))
    return (
        f"{first.steps[-1]} steps of {first.batch_tokens:,} tokens, rate {first.lr:g}. Windows of {first.window:,}. "
        f"An even draw of a window shows {most} codes. UR-AUC in per cent. m: usage at the end from this scale."
    )


def figures(curves: Sequence[Curve]) -> dict[str, str]:
    """SVG documents by file name. A panel per size: usage over steps, the mean over scales, with a band over seeds."""
    panels = []
    for codes in sorted({c.codes for c in curves}):
        series = [
            _series(variant.label, slot, [c for c in curves if (c.codes, c.name) == (codes, variant.name)])
            for slot, variant in enumerate(VARIANTS)
        ]
        steps = step_axis(curves[0].steps[0], curves[0].steps[-1])
        panels.append(Panel(f"{codes:,} codes", steps, USAGE, [s for s in series if s.line], right=128))
    if not panels:
        return {}
    scales = ", ".join(f"{m:g}" for m in sorted({c.scale for c in curves if c.scale is not None}))
    seeds = len({c.seed for c in curves})
    note = f"frozen encoder; mean over m = {scales}; seeds: {seeds} (band); area under a line: UR-AUC"
    return {"stability.svg": figure("Usage from codebooks that start too small or too large", note, panels)}


def _series(label: str, slot: int, curves: Sequence[Curve]) -> Series:
    """The mean over scales of each seed. Colours come again after five: dashes tell the second five apart."""
    by_seed = [[c.usage for c in curves if c.seed == seed] for seed in sorted({c.seed for c in curves})]
    rows = [[statistics.fmean(column) for column in zip(*usage, strict=True)] for usage in by_seed]
    return mean_of(label, slot, curves[0].steps if curves else (), rows, dashed=slot >= 5)
