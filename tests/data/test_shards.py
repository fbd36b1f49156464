"""Columns hold what a tuple of shards did, in less memory and under the same hash."""

from __future__ import annotations

import hashlib
import json
import pickle

import pytest
from pydantic import ValidationError

from ibq_scale.data.manifest import Manifest
from ibq_scale.data.shards import ShardInfo


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


SHARDS = [
    ShardInfo(name="images-0.tar", samples=3, bytes=2**40, sha256=_sha256("a"), index_sha256=_sha256("b")),
    ShardInfo(name='größe "1".tar', samples=2**48, bytes=1, sha256="0" * 64),
]


def test_columns_look_like_the_shards() -> None:
    manifest = Manifest(kind="images", shards=SHARDS, classes=("a",))
    assert list(manifest.shards) == SHARDS
    assert manifest.shards[-1] == SHARDS[1]
    assert manifest.shards[:1] == (SHARDS[0],)
    assert manifest.shard_sizes == (3, 2**48)
    assert (manifest.samples, manifest.bytes) == (3 + 2**48, 1 + 2**40)
    assert Manifest.model_validate(json.loads(json.dumps(manifest.model_dump(mode="json")))) == manifest
    assert pickle.loads(pickle.dumps(manifest)) == manifest
    with pytest.raises(ValidationError, match="sha256"):
        Manifest.model_validate({"kind": "images", "shards": [{"name": "a", "samples": 1, "bytes": 1}], "classes": []})


def test_the_hash_is_that_of_the_plain_content() -> None:
    """As it was when a manifest held a tuple; a class may be named like a key."""
    manifest = Manifest(kind="images", shards=SHARDS, classes=('"shards":[', "b"))
    values = manifest.model_dump(mode="json", exclude={"seen", "pixels", "aspects"})
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    assert manifest.hash == hashlib.sha256(text.encode()).hexdigest()


def test_a_shard_takes_about_a_hundred_bytes_on_its_way_to_a_worker() -> None:
    many = [SHARDS[0].model_copy(update={"name": f"images-{n:06d}.tar"}) for n in range(1000)]
    manifest = Manifest(kind="images", shards=many, classes=())
    assert manifest.shards[999] is manifest.shards[999]
    assert len(pickle.dumps(manifest)) < 110 * 1000
