"""Examines all samples' names and labels before any picture is opened, and decides the samples and classes to take."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ibq_scale.data.jobs import Report, run_jobs
from ibq_scale.data.labels import FEW, Labels, decide_labels
from ibq_scale.data.listing import Listing
from ibq_scale.data.pictures import FolderSource
from ibq_scale.data.progress import Progress
from ibq_scale.data.samples import Look, Source, Unit
from ibq_scale.data.sources import Opened
from ibq_scale.data.tables import ENDINGS
from ibq_scale.data.tars import LABEL_MEMBERS, NO_LABEL, TarSource, by_folders
from ibq_scale.errors import UserError

# Tars in a remote store are expensive to look at. The first samples of a few units show whether there are labels.
UNITS_LOOKED_AT, SAMPLES_LOOKED_AT = 16, 100


@dataclass(frozen=True)
class Survey:
    """The source with its final settings, the classes, and the look at it."""

    source: Source
    labels: Labels
    look: Look

    @property
    def counts(self) -> tuple[int, ...]:
        """Samples of each class, including unusable ones."""
        found: list[int] = [0] * len(self.labels.class_names)
        for label, count in self.look.tally.counts.items():
            if self.labels.values:
                found[self.labels.number_of(label)] += count
        if not self.labels.values:
            found[0] = self.look.samples
        return tuple(found)


def survey(opened: Opened, *, label: str | None = None, classes: Sequence[str] = (), workers: int = 1) -> Survey:
    """Looks at every sample. `label`: the user's choice. `classes`: those of another set, to use its numbers.

    UserError for a mixture, and without any sample.
    """
    source, units = opened.source, opened.units
    look = _look(source, units, workers)
    if isinstance(source, TarSource):
        if look.scattered:
            source = replace(source, scattered=True)
            look = _look(source, units, workers)
        folders = None
        if not look.tally.labelled and label != NO_LABEL and look.folders:
            folders = by_folders(source, look.folders, len(units))
        if folders is not None:
            source, look = folders, _look(folders, units, workers)
    several = look.left_out.get("several pictures under one key")
    if several and several.count > FEW * (several.count + look.samples):
        raise UserError(
            f"{several.count:,} keys have several pictures ({several.first[0]}), as webdataset splits names at the "
            "first dot: '--key stem' splits at the last one, '--picture MEMBER' says which picture is meant"
        )
    if not look.samples:
        wrong = "; ".join(f"{reason}: {group}" for reason, group in look.left_out.items())
        raise UserError(f"{opened.listing.url} holds no pictures: {wrong or 'not one sample with a picture was found'}")
    chosen = label not in (None, NO_LABEL)
    if chosen and not look.tally.labelled and not look.tally.odd.count:
        raise UserError(f"{opened.listing.url}: not one sample has a label under '{label}'")
    labels = decide_labels(look.tally, names=source.classes, given=classes)
    return Survey(source, replace(labels, unlooked=look.partial and label != NO_LABEL), look)


def label_note(found: Survey, listing: Listing) -> str:
    """The labels' origin, or, without labels, the places searched for them."""
    values = found.labels.values
    if values:
        sparse = isinstance(values[0], int) and values != tuple(range(len(values)))
        how = f", counted from {values[0]}" if values[0] == 1 else ", numbers with gaps"
        return f"{found.labels.form}{how if sparse else ''}"
    if isinstance(found.source, TarSource) and found.source.naming.label != NO_LABEL:
        return f"none ({', '.join(LABEL_MEMBERS[:2])}, a key of json, or class folders would be): one class"
    tables = list(listing.ending(*ENDINGS))[:3]
    return "none: all pictures are of one class" + (
        f" (--label COLUMN takes those in {', '.join(tables)})" if tables else ""
    )


def _look(source: Source, units: Sequence[Unit], workers: int) -> Look:
    if isinstance(source, FolderSource):
        return source.look_at(units)
    if isinstance(source, TarSource) and not source.store.local and source.naming.label in (None, NO_LABEL):
        look = _sum(source.look(unit, SAMPLES_LOOKED_AT) for unit in _spread(units))
        look.partial = True
        if not (look.tally.labelled or look.tally.odd.count or look.folders):
            # No labels, only captions perhaps: not worth a second download of everything.
            return look
    jobs = ((source, unit) for unit in units)
    workers = min(workers, len(units))
    progress = Progress("look at labels", sum(unit.bytes for unit in units))
    return _sum(run_jobs(_look_at, jobs, workers=workers, progress=progress))


def _spread(units: Sequence[Unit]) -> Iterator[Unit]:
    step = -(-len(units) // UNITS_LOOKED_AT)
    return iter(units[::step])


def _look_at(job: tuple[Source, Unit], report: Report) -> Look:
    source, unit = job
    look = source.look(unit)
    report(look.samples, unit.bytes, 0)
    return look


def _sum(looks: Iterator[Look]) -> Look:
    total = Look()
    for look in looks:
        total += look
    return total
