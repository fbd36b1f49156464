"""Adopts foreign webdataset tars as a data set: writes an index beside each tar, then the manifest.

The tars stay unchanged. The stream reads by index only, so samples are left out by leaving them out of the index:
unusable pictures, and samples failing a condition.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ibq_scale.data.encode import Encoding, UnusableError, UnwantedError, encode_picture
from ibq_scale.data.filters import all_hold, parse_conditions
from ibq_scale.data.folder import Store
from ibq_scale.data.index import ADOPTED, INDEX_VERSION, Member, Reject, ShardIndex, index_name, write_index
from ibq_scale.data.jobs import Report, run_jobs
from ibq_scale.data.labels import Labels
from ibq_scale.data.listing import TAR, list_files
from ibq_scale.data.look import look_at
from ibq_scale.data.manifest import NAME
from ibq_scale.data.members import CutTarError
from ibq_scale.data.pixel_rules import RULES, PixelRules
from ibq_scale.data.prepare import JobDone, Meter, PrepareReport, find_index, finish
from ibq_scale.data.progress import Progress
from ibq_scale.data.ranges import HashingReader
from ibq_scale.data.samples import Sample, Unit
from ibq_scale.data.seen import Met
from ibq_scale.data.tars import Naming, TarSample, TarSource, read_sample, tar_samples
from ibq_scale.errors import UserError

Keys = NDArray[np.uint64]


@dataclass(frozen=True)
class _Job:
    """One tar to index."""

    source: TarSource
    tar: Unit
    encoding: Encoding
    labels: Labels

    @property
    def store(self) -> Store:
        return self.source.store


def adopt_tars(
    url: str,
    *,
    workers: int = 1,
    where: Sequence[str] = (),
    naming: Naming | None = None,
    classes: str | None = None,
    max_aspect: float = 0.0,
    rules: PixelRules = RULES,
) -> PrepareReport:
    """Indexes the tars at `url`. Their folder becomes a data set. The options are those of `prepare_images`.

    Every picture is decoded once. A re-run reuses existing indices. UserError if a key occurs twice, a tar is cut, or
    the folder is already a prepared data set.
    """
    conditions = parse_conditions(where)
    _refuse_prepared(url)
    opened, found = look_at(url, conditions, naming, classes=classes, workers=workers)
    source, tars = found.source, opened.units
    if not isinstance(source, TarSource):
        raise UserError(f"{url} holds no .tar files: 'ibq-scale prepare images' takes folders and parquet")
    store = source.store
    encoding = Encoding(None, conditions, max_aspect, rules)
    jobs = [_Job(source, tar, encoding, found.labels) for tar in tars]
    progress = Progress("index", sum(tar.bytes for tar in tars))
    hashes: list[Keys] = []

    def done() -> Iterator[JobDone]:
        for result, keys in run_jobs(_index_tar, jobs, workers=workers, progress=progress):
            hashes.append(keys)
            yield result
        _refuse_repeated(store, [tar.file for tar in tars], hashes)

    return finish(store, done(), opened, found, rules)


def _refuse_prepared(url: str) -> None:
    """UserError for a prepared set, since it would lose its class names. An adopted one may be adopted again."""
    listing = list_files(url)
    store, tars = listing.store, list(listing.ending(TAR))
    if not tars or not store.exists(NAME):
        return
    try:
        index = ShardIndex.from_json(store.read(index_name(tars[0])).decode())
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return
    if not index.plan.startswith(ADOPTED):
        raise UserError(f"{store.url} is a prepared data set already: use it as it is")


def _index_tar(job: _Job, report: Report) -> tuple[JobDone, Keys]:
    """Writes the index of one tar, or reuses an earlier run's."""
    meter = Meter(report)
    values = (job.tar.file, job.tar.bytes, job.encoding, job.labels, job.source.naming)
    plan = ADOPTED + hashlib.sha256(repr(values).encode()).hexdigest()
    index = find_index(job.store, job.tar.file, plan)
    reused = index is not None
    if index is None:
        index = _walk(job, plan, meter)
        write_index(job.store, job.tar.file, index)
    meter.close(job.tar.bytes)
    done = JobDone()
    done.add(job.tar.file, index, reused=reused)
    return done, np.array([_hash(member.key) for member in index.members], dtype=np.uint64)


def _walk(job: _Job, plan: str, meter: Meter) -> ShardIndex:
    """Indexes a tar in one pass. UserError if it is cut, since its lost samples are unknown."""
    reader = HashingReader(job.store, job.tar.file, job.tar.bytes)
    members: list[Member] = []
    rejects: list[Reject] = []
    filtered = 0
    met = Met()
    try:
        naming = job.source.naming
        for sample in tar_samples(reader, 0, naming, scattered=job.source.scattered):
            found = read_sample(reader, sample, job.tar.file, naming)
            if isinstance(found, Reject):
                rejects.append(found)
                continue
            meter.add(len(found.picture))
            try:
                members.append(_member(sample, found, job, met))
            except UnusableError as e:
                rejects.append(Reject(found.name, str(e)))
            except UnwantedError:
                filtered += 1
    except CutTarError as e:
        raise UserError(f"{job.store.url}/{job.tar.file} {e}: fetch it again, or take it away") from None
    return ShardIndex(
        INDEX_VERSION,
        plan,
        job.tar.bytes,
        reader.sha256(),
        tuple(members),
        tuple(rejects),
        filtered,
        met=vars(met) if members else None,
    )


def _member(sample: TarSample, found: Sample, job: _Job, met: Met) -> Member:
    if not all_hold(job.encoding.conditions, found.columns):
        raise UnwantedError
    label = job.labels.number_of(found.label)
    met.add(encode_picture(found.picture, job.encoding))
    place = sample.members[sample.pictures(job.source.naming.picture)[0]]
    return Member(sample.key, place.offset, place.size, zlib.crc32(found.picture), label, found.name)


def _hash(key: str) -> int:
    """A 64-bit hash, since a set may have hundreds of millions of keys."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")


def _refuse_repeated(store: Store, files: Sequence[str], hashes: Sequence[Keys]) -> None:
    """UserError if a key occurs twice in the set. For equal hashes the keys themselves are compared."""
    values, counts = np.unique(np.concatenate(hashes), return_counts=True)
    for value in values[counts > 1]:
        places: dict[str, str] = {}
        for file, keys in zip(files, hashes, strict=True):
            if not (keys == value).any():
                continue
            for member in ShardIndex.from_json(store.read(index_name(file)).decode()).members:
                if member.key in places:
                    where = "twice" if places[member.key] == file else f"in {places[member.key]} and"
                    raise UserError(
                        f"{store.url}: the key '{member.key}' occurs {where} in {file}: "
                        f"samples could not be told apart; 'ibq-scale prepare images' gives them new keys"
                    )
                if _hash(member.key) == value:
                    places[member.key] = file
