"""The tables of docs/experiments.md: a row per configuration, mean ± standard deviation over its seeds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ibq_scale.experiments.plan import CONFIGURATIONS
from ibq_scale.experiments.results import Result

Cell = Callable[[Sequence[Result]], str]
NOT_RUN = "not run"


@dataclass(frozen=True)
class Table:
    """`rows`: (label, configuration). `columns`: (head, text from a configuration's runs)."""

    first: str
    rows: Sequence[tuple[str, str]]
    columns: Sequence[tuple[str, Cell]]

    def markdown(self, results: Sequence[Result]) -> str:
        """The table, below a line with the facts common to all its runs."""
        of_row = [(label, [r for r in results if r.name == name]) for label, name in self.rows]
        rows = [[self.first, *(head for head, _ in self.columns), "seeds"]]
        for label, found in of_row:
            cells = [cell(found) if found else NOT_RUN for _, cell in self.columns]
            rows.append([label, *cells, str(len(found))])
        runs = [r for _, found in of_row for r in found]
        return "\n".join([_above(runs), "", *markdown_table(rows)])


def conditions(results: Sequence[Result]) -> str:
    """Sizes and steps of these runs, as ranges if they differ."""
    steps = spread_of(results, lambda r: r.steps[-1])
    batch, dim = spread_of(results, lambda r: r.batch_tokens), spread_of(results, lambda r: r.dim)
    return f"{steps} steps of {batch} tokens, codes of {dim} dimensions"


def spread_of(results: Sequence[Result], value: Callable[[Result], int]) -> str:
    """``160``, or ``100 to 160`` for a range."""
    values = [value(r) for r in results]
    least, most = min(values), max(values)
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


def window_tokens(result: Result) -> int:
    """Tokens behind the usage in one logged line of training."""
    return result.steps[0] * result.batch_tokens


def ceiling(tokens: int, codes: int) -> float:
    """Expected share (0 to 1) of codes chosen at least once in so many uniform draws."""
    return 1.0 - (1.0 - 1.0 / codes) ** tokens


def even_in_window(result: Result) -> float:
    """`ceiling` for one logged line of training."""
    return ceiling(window_tokens(result), result.codes)


def mean_and_spread(values: Sequence[float], digits: int = 1) -> str:
    """``98.1 ± 0.3`` (sample standard deviation), or the value of a single seed."""
    mean = f"{statistics.fmean(values):,.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):,.{digits}f}" if len(values) > 1 else mean


def percent(value: Callable[[Result], float]) -> Cell:
    """A column of shares, in per cent."""
    return lambda results: f"{mean_and_spread([100 * value(r) for r in results])} %"


def number(value: Callable[[Result], float], digits: int, unit: str = "") -> Cell:
    return lambda results: mean_and_spread([value(r) for r in results], digits) + unit


_HELD_OUT: list[tuple[str, Cell]] = [
    ("usage, held out", percent(lambda r: r.usage)),
    ("perplexity, held out", number(lambda r: r.perplexity, 0)),
    ("PSNR, held out", number(lambda r: r.psnr, 2, " dB")),
]
_TRAINING: list[tuple[str, Cell]] = [
    ("usage, lowest window", percent(lambda r: min(r.curves["usage"]))),
    ("usage, last window", percent(lambda r: r.curves["usage"][-1])),
]
_LATER: list[tuple[str, Cell]] = [
    ("usage, first window", percent(lambda r: r.curves["usage"][0])),
    ("usage, lowest later window", percent(lambda r: min(r.curves["usage"][1:]))),
    _TRAINING[1],
]
_OF_EVEN: list[tuple[str, Cell]] = [
    ("first window, of an even draw", percent(lambda r: r.curves["usage"][0] / even_in_window(r))),
    ("lowest later window", percent(lambda r: min(r.curves["usage"][1:]) / even_in_window(r))),
    ("last window", percent(lambda r: r.curves["usage"][-1] / even_in_window(r))),
    ("held out, of an even draw", percent(lambda r: r.usage / ceiling(r.tokens, r.codes))),
]
_SPEED: list[tuple[str, Cell]] = [("time of a step", number(lambda r: 1000 * r.step_s, 0, " ms"))]
_ROOM: list[tuple[str, Cell]] = [("could be seen", percent(lambda r: ceiling(r.tokens, r.codes)))]
_TERMS = [
    ("all three", "ibq-1024"),
    ("straight-through, entropy", "no-double"),
    ("double quantization, entropy", "no-straight"),
    ("double quantization, straight-through", "no-entropy"),
    ("double quantization", "only-double"),
    ("straight-through", "only-straight"),
    ("entropy", "only-entropy"),
    ("none", "no-term"),
]
_EVEN = [
    ("IBQ, both rates and τ = 0.3", "even-ibq"),
    ("IBQ, both rates", "even-not-soft"),
    ("IBQ, slower encoder and τ = 0.3", "even-one-rate"),
    ("IBQ, τ = 0.3", "even-only-soft"),
    ("IBQ", "ibq-16384"),
    ("VQ, both rates", "even-vq"),
    ("VQ", "vq-16384"),
]
_TERMS_SLOWLY = [(label, f"slow-{name}") for label, name in [("all three", "all"), *_TERMS[1:4]]]


def _quantizers(prefix: str, sizes: Sequence[int]) -> list[tuple[str, str]]:
    return [(f"{kind.upper()}, K = {k:,}", f"{prefix}{kind}-{k}") for k in sizes for kind in ("ibq", "vq")]


TABLES = {
    "collapse": Table("quantizer", _quantizers("", (1024, 16384)), [*_TRAINING, *_HELD_OUT, *_SPEED]),
    "long": Table("quantizer", _quantizers("long-", (16384,)), [*_TRAINING, *_HELD_OUT]),
    "usage": Table("K = 16,384", _EVEN, [*_LATER, *_HELD_OUT]),
    "large": Table(
        "K = 262,144", [("published", "short-262144"), ("with the switches", "even-262144")], [*_OF_EVEN, *_HELD_OUT]
    ),
    "ladder": Table(
        "K",
        [(f"{k:,}", f"short-{k}") for k in (1024, 16384, 262144)],
        [*_HELD_OUT[:1], *_ROOM, *_HELD_OUT[1:], *_SPEED],
    ),
    "terms": Table("terms that are on", _TERMS, [*_TRAINING, *_HELD_OUT]),
    "rate": Table("terms that are on", _TERMS_SLOWLY, [*_TRAINING, *_HELD_OUT]),
    "dimension": Table(
        "dimension D",
        [("8", "dim-8"), ("16", "dim-16"), ("64", "ibq-1024"), ("256", "dim-256")],
        [*_TRAINING, *_HELD_OUT],
    ),
    "batch": Table("tokens a step", [("2,048", "ibq-1024"), ("128", "batch-128")], [*_TRAINING, *_HELD_OUT]),
    "pictures": Table("quantizer", _quantizers("ten-", (1024,)), [*_TRAINING, *_HELD_OUT]),
}
"""By the name in the document's markers."""

assert {name for table in TABLES.values() for _, name in table.rows} == {c.name for c in CONFIGURATIONS}


def markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines. The first row has the heads."""
    head, *lines = ["| " + " | ".join(cells) + " |" for cells in rows]
    return [head, "|" + "---|" * len(rows[0]), *lines]


def _above(runs: Sequence[Result]) -> str:
    if not runs:
        return "No run is finished."
    window, held_out = spread_of(runs, window_tokens), spread_of(runs, lambda r: r.tokens)
    return f"{conditions(runs)}. A window of training: {window} tokens. Held out: {held_out} tokens."
