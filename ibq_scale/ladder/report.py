"""Output of a fit: a table of text, and one offline HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ibq_scale.console import aligned, short
from ibq_scale.ladder.figures import draw_fit
from ibq_scale.ladder.fit import Fit
from ibq_scale.report.page import Section, Table, write
from ibq_scale.scaling.laws import Interval, Law
from ibq_scale.scaling.optimum import Optimum

REPORT = "report.html"
_LIMITS = (
    "An interval covers the noise between rungs and assumes that the law holds. Extrapolations are marked with their "
    "factor."
)


@dataclass(frozen=True)
class Drawn(Section):
    """A section with SVG figures at its end."""

    figures: Sequence[str] = field(default_factory=tuple)

    def html(self) -> str:
        # The figures have a fixed size. Here they fill the page.
        fluid = [svg.replace("<svg ", '<svg style="max-width:100%;height:auto" ', 1) for svg in self.figures]
        body = "".join(f'<figure class="picture">{svg}</figure>' for svg in fluid)
        return super().html().removesuffix("</section>") + body + "</section>"


def write_report(fits: Sequence[Fit], missing: Sequence[str], name: str, folder: Path) -> Path:
    """The page of all fits. `missing`: unfinished rungs."""
    sections: list[Section] = []
    for fit in fits:
        sections += _sections(fit)
    if missing:
        sections.append(Section("Not finished", "", [Table(["rung"], [[rung] for rung in missing])]))
    return write(folder / REPORT, f"Scaling: {name}", f"{sum(len(fit.results) for fit in fits)} rungs", sections)


def text(fits: Sequence[Fit], missing: Sequence[str]) -> list[str]:
    """Lines for a terminal, with warnings."""
    lines = []
    for fit in fits:
        lines += [f"K = {fit.codebook:,}: {len(fit.results)} rungs", *_indented(_RUNG_HEAD, _rung_rows(fit))]
        for name, law in fit.laws.items():
            lines += ["", name, f"  {law.formula}"]
            lines += [f"  {label:<6}{_between(interval)}" for label, interval in law.parameters().items()]
            lines += [f"  {_held_out(law)}", *(f"  WARNING {line}" for line in law.warnings)]
        lines += ["", *(f"{law.name}: not fitted: {law.why}" for law in fit.not_fitted)]
        if fit.optima:
            lines += _indented(_OPTIMUM_HEAD, [_optimum_row(o) for o in fit.optima])
            lines += [f"  WARNING at {o.flops:.3g} FLOPs: {line}" for o in fit.optima for line in o.warnings]
        lines += [f"WARNING {line}" for line in fit.warnings]
    return [*lines, *(f"not finished: {rung}" for rung in missing)]


def _sections(fit: Fit) -> list[Section]:
    title = f"Codebook of {fit.codebook:,}"
    warnings = [[line] for line in fit.warnings]
    for name, law in fit.laws.items():
        warnings += [[f"{name}: {line}"] for line in law.warnings]
    warnings += [[f"{o.flops:.3g} FLOPs: {line}"] for o in fit.optima for line in o.warnings]
    laws = [
        [name, label, *map(_number, interval)]
        for name, law in fit.laws.items()
        for label, interval in law.parameters().items()
    ]
    blocks = [Table(["law", "", "value", "95 % from", "to"], laws)] if laws else []
    held = [[name, law.formula, _held_out(law)] for name, law in fit.laws.items()]
    blocks += [Table(["law", "fitted", "largest rung, predicted by the others"], held)] if held else []
    rest = [[law.name, law.why] for law in fit.not_fitted]
    blocks += [Table(["not fitted", "why"], rest)] if rest else []
    sections: list[Section] = [Drawn(f"{title}: rungs", "", [Table(_RUNG_HEAD, _rung_rows(fit))], [draw_fit(fit)])]
    if warnings:
        sections.insert(0, Section(f"{title}: beware", "", [Table(["warning"], warnings)]))
    sections.append(Section(f"{title}: laws", _LIMITS, blocks))
    if fit.optima:
        rows = [[*_optimum_row(o), "EXTRAPOLATED" if o.warnings else ""] for o in fit.optima]
        sections.append(Section(f"{title}: budgets", "", [Table([*_OPTIMUM_HEAD, ""], rows)]))
    return sections


_RUNG_HEAD = ["rung", "N", "tokens", "passes", "FLOPs", "lr", "loss", "fitted", "residual"]
_OPTIMUM_HEAD = ["FLOPs", "best N", "best D", "loss there"]


def _rung_rows(fit: Fit) -> list[list[str]]:
    law = fit.joint if isinstance(fit.joint, Law) else None
    residuals = [None] * len(fit.results) if law is None else [float(value) for value in law.residuals()]
    rows = []
    for r, residual in zip(fit.results, residuals, strict=True):
        fitted = ["–", "–"] if residual is None else [f"{r.loss / (1 + residual):.4f}", f"{100 * residual:+.2f} %"]
        passes = "–" if r.epochs is None else f"{r.epochs:.2f}"
        mark = "" if r.held_out else " (training)"
        row = [r.name, short(r.parameters, 3), short(r.tokens, 3), passes, f"{r.flops:.3g}", f"{r.lr:.3g}"]
        rows.append([*row, f"{r.loss:.4f}{mark}", *fitted])
    return rows


def _held_out(law: Law) -> str:
    held = law.held_out
    if held is None:
        return "too few rungs to leave the largest out"
    return (
        f"without it, the largest rung is predicted at {_between(held.predicted)}, measured {held.measured:.4f}: "
        f"{100 * held.error:+.2f} %"
    )


def _optimum_row(optimum: Optimum) -> list[str]:
    sizes = [_between(v) if optimum.told else "unknown" for v in (optimum.parameters, optimum.tokens)]
    return [f"{optimum.flops:.3g}", *sizes, _between(optimum.loss)]


def _between(interval: Interval) -> str:
    value, low, high = map(_number, interval)
    return f"{value} ({low} to {high})"


def _number(value: float) -> str:
    return f"{value:.3g}" if value >= 1e4 or value < 1e-3 else f"{value:.4g}"


def _indented(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"  {line}" for line in aligned([head, *rows])]
