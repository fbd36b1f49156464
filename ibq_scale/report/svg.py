"""Static SVG figures: panels side by side, lines with a band, dots, labels at the lines' ends. No script, no fonts.

A document embeds them as pictures on a ground of any colour. So a figure has its own ground, and every text is text.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

GROUND, INK, SOFT, RULE = "#ffffff", "#1b1d21", "#5c6370", "#e6e7e3"
COLOURS = ("#2563c9", "#c8590b", "#0d8a6a", "#8a3fb0", "#57606a")
PANEL_WIDTH, PANEL_HEIGHT = 440, 280
LEFT, RIGHT, TOP, BOTTOM = 58, 84, 34, 44
HEADER = 48
LABEL_STEP = 15
# The width of the longest note over a single panel.
NOTE_WIDTH = 660


@dataclass(frozen=True)
class Axis:
    """From `low` to `high`, linear or logarithmic, with the ticks given as (value, text)."""

    label: str
    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    log: bool = False

    def place(self, value: float, start: float, end: float) -> float:
        """The place of `value` between the pixels `start` and `end`."""
        scale: Callable[[float], float] = math.log if self.log else float
        share = (scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low))
        return start + share * (end - start)


USAGE = Axis("codes in use", 0, 1, [(v / 100, f"{v} %") for v in (0, 25, 50, 75, 100)])


def step_axis(first: int, last: int) -> Axis:
    """Training steps, with about five ticks."""
    every = max(1, (last - first) // 4)
    return Axis("step", first, max(last, first + 1), [(step, f"{step}") for step in range(first, last + 1, every)])


@dataclass(frozen=True)
class Series:
    """`line` through points (x, y), `band` of (x, low, high) around it, single `dots`, and a `label` at the
    right end.
    """

    label: str
    slot: int
    line: Sequence[tuple[float, float]] = ()
    band: Sequence[tuple[float, float, float]] = ()
    dots: Sequence[tuple[float, float]] = ()
    dashed: bool = False


def mean_of(
    label: str, slot: int, places: Sequence[float], rows: Sequence[Sequence[float]], *, dashed: bool = False
) -> Series:
    """The mean of rows with a value per place, and a band from the least to the most of several rows."""
    columns = list(zip(places, zip(*rows, strict=True), strict=True))
    line = [(x, statistics.fmean(values)) for x, values in columns]
    band = [(x, min(values), max(values)) for x, values in columns] if len(rows) > 1 else []
    return Series(label, slot, line, band, dashed=dashed)


@dataclass(frozen=True)
class Panel:
    """One pair of axes. `left` is the room for the texts of the y axis, in pixels."""

    title: str
    x: Axis
    y: Axis
    series: Sequence[Series]
    left: int = LEFT
    right: int = RIGHT


def figure(title: str, note: str, panels: Sequence[Panel]) -> str:
    """The whole SVG document. `note` stands under the title: sizes, steps, seeds."""
    widths = [PANEL_WIDTH + p.left - LEFT + p.right - RIGHT for p in panels]
    width, height = max(sum(widths), NOTE_WIDTH), HEADER + PANEL_HEIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="system-ui, -apple-system, Segoe UI, Roboto, Helvetica, Arial, sans-serif" font-size="12" '
        f'fill="{INK}" role="img"><title>{escape(title)}</title><rect width="{width}" height="{height}" '
        f'fill="{GROUND}"/>',
        _text(14, 21, title, size=15, weight=600),
        _text(14, 39, note, colour=SOFT),
    ]
    left = 0
    for panel, panel_width in zip(panels, widths, strict=True):
        parts.append(f'<g transform="translate({left} {HEADER})">{_panel(panel, panel_width)}</g>')
        left += panel_width
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(panel: Panel, width: int) -> str:
    x0, x1, y0, y1 = panel.left, width - panel.right, PANEL_HEIGHT - BOTTOM, TOP

    def at(x: float, y: float) -> tuple[float, float]:
        return round(panel.x.place(x, x0, x1), 1), round(panel.y.place(y, y0, y1), 1)

    parts = [_text(x0, 18, panel.title, weight=600)]
    for value, text in panel.y.ticks:
        y = at(panel.x.low, value)[1]
        parts.append(f'<path d="M{x0} {y}H{x1}" stroke="{RULE}"/>' + _text(x0 - 8, y + 4, text, "end", SOFT))
    for value, text in panel.x.ticks:
        x = at(value, panel.y.low)[0]
        parts.append(f'<path d="M{x} {y0}v4" stroke="{SOFT}"/>' + _text(x, y0 + 18, text, "middle", SOFT))
    parts.append(f'<path d="M{x0} {y0}H{x1}" stroke="{SOFT}"/>')
    parts.append(_text((x0 + x1) / 2, y0 + 36, panel.x.label, "middle", SOFT))
    if panel.y.label:
        middle = (y0 + y1) / 2
        turned = f'transform="rotate(-90 14 {middle})"'
        parts.append(_text(14, middle, panel.y.label, "middle", SOFT, more=turned))
    parts += [_series(series, at) for series in panel.series]
    return "\n".join([*parts, *_labels(panel, at, x1)])


def _series(series: Series, at: Callable[[float, float], tuple[float, float]]) -> str:
    colour = COLOURS[series.slot % len(COLOURS)]
    parts = []
    if series.band:
        edge = [at(x, high) for x, _, high in series.band] + [at(x, low) for x, low, _ in reversed(series.band)]
        parts.append(f'<polygon points="{_pairs(edge)}" fill="{colour}" fill-opacity=".16"/>')
    if series.line:
        dash = ' stroke-dasharray="4 4"' if series.dashed else ""
        points = _pairs([at(x, y) for x, y in series.line])
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
    for x, y in series.dots:
        cx, cy = at(x, y)
        parts.append(f'<circle cx="{cx}" cy="{cy}" r="4" fill="{colour}" fill-opacity=".65"/>')
    return "".join(parts)


def _labels(panel: Panel, at: Callable[[float, float], tuple[float, float]], x1: float) -> list[str]:
    """Labels at the lines' right ends, from top to bottom, moved apart against overlaps."""
    ends = sorted(((at(*s.line[-1])[1], s) for s in panel.series if s.label and s.line), key=lambda end: end[0])
    return [
        _text(x1 + 8, y + 4, series.label, colour=COLOURS[series.slot % len(COLOURS)], weight=600)
        for y, (_, series) in zip(_apart([y for y, _ in ends]), ends, strict=True)
    ]


def _apart(wanted: Sequence[float]) -> list[float]:
    """Ascending places at least `LABEL_STEP` apart, close to the wanted ones."""
    places = list(wanted)
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + LABEL_STEP)
    over = places[-1] - (PANEL_HEIGHT - BOTTOM) if places else 0.0
    if over > 0:
        places[-1] -= over
        for i in reversed(range(len(places) - 1)):
            places[i] = min(places[i], places[i + 1] - LABEL_STEP)
    return places


def _text(
    x: float,
    y: float,
    text: str,
    anchor: str = "start",
    colour: str = INK,
    *,
    size: int = 12,
    weight: int = 400,
    more: str = "",
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}" font-size="{size}" '
        f'font-weight="{weight}" {more}>{escape(text)}</text>'
    )


def _pairs(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x},{y}" for x, y in points)
