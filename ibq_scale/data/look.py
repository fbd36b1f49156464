"""Inspects a source before its preparation: opens it, reads its labels, and summarizes it for the user."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice

from ibq_scale.data.encode import Encoding, UnusableError, UnwantedError, encode_picture
from ibq_scale.data.filters import Condition, check_columns, parse_conditions
from ibq_scale.data.index import Reject, index_name, table_name
from ibq_scale.data.labels import Group
from ibq_scale.data.listing import TAR
from ibq_scale.data.manifest import NAME
from ibq_scale.data.samples import Sample, Source, Unit
from ibq_scale.data.seen import NAMED_CLASSES, Met, Seen, Some, by_reason
from ibq_scale.data.sources import Opened, open_source
from ibq_scale.data.store import open_store
from ibq_scale.data.survey import Survey, label_note, survey
from ibq_scale.data.tars import Naming
from ibq_scale.data.verify import load_any_manifest
from ibq_scale.errors import UserError

REJECTS = "rejects.jsonl"
# Pictures opened by `look_only`.
OPENED = 100


def look_at(
    url: str,
    conditions: Sequence[Condition],
    naming: Naming | None,
    *,
    classes: str | None = None,
    workers: int = 1,
) -> tuple[Opened, Survey]:
    """Opens the source and reads all its labels. UserError as `prepare_images`."""
    opened = open_source(url, [c.name for c in conditions if not c.of_picture], naming)
    given = load_any_manifest(open_store(classes)).classes if classes else ()
    found = survey(opened, label=naming.label if naming else None, classes=given, workers=workers)
    first = first_sample(found.source, opened.units)
    if first is None:
        raise UserError(f"{url} holds no pictures: not one sample with a picture was found")
    check_columns(conditions, first.columns)
    return opened, found


def look_only(
    url: str,
    *,
    where: Sequence[str] = (),
    naming: Naming | None = None,
    classes: str | None = None,
    max_aspect: float = 0.0,
    workers: int = 1,
) -> Seen:
    """Summarizes the input of `prepare_images` by names and labels. Opens about a hundred pictures."""
    encoding = Encoding(None, parse_conditions(where), max_aspect)
    opened, found = look_at(url, encoding.conditions, naming, classes=classes, workers=workers)
    met = Met()
    rejects: list[Reject] = []
    for unit in opened.units[:: -(-len(opened.units) // OPENED)]:
        for _, item in islice(found.source.read(unit, 0), max(1, OPENED // len(opened.units))):
            if isinstance(item, Reject):
                rejects.append(item)
                continue
            try:
                met.add(encode_picture(item.picture, encoding))
            except UnusableError as e:
                rejects.append(Reject(item.name, str(e)))
            except UnwantedError:
                continue
    left_out = {**opened.left_out, **found.look.left_out}
    by_reason(rejects, left_out)
    return describe_source(opened, found, dict(enumerate(found.counts)), left_out, met)


def describe_source(
    opened: Opened, found: Survey, counts: Mapping[int, int], left_out: Mapping[str, Group], met: Met
) -> Seen:
    """The summary of a source. `counts`: samples taken, by class."""
    listing, classes = opened.listing, found.labels.class_names
    empty = [name for number, name in enumerate(classes) if not counts.get(number)]
    width, height = (tuple(met.sides[:2]), tuple(met.sides[2:])) if met.sides else (None, None)
    return Seen(
        files=sum(not _is_ours(n) for n in listing.files) + sum(g.count for g in listing.left_out.values()),
        form=found.source.form,
        pictures=max(found.look.samples, sum(counts.values())),
        taken=sum(counts.values()),
        labels=label_note(found, listing),
        classes={name: counts.get(number, 0) for number, name in enumerate(classes[:NAMED_CLASSES])},
        class_count=len(classes),
        empty_classes=Some(count=len(empty), first=tuple(empty[:3])),
        left_out=_some_of(left_out),
        notes=_some_of(found.look.notes),
        formats=dict(met.formats.most_common()),
        modes=dict(met.modes.most_common()),
        width=width,
        height=height,
    )


def _some_of(groups: Mapping[str, Group]) -> dict[str, Some]:
    return {reason: Some(count=group.count, first=tuple(group.first)) for reason, group in groups.items()}


def _is_ours(name: str) -> bool:
    """Whether an earlier adoption wrote this file beside its tars."""
    return name in (NAME, REJECTS) or name.endswith((index_name(TAR), table_name(TAR)))


def first_sample(source: Source, units: Sequence[Unit]) -> Sample | None:
    """The first sample not rejected. The columns are checked by it."""
    samples = (item for unit in units for _, item in source.read(unit, 0))
    return next((item for item in samples if isinstance(item, Sample)), None)
