"""A folder of pictures → webdataset shards, an index each, ``rejects.jsonl`` and, last, the manifest.

Which file goes into which shard is decided before any is opened, so shards can be written in parallel, a second run
takes up where a first one stopped, and every run writes the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image

from ibq_scale.data.manifest import Manifest, ShardInfo, save_manifest
from ibq_scale.data.store import Store, open_store
from ibq_scale.errors import UserError

INDEX_VERSION = 1
REJECTS = "rejects.jsonl"
JPEG_QUALITY = 95


@dataclass(frozen=True)
class SourceFile:
    """One file of the ImageFolder, relative to it, and its class."""

    path: str
    label: int
    bytes: int


@dataclass(frozen=True)
class Reject:
    """A file that is no image, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class Member:
    """One sample of a shard: where its picture's bytes are in the tar."""

    key: str
    offset: int
    size: int
    crc: int
    label: int
    source: str


@dataclass(frozen=True)
class ShardIndex:
    """NAME.index.json. `plan` tells which inputs and options made the shard, so that a re-run can trust it."""

    version: int
    plan: str
    bytes: int
    sha256: str
    members: tuple[Member, ...]
    rejects: tuple[Reject, ...]

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":")) + "\n"

    @staticmethod
    def from_json(text: str) -> ShardIndex:
        values = json.loads(text)
        if values.get("version") != INDEX_VERSION:
            raise UserError(f"a shard index has version {values.get('version')}, this program reads {INDEX_VERSION}")
        values["members"] = tuple(Member(**m) for m in values["members"])
        values["rejects"] = tuple(Reject(**r) for r in values["rejects"])
        return ShardIndex(**values)


@dataclass(frozen=True)
class PrepareReport:
    """What `prepare_images` did."""

    url: str
    samples: int
    shards: int
    reused_shards: int
    classes: int
    rejected: int
    bytes: int
    manifest: str


@dataclass(frozen=True)
class _Job:
    """One shard to write, with everything its process needs."""

    source: Path
    url: str
    number: int
    files: tuple[SourceFile, ...]
    size: int | None


def prepare_images(
    source: Path, to: str, *, shard_bytes: int = 256 << 20, workers: int = 1, size: int | None = None, seed: int = 0
) -> PrepareReport:
    """Writes an ImageFolder (one folder a class) as a data set at `to`.

    Pictures keep their bytes unless `size` asks for a shortest side of that many pixels (JPEG, quality 95). Samples
    are shuffled by `seed`. UserError where the folder is missing or holds no image.
    """
    classes, files = _scan(source)
    order = np.argsort(np.random.Philox(key=seed).random_raw(len(files)), kind="stable")
    store = open_store(to)
    shuffled = [files[i] for i in order]
    jobs = [_Job(source, to, n, part, size) for n, part in enumerate(_cut(shuffled, shard_bytes))]
    # The first upload finds out about a missing bucket before hours of work.
    store.write(REJECTS, b"")
    done: list[tuple[ShardIndex, bool]]
    if workers > 1:
        with ProcessPoolExecutor(workers, mp_context=get_context("forkserver")) as pool:
            done = list(pool.map(_write_shard, jobs))
    else:
        done = [_write_shard(job) for job in jobs]
    rejects = [r for index, _ in done for r in index.rejects]
    store.write(REJECTS, "".join(json.dumps(asdict(r)) + "\n" for r in rejects).encode())
    shards = tuple(
        ShardInfo(name=_name(job.number), samples=len(index.members), bytes=index.bytes, sha256=index.sha256)
        for job, (index, _) in zip(jobs, done, strict=True)
        if index.members
    )
    if not shards:
        raise UserError(f"{source}: none of the {len(files)} files is an image: see {to}/{REJECTS}")
    manifest = Manifest(kind="images", shards=shards, classes=tuple(classes))
    save_manifest(store, manifest)
    return PrepareReport(
        url=to,
        samples=manifest.samples,
        shards=len(shards),
        reused_shards=sum(reused for _, reused in done),
        classes=len(classes),
        rejected=len(rejects),
        bytes=sum(s.bytes for s in shards),
        manifest=manifest.hash,
    )


def _scan(source: Path) -> tuple[list[str], list[SourceFile]]:
    if not source.is_dir():
        raise UserError(f"{source} is no folder: give an ImageFolder (one sub-folder a class)")
    classes = sorted(p.name for p in source.iterdir() if p.is_dir() and not p.name.startswith("."))
    files = [
        SourceFile(str(path.relative_to(source)), label, path.stat().st_size)
        for label, name in enumerate(classes)
        for path in sorted((source / name).rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    ]
    if not files:
        raise UserError(f"{source} holds no pictures: expected {source}/CLASS/picture.jpg")
    return classes, files


def _cut(files: Sequence[SourceFile], shard_bytes: int) -> Iterator[tuple[SourceFile, ...]]:
    part: list[SourceFile] = []
    total = 0
    for file in files:
        if part and total + file.bytes > shard_bytes:
            yield tuple(part)
            part, total = [], 0
        part.append(file)
        total += file.bytes
    yield tuple(part)


def _name(number: int) -> str:
    return f"images-{number:06d}.tar"


def index_name(shard: str) -> str:
    """The index file of a shard."""
    return f"{shard}.index.json"


def _write_shard(job: _Job) -> tuple[ShardIndex, bool]:
    """Writes one shard and its index, or finds both there from an earlier run (second value True)."""
    store, name = open_store(job.url), _name(job.number)
    plan = hashlib.sha256(repr((INDEX_VERSION, job.files, job.size)).encode()).hexdigest()
    old = _reusable(store, name, plan)
    if old is not None:
        return old, True
    data, members, rejects = _pack(job)
    digest = hashlib.sha256(data).hexdigest()
    index = ShardIndex(INDEX_VERSION, plan, len(data), digest, tuple(members), tuple(rejects))
    if members:
        store.write(name, data)
    store.write(index_name(name), index.to_json().encode())
    return index, False


def _reusable(store: Store, name: str, plan: str) -> ShardIndex | None:
    """The index is written after its shard, so with the same plan both are whole."""
    try:
        index = ShardIndex.from_json(store.read(index_name(name)).decode())
        if index.plan == plan and (not index.members or store.size(name) == index.bytes):
            return index
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        pass
    return None


def _pack(job: _Job) -> tuple[bytes, list[Member], list[Reject]]:
    import webdataset as wds

    buffer = io.BytesIO()
    sources: dict[str, SourceFile] = {}
    rejects: list[Reject] = []
    with wds.TarWriter(buffer, encoder=False, mtime=0.0, user="root", group="root") as tar:
        for file in job.files:
            try:
                picture, extension = _picture(job.source / file.path, job.size)
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
                rejects.append(Reject(file.path, str(e).replace(str(job.source) + "/", "") or type(e).__name__))
                continue
            key = f"{job.number:06d}-{len(sources):06d}"
            sources[key] = file
            tar.write({"__key__": key, extension: picture, "cls": str(file.label).encode()})
    data = buffer.getvalue()
    return data, list(_members(data, sources)), rejects


def _members(data: bytes, sources: dict[str, SourceFile]) -> Iterator[Member]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for info in tar:
            key, _, extension = info.name.partition(".")
            if extension == "cls":
                continue
            picture = data[info.offset_data : info.offset_data + info.size]
            source = sources[key]
            yield Member(key, info.offset_data, info.size, zlib.crc32(picture), source.label, source.path)


def _picture(path: Path, size: int | None) -> tuple[bytes, str]:
    """A picture's bytes and extension, after decoding it whole: a cut file opens well and fails only at its end."""
    data = path.read_bytes()
    with Image.open(io.BytesIO(data)) as image:
        kind = image.format
        image.load()
        if size is None and kind in ("JPEG", "PNG", "WEBP"):
            return data, {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}[kind]
        rgb = image.convert("RGB")
    if size is not None:
        scale = size / min(rgb.size)
        rgb = rgb.resize(
            (max(size, round(rgb.width * scale)), max(size, round(rgb.height * scale))), Image.Resampling.BICUBIC
        )
    out = io.BytesIO()
    rgb.save(out, "JPEG", quality=JPEG_QUALITY)
    return out.getvalue(), "jpg"
