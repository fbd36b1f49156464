"""A data set: its manifest, and the rate of one shard."""

from __future__ import annotations

import os
import time

from ibq_scale.config.secrets import without_credentials
from ibq_scale.console import gigabytes
from ibq_scale.data.folder import DOWNLOAD_CHUNK, Store
from ibq_scale.data.manifest import ShardInfo
from ibq_scale.data.multipart import parallel
from ibq_scale.data.store import open_store
from ibq_scale.data.verify import load_any_manifest
from ibq_scale.doctor.tools import Subject
from ibq_scale.findings import Finding, fail, ok, warn

# The number of parallel ranges of a download.
AT_ONCE = 4
SECONDS = 5.0
SLOW = 50e6
# Below this, the latency of a request dominates.
TELLING = 8 << 20


def store(subject: Subject) -> list[Finding]:
    """Reads the manifest, and one shard for some seconds. UserError if unreadable."""
    assert subject.data is not None
    source = open_store(subject.data)
    manifest = load_any_manifest(source)
    shard = max(manifest.shards, key=lambda shard: shard.bytes)
    whole = f"{manifest.samples:,} {manifest.kind} in {len(manifest.shards):,} shards ({gigabytes(manifest.bytes)})"
    try:
        read, seconds = _read(source, shard)
    except FileNotFoundError:
        todo = f"ibq-scale data verify {source.url} names all missing files"
        return [fail("data", f"{source.url}: {whole}, but {shard.name} is missing", todo)]
    rate = read / seconds
    samples = rate / (shard.bytes / shard.samples)
    endpoint = "" if source.local else without_credentials(os.environ.get("AWS_ENDPOINT_URL", ""))
    at = f" at {endpoint}" if endpoint else ""
    seen = f"{source.url}{at}: {whole}; one shard at {gigabytes(rate)}/s = {samples:,.0f} samples/s"
    if read < TELLING:
        return [ok("data", f"{seen} (only {gigabytes(read)}: not significant)")]
    if rate < SLOW:
        measure = f"'ibq-scale bench data {source.url}' measures more, 'bench tokenizer' shows the need"
        return [warn("data", seen, f"enough for training? {measure}")]
    return [ok("data", seen)]


def _read(source: Store, shard: ShardInfo) -> tuple[int, float]:
    """Bytes and seconds of reading the start of a shard, or all of it."""
    begin, done = time.perf_counter(), 0
    while done < shard.bytes and time.perf_counter() - begin < SECONDS:
        stop = min(done + AT_ONCE * DOWNLOAD_CHUNK, shard.bytes)
        ranges = [(start, min(start + DOWNLOAD_CHUNK, stop)) for start in range(done, stop, DOWNLOAD_CHUNK)]
        parallel(lambda span: source.read_range(shard.name, *span), ranges)
        done = stop
    return done, time.perf_counter() - begin
