"""The report of one or several runs: state, measures, curves, pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from ibq_scale.report.page import Section, Table, write
from ibq_scale.report.results import generation_section, pictures, reconstruction_section
from ibq_scale.report.runs import RunLog, by_kind, curves, differences, environments, runs_of, standing


def write_report(paths: Sequence[Path], out: Path) -> Path:
    """Writes the report of one or several runs. UserError if all are unreadable."""
    runs = runs_of(paths)
    title = runs[0].config.get("name", str(paths[0])) if len(runs) == 1 else f"{len(runs)} runs"
    return write(out, str(title), ", ".join(str(path) for path in paths), list(_sections(runs)))


def _sections(runs: Sequence[RunLog]) -> Iterator[Section]:
    groups = by_kind(runs)
    yield Section("Where they stand", "", [standing(group) for group in groups.values()])
    alarms = [[run.name, str(step), text] for run in runs for step, text in run.metrics.alarms]
    if alarms:
        yield Section("Alarms", "", [Table(["run", "step", "what was seen"], alarms)])
    yield from reconstruction_section(runs)
    yield from generation_section(runs)
    slot = 0
    for name, group in groups.items():
        yield Section(f"Curves of {name}" if len(groups) > 1 else "Curves", "", curves(group, first_slot=slot))
        slot += len(group)
    last = [(run.name, drawn[-1]) for run in runs if (drawn := run.pictures("reconstructions"))]
    blocks = pictures(
        (path, f"{name}, {path.stem}: originals above, reconstructions below", name) for name, path in last
    )
    if blocks:
        yield Section("Training images", "", blocks)
    for name, group in groups.items():
        if len(group) > 1:
            yield Section(f"What differs between {name}", "Keys with more than one value.", [differences(group)])
    yield Section("Environment", "", [environments(runs)])
