"""Looks at a prepared data set: every shard hashed again, or counted."""

from __future__ import annotations

import hashlib
import json

from ibq_scale.data.manifest import NAME, Kind, Manifest, load_manifest
from ibq_scale.data.store import Store, open_store
from ibq_scale.errors import UserError


def verify(url: str) -> list[str]:
    """One line a shard that is missing or whose bytes differ from the manifest's sha256; none when all is well."""
    store = open_store(url)
    faults = []
    for shard in _manifest(store).shards:
        try:
            digest = hashlib.sha256(store.read(shard.name)).hexdigest()
        except FileNotFoundError:
            faults.append(f"{shard.name}: missing")
            continue
        if digest != shard.sha256:
            faults.append(f"{shard.name}: content changed (sha256 differs)")
    return faults


def describe(url: str) -> dict[str, object]:
    """Counts and sizes from the manifest."""
    manifest = _manifest(open_store(url))
    facts: dict[str, object] = {
        "kind": manifest.kind,
        "samples": manifest.samples,
        "shards": len(manifest.shards),
        "classes": len(manifest.classes),
        "bytes": sum(shard.bytes for shard in manifest.shards),
        "hash": manifest.hash,
    }
    if manifest.codes is not None:
        facts |= {"codebook": manifest.codes.codebook_size, "grid": list(manifest.codes.grid)}
        facts |= {"tokenizer": manifest.codes.tokenizer}
    return facts


def _manifest(store: Store) -> Manifest:
    """Of either kind."""
    try:
        kind: Kind = "codes" if json.loads(store.read(NAME)).get("kind") == "codes" else "images"
    except (FileNotFoundError, UserError, json.JSONDecodeError, AttributeError):
        kind = "images"
    return load_manifest(store, kind)
