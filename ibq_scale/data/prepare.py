"""Converts pictures to webdataset shards, each with an index, then ``rejects.jsonl`` and, last, the manifest.

The units of the source are assigned to jobs before any picture is opened. So jobs run in parallel, a second run resumes
a stopped one, and every run writes the same bytes, for any number of processes. A job fills its shards in sequence,
nearly always only one. With aspects each shard is split into one of each aspect.

The shuffle needs no more memory than one shard. Units are shuffled (single pictures of a folder, whole tars, row groups
of parquet), and samples inside each shard. The order of training mixes shards again.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ibq_scale.config.aspects import nearest, parsed
from ibq_scale.data.encode import Encoding, Picture, UnusableError, UnwantedError, encode_picture
from ibq_scale.data.filters import all_hold, parse_conditions
from ibq_scale.data.folder import Store
from ibq_scale.data.index import INDEX_VERSION, Member, Reject, ShardIndex, index_name, table_name, write_index
from ibq_scale.data.jobs import Report, run_jobs
from ibq_scale.data.labels import Group, Labels
from ibq_scale.data.look import REJECTS, describe_source, look_at
from ibq_scale.data.manifest import AspectsInfo, Manifest, ShardInfo, save_manifest
from ibq_scale.data.pixel_rules import RULES, PixelRules
from ibq_scale.data.progress import Progress
from ibq_scale.data.samples import Sample, Source, Unit
from ibq_scale.data.seen import Met, Seen, by_reason
from ibq_scale.data.sources import Opened
from ibq_scale.data.store import open_store
from ibq_scale.data.survey import Survey
from ibq_scale.data.tars import Naming
from ibq_scale.errors import UserError
from ibq_scale.names import expand_home

# Part of every plan. Shards of another version are not reused.
PLAN_VERSION = 3
REPORT_EVERY = 32

_Item = tuple[tuple[int, int], Sample | Reject]
"""((unit, position), the sample or reject at it)."""


@dataclass(frozen=True)
class PrepareReport:
    """The result of `prepare_images` or `adopt_tars`."""

    url: str
    samples: int
    shards: int
    reused_shards: int
    classes: int
    filtered: int
    rejected: int
    bytes: int
    manifest: str
    seen: Seen


@dataclass(frozen=True)
class Options:
    """The settings that determine a shard's bytes, apart from its pictures."""

    shard_bytes: int
    encoding: Encoding
    seed: int
    labels: Labels
    naming: Naming
    # Not in `_plan` where there are none, so that earlier shards stay.
    aspects: tuple[str, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class _Job:
    """A few units of a source, with everything a process needs to write their shards."""

    source: Source
    units: tuple[Unit, ...]
    to: str
    number: int
    options: Options


@dataclass
class JobDone:
    """A job's entries for the manifest and the report. Samples stay in the shards' indices."""

    shards: list[ShardInfo] = field(default_factory=list)
    aspects: list[int] = field(default_factory=list)
    """The number of each shard's aspect, 0 if there are none."""
    reused_shards: int = 0
    filtered: int = 0
    rejects: list[Reject] = field(default_factory=list)
    counts: Counter[int] = field(default_factory=Counter)
    """Samples by class number."""
    met: Met = field(default_factory=Met)

    def add(self, name: str, index: ShardIndex, *, reused: bool, aspect: int = 0) -> None:
        """Adds a shard, if it has samples, and its rejects."""
        if index.members:
            self.shards.append(shard_info(name, index))
            self.aspects.append(aspect)
            self.reused_shards += reused
            self.counts.update(member.label for member in index.members)
            self.met.join(Met(**index.met or {}))
        self.rejects += index.rejects
        self.filtered += index.filtered


def prepare_images(
    source: Path | str,
    to: str,
    *,
    shard_bytes: int = 256 << 20,
    workers: int = 1,
    size: int | None = None,
    where: Sequence[str] = (),
    seed: int = 0,
    naming: Naming | None = None,
    classes: str | None = None,
    max_aspect: float = 0.0,
    rules: PixelRules = RULES,
    aspects: Sequence[str] = (),
) -> PrepareReport:
    """Writes the pictures of an ImageFolder, of webdataset tars or of parquet files as a data set at `to`.

    Pictures keep their bytes unless `size` is given: then the shortest side gets `size` pixels (JPEG, quality 95).
    `where`: conditions on the picture's width, height and aspect, and on columns. A picture failing one is counted and
    left out. `naming` locates pictures and labels if the source is ambiguous. `classes`: a data set to take classes and
    their numbers from. Without labels there is one class. A shard holds at most `shard_bytes` of pictures, and of
    input. `aspects`: width:height as in ``4:3``. Each picture then comes into a shard of the nearest aspect, for
    ``data.aspects``. UserError if the source is missing, unusable or ambiguous, or no picture is left.
    """
    try:
        buckets = parsed(aspects)
    except ValueError as e:
        raise UserError(f"--aspects: {e}") from None
    conditions = parse_conditions(where)
    if f"{_plain(to)}/".startswith(f"{_plain(str(source))}/"):
        raise UserError(f"{to} lies inside the source: a second run would read what the first one wrote")
    opened, found = look_at(str(source), conditions, naming, classes=classes, workers=workers)
    encoding = Encoding(size, conditions, max_aspect, rules)
    options = Options(shard_bytes, encoding, seed, found.labels, naming or Naming(), buckets)
    units = opened.units
    order = np.argsort(np.random.Philox(key=seed).random_raw(len(units)), kind="stable")
    parts = _cut([units[i] for i in order], shard_bytes)
    jobs = (_Job(found.source, part, to, number, options) for number, part in enumerate(parts))
    store = open_store(to)
    # An upload now reports a missing bucket before hours of work.
    store.write(REJECTS, b"")
    progress = Progress("prepare", sum(unit.bytes for unit in units))
    done = run_jobs(_write_job, jobs, workers=workers, progress=progress)
    return finish(store, done, opened, found, rules, buckets)


def _plain(url: str) -> str:
    """One spelling of a URL or path."""
    if url.startswith("s3://"):
        return url.rstrip("/")
    return str(expand_home(url.removeprefix("file://")).resolve())


def finish(
    store: Store,
    jobs: Iterable[JobDone],
    opened: Opened,
    found: Survey,
    rules: PixelRules,
    aspects: tuple[str, ...] = (),
) -> PrepareReport:
    """Waits for all jobs, then writes the rejects and, last, the manifest. UserError if no sample is left."""
    shards: list[ShardInfo] = []
    of_shard: list[int] = []
    reused = filtered = rejected = 0
    counts: Counter[int] = Counter()
    met = Met()
    left_out = dict(opened.left_out)
    with tempfile.NamedTemporaryFile("w", suffix=f"-{REJECTS}", encoding="utf-8") as rejects:
        for done in jobs:
            shards += done.shards
            of_shard += done.aspects
            reused += done.reused_shards
            filtered += done.filtered
            rejected += len(done.rejects)
            counts += done.counts
            met.join(done.met)
            by_reason(done.rejects, left_out)
            rejects.writelines(json.dumps(asdict(reject)) + "\n" for reject in done.rejects)
        rejects.flush()
        store.upload(Path(rejects.name), REJECTS)
    if not shards:
        raise UserError(
            f"{opened.listing.url}: no picture is left: {rejected} are unusable (see {store.url}/{REJECTS}), "
            f"{filtered} fail a condition"
        )
    if filtered:
        left_out["fail a condition"] = Group(filtered)
    seen = describe_source(opened, found, counts, left_out, met)
    classes = found.labels.class_names
    info = AspectsInfo(names=aspects, of_shard=tuple(of_shard)) if aspects else None
    manifest = Manifest(kind="images", shards=tuple(shards), classes=classes, pixels=rules, seen=seen, aspects=info)
    save_manifest(store, manifest)
    return PrepareReport(
        url=store.url,
        samples=manifest.samples,
        shards=len(shards),
        reused_shards=reused,
        classes=len(manifest.classes),
        filtered=filtered,
        rejected=rejected,
        bytes=sum(shard.bytes for shard in shards),
        manifest=manifest.hash,
        seen=seen,
    )


def _cut(units: Sequence[Unit], shard_bytes: int) -> Iterator[tuple[Unit, ...]]:
    """Groups of neighbouring units up to a shard's bytes. A larger unit is alone."""
    part: list[Unit] = []
    total = 0
    for unit in units:
        if part and total + unit.bytes > shard_bytes:
            yield tuple(part)
            part, total = [], 0
        part.append(unit)
        total += unit.bytes
    yield tuple(part)


def _write_job(job: _Job, report: Report) -> JobDone:
    """Writes a job's shards and their indices, or reuses those of an earlier run."""
    store = open_store(job.to)
    reader, meter, done = _Reader(job), Meter(report), JobDone()
    start: tuple[int, int] | None = (0, 0)
    number = 0
    while start is not None:
        parts = _parts(job, number, start)
        found = [find_index(store, part.name, part.plan) for part in parts]
        indices = [index for index in found if index is not None]
        is_new = len(indices) < len(parts)
        if is_new:
            indices = _write_shards(store, parts, job, start, reader, meter)
        for bucket, (part, index) in enumerate(zip(parts, indices, strict=True)):
            done.add(part.name, index, reused=not is_new, aspect=bucket)
        start, number = indices[0].after, number + 1
    meter.close(sum(unit.bytes for unit in job.units))
    return done


def shard_info(name: str, index: ShardIndex) -> ShardInfo:
    """The manifest's entry of an indexed shard."""
    return ShardInfo(
        name=name,
        samples=len(index.members),
        bytes=index.bytes,
        sha256=index.sha256,
        index_sha256=hashlib.sha256(index.to_json().encode()).hexdigest(),
    )


class _Part(NamedTuple):
    """A shard to write: the job's next one, or its pictures of one aspect."""

    name: str
    plan: str
    counter: int
    """Of the shuffle's random bits."""


def _parts(job: _Job, number: int, start: tuple[int, int]) -> list[_Part]:
    """The shards of the pictures from `start` on. The first shard of a job without aspects has the job's own name."""
    parts = []
    for bucket, aspect in enumerate(job.options.aspects or [""]):
        values = (PLAN_VERSION, [tuple(unit) for unit in job.units], number, start, job.options)
        plan = hashlib.sha256(repr((*values, job.options.aspects, bucket) if aspect else values).encode()).hexdigest()
        suffix = f"-{number:03d}" * bool(number or aspect) + f"-{aspect.replace(':', 'x')}" * bool(aspect)
        counter = (bucket << 128) | (job.number << 64) | (number + 1)
        parts.append(_Part(f"images-{job.number:06d}{suffix}.tar", plan, counter))
    return parts


def find_index(store: Store, name: str, plan: str) -> ShardIndex | None:
    """The index of an earlier run, if it has this plan. An index is written after its shard, so both are whole.

    Earlier versions wrote no table: it is added.
    """
    try:
        index = ShardIndex.from_json(store.read(index_name(name)).decode())
        if index.plan == plan and (not index.members or store.size(name) == index.bytes):
            if not store.exists(table_name(name)):
                write_index(store, name, index)
            return index
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        pass
    return None


class Meter:
    """Reports a job's progress every `REPORT_EVERY` pictures, and at its end the bytes not read."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._images = self._bytes = self._told = 0

    def add(self, size: int) -> None:
        self._images += 1
        self._bytes += size
        if self._images == REPORT_EVERY:
            self._tell()

    def close(self, total: int) -> None:
        self._tell()
        # Headers and captions count as work done. A job without an opened picture was done by an earlier run.
        rest = max(total - self._told, 0)
        self._report(0, rest if self._told else 0, 0 if self._told else rest)

    def _tell(self) -> None:
        self._report(self._images, self._bytes, 0)
        self._told += self._bytes
        self._images = self._bytes = 0


@dataclass(frozen=True)
class _Encoded:
    picture: Picture
    label: int
    source: str


def _write_shards(
    store: Store, parts: list[_Part], job: _Job, start: tuple[int, int], reader: _Reader, meter: Meter
) -> list[ShardIndex]:
    """Writes the next shard's worth of samples. Rejects are in the first index."""
    samples, index = _fill(job.options, reader, start, meter)
    by_part: list[list[_Encoded]] = [[] for _ in parts]
    for sample in samples:
        bucket = nearest(job.options.aspects, *sample.picture.size) if job.options.aspects else 0
        by_part[bucket].append(sample)
    samples.clear()
    indices = []
    for part, mine in zip(parts, by_part, strict=True):
        indices.append(_write_shard(store, part, mine, index, job.options.seed))
        index = replace(index, rejects=(), filtered=0)
    return indices


def _write_shard(store: Store, part: _Part, samples: list[_Encoded], index: ShardIndex, seed: int) -> ShardIndex:
    met = Met()
    for sample in samples:
        met.add(sample.picture)
    draws = np.random.Philox(key=seed, counter=part.counter).random_raw(len(samples))
    shuffled = [samples[i] for i in np.argsort(draws, kind="stable")]
    samples.clear()
    data, members = _pack(shuffled, part.name.removeprefix("images-").removesuffix(".tar"))
    index = replace(
        index,
        plan=part.plan,
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        members=tuple(members),
        met=vars(met) if members else None,
    )
    if members:
        store.write(part.name, data)
    write_index(store, part.name, index)
    return index


def _fill(options: Options, reader: _Reader, start: tuple[int, int], meter: Meter) -> tuple[list[_Encoded], ShardIndex]:
    """A shard's worth of samples from (unit, position) on, and an index with the rejects and the filtered."""
    samples: list[_Encoded] = []
    rejects: list[Reject] = []
    total = filtered = 0
    after = None
    for position, item in reader.items(start):
        if isinstance(item, Reject):
            rejects.append(item)
            continue
        try:
            sample = _encode(item, options)
        except UnusableError as e:
            rejects.append(Reject(item.name, str(e)))
        except UnwantedError:
            filtered += 1
        else:
            total += len(sample.picture.data)
            if samples and total > options.shard_bytes:
                after = position
                break
            samples.append(sample)
        meter.add(len(item.picture))
    return samples, ShardIndex(INDEX_VERSION, "", 0, "", (), tuple(rejects), filtered, after)


class _Reader:
    """A job's samples in order. The next shard continues in the open file. Only a resumed job starts in the middle."""

    def __init__(self, job: _Job) -> None:
        self._job = job
        self._open: Iterator[_Item] = iter(())
        self._last: _Item | None = None

    def items(self, start: tuple[int, int]) -> Iterator[_Item]:
        """From `start` on: the job's beginning, or the end of an earlier call."""
        if self._last is not None and self._last[0] == start:
            self._open = chain([self._last], self._open)
        else:
            self._open = self._read(start)
        for item in self._open:
            self._last = item
            yield item

    def _read(self, start: tuple[int, int]) -> Iterator[_Item]:
        first, begin = start
        for number in range(first, len(self._job.units)):
            for position, item in self._job.source.read(self._job.units[number], begin if number == first else 0):
                yield (number, position), item


def _encode(sample: Sample, options: Options) -> _Encoded:
    if not all_hold(options.encoding.conditions, sample.columns):
        raise UnwantedError
    label = options.labels.number_of(sample.label)
    return _Encoded(encode_picture(sample.picture, options.encoding), label, sample.name)


def _pack(samples: list[_Encoded], prefix: str) -> tuple[bytes, list[Member]]:
    """A tar's bytes. Empties the list on the way, so memory holds the shard only about once."""
    buffer = io.BytesIO()
    members = []
    samples.reverse()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for row in range(len(samples)):
            sample = samples.pop()
            key = f"{prefix}-{row:06d}"
            _add(tar, f"{key}.cls", str(sample.label).encode())
            data = sample.picture.data
            offset = _add(tar, f"{key}.{sample.picture.extension}", data)
            members.append(Member(key, offset, len(data), zlib.crc32(data), sample.label, sample.source))
    return buffer.getvalue(), members


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Returns the content's offset. TarInfo's defaults have no time and no user, so a re-run writes the same bytes."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    # The header is one block, since our own names are short.
    offset = tar.offset + tarfile.BLOCKSIZE
    tar.addfile(info, io.BytesIO(data))
    return offset
