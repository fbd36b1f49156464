"""The page: sections of tiles, charts, pictures and tables, rendered to one self-contained HTML file."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ibq_scale.errors import UserError

# A chart has no more pixels for more points.
MOST_POINTS = 800
# Narrower pictures are enlarged without smoothing.
SMALL_PIXELS = 800


class Point(NamedTuple):
    """One logged value, and its place on each axis of the chart."""

    step: int
    samples: int
    seconds: float
    value: float


@dataclass(frozen=True)
class Series:
    """One line of a chart. `slot` fixes its colour, so a run has the same colour in every chart."""

    name: str
    points: Sequence[Point]
    slot: int = 0


@dataclass(frozen=True)
class Chart:
    """Lines over steps, images or minutes. `unit`: at the axis. `top`: fixes the upper end (for shares)."""

    title: str
    series: Sequence[Series]
    unit: str = ""
    note: str = ""
    top: float | None = None

    def html(self) -> str:
        data = {
            "unit": self.unit,
            "top": self.top,
            "series": [{"name": s.name, "slot": s.slot, "points": thin(s.points)} for s in self.series],
        }
        return (
            f'<figure class="chart"><figcaption><b>{escape(self.title)}</b>{_note(self.note)}</figcaption>'
            f'<div class="plot" role="img" aria-label="{escape(self.title, quote=True)}"></div>'
            f'<script type="application/json">{_json(data)}</script></figure>'
        )


@dataclass(frozen=True)
class Picture:
    """An embedded PNG. Pixels of a small one stay sharp squares."""

    png: bytes
    caption: str
    alt: str

    def html(self) -> str:
        caption = f"<figcaption>{escape(self.caption)}</figcaption>"
        return f'<figure class="picture">{_image(self.png, self.alt)}{caption}</figure>'


@dataclass(frozen=True)
class Gallery:
    """Labelled strips of pictures, one row per label."""

    rows: Sequence[tuple[str, bytes]]
    caption: str

    def html(self) -> str:
        body = "".join(
            f'<div class="strip"><span>{escape(label)}</span>{_image(png, label)}</div>' for label, png in self.rows
        )
        return f'<figure class="gallery">{body}<figcaption>{escape(self.caption)}</figcaption></figure>'


@dataclass(frozen=True)
class Tiles:
    """Figures at a glance: (label, value, note)."""

    items: Sequence[tuple[str, str, str]]

    def html(self) -> str:
        body = "".join(
            f'<div class="tile"><span>{escape(label)}</span><b>{escape(value)}</b><small>{escape(note)}</small></div>'
            for label, value, note in self.items
        )
        return f'<div class="tiles">{body}</div>'


@dataclass(frozen=True)
class Table:
    """Rows of text. `quoted`: rows of published figures, set apart. Missing last cells stay empty."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    quoted: Sequence[Sequence[str]] = ()

    def html(self) -> str:
        head = "".join(f"<th>{escape(cell)}</th>" for cell in self.head)
        body = "".join(f"<tr>{_cells(row)}</tr>" for row in self.rows)
        quoted = ([*row, *[""] * (len(self.head) - len(row))] for row in self.quoted)
        body += "".join(f'<tr class="quoted">{_cells(row)}</tr>' for row in quoted)
        # A <caption> would be as wide as the table and scroll with it.
        caption = f'<p class="caption">{escape(self.caption)}</p>' if self.caption else ""
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        return f'{caption}<div class="scroll">{table}</div>'


@dataclass(frozen=True)
class Bars:
    """Horizontal bars of durations in seconds, in their order."""

    title: str
    items: Sequence[tuple[str, float]]

    def html(self) -> str:
        longest = max((seconds for _, seconds in self.items), default=0.0) or 1.0
        body = "".join(
            f'<div class="bar"><span>{escape(name)}</span><i style="--share:{seconds / longest:.4f}"></i>'
            f"<b>{seconds:.1f} s</b></div>"
            for name, seconds in self.items
        )
        return f'<figure class="bars"><figcaption><b>{escape(self.title)}</b></figcaption>{body}</figure>'


Block = Chart | Picture | Gallery | Tiles | Table | Bars
# Kinds of blocks shown side by side, and their container's class.
BESIDE: dict[type[Block], str] = {Chart: "charts", Picture: "pictures"}


@dataclass(frozen=True)
class Section:
    """A heading, a sentence or two, and their blocks. Adjacent charts stand side by side, and so do pictures."""

    title: str
    text: str = ""
    blocks: Sequence[Block] = field(default_factory=tuple)

    def html(self) -> str:
        text = f"<p>{escape(self.text)}</p>" if self.text else ""
        parts = [f"<section><h2>{escape(self.title)}</h2>{text}"]
        for kind, blocks in groupby(self.blocks, type):
            body = "".join(block.html() for block in blocks)
            parts.append(f'<div class="{BESIDE[kind]}">{body}</div>' if kind in BESIDE else body)
        return "".join([*parts, "</section>"])


def render(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    assets = files("ibq_scale.report") / "assets"
    style = (assets / "style.css").read_text(encoding="utf-8")
    script = (assets / "charts.js").read_text(encoding="utf-8")
    body = "".join(section.html() for section in sections)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head><body><main>"
        f"<header><div><h1>{escape(title)}</h1><p>{escape(subtitle)}</p></div>"
        '<nav><span class="choice" id="axis"></span><button id="theme" type="button">dark</button></nav></header>'
        f"{body}</main><script>{script}</script></body></html>\n"
    )


def write(path: Path, title: str, subtitle: str, sections: Sequence[Section]) -> Path:
    """Renders to a file. The file appears whole. UserError if it cannot be written."""
    text = render(title, subtitle, sections)
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # File names may hold characters outside of any text encoding.
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")
        partial.replace(path)
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror or e}") from None
    return path


def thin(points: Sequence[Point]) -> list[list[float]]:
    """At most `MOST_POINTS` of the points, by their `extremes`."""
    # JSON has no other numbers, and a browser would refuse the whole chart.
    points = [p for p in points if math.isfinite(p.value) and math.isfinite(p.seconds)]
    chosen = [points[i] for i in extremes(np.array([p.value for p in points]))]
    return [[p.step, p.samples, round(p.seconds, 2), float(f"{p.value:.5g}")] for p in chosen]


def extremes(value_R: NDArray[np.float64]) -> NDArray[np.int64]:
    """Indices (S,) of the drawn values of a curve (R,), at most `MOST_POINTS`. The lowest and the highest value of each
    stretch stay, so no spike is lost. Values without a number hide none.
    """
    count = len(value_R)
    if count <= MOST_POINTS:
        return np.arange(count)
    stretch = -(-count * 2 // MOST_POINTS)
    firsts = np.arange(0, count, stretch)[:, None]
    kept = []
    for nothing, choose in ((np.inf, np.argmin), (-np.inf, np.argmax)):
        padded = np.full(len(firsts) * stretch, nothing)
        padded[:count] = np.where(np.isnan(value_R), nothing, value_R)
        kept.append(firsts + choose(padded.reshape(-1, stretch), axis=1)[:, None])
    return np.unique(np.concatenate(kept))


def _image(png: bytes, alt: str) -> str:
    source = base64.b64encode(png).decode()
    # Bytes 16 to 20 of a PNG are its width.
    sharp = ' class="sharp"' if int.from_bytes(png[16:20], "big") < SMALL_PIXELS else ""
    return f'<img{sharp} alt="{escape(alt, quote=True)}" src="data:image/png;base64,{source}">'


def _cells(row: Sequence[str]) -> str:
    return "".join(f"<td{_numeric(cell)}>{escape(cell)}</td>" for cell in row)


def _note(note: str) -> str:
    return f"<span>{escape(note)}</span>" if note else ""


def _numeric(cell: str) -> str:
    return ' class="number"' if cell[:1].isdigit() or cell[:1] in "-–" else ""


def _json(data: object) -> str:
    """JSON without a sequence that ends its script element or begins a comment or script."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
