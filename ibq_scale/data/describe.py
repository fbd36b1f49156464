"""Describes a data set: counts, sizes, labels, and the dimensions of its pictures."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ibq_scale.data.convert import upright_size
from ibq_scale.data.folder import Store
from ibq_scale.data.index import Member
from ibq_scale.data.manifest import ShardInfo
from ibq_scale.data.pixel_rules import OLD_RULES, PixelRules
from ibq_scale.data.seen import Seen
from ibq_scale.data.store import open_store
from ibq_scale.data.verify import load_any_manifest, load_index
from ibq_scale.errors import UserError

# Pictures measured: enough for an error of at most a few percent in any share.
MEASURED = 1000
REQUESTS_AT_ONCE = 16
SHOWN_LABELS = 20
BAR = 40
QUANTILES = {"min": 0.0, "5%": 0.05, "median": 0.5, "95%": 0.95, "max": 1.0}


@dataclass(frozen=True)
class Picked:
    """A sample chosen at random."""

    member: Member
    size: tuple[int, int]
    """Width, height in pixels."""
    format: str
    picture: bytes
    """Its bytes if it goes on a contact sheet, else empty."""


@dataclass(frozen=True)
class Description:
    """A data set's facts, as printed by `data stats --json`, and the samples picked for a contact sheet."""

    facts: dict[str, Any]
    classes: tuple[str, ...]
    picked: tuple[Picked, ...]
    rules: PixelRules = OLD_RULES


def describe(url: str, *, pick: int = 0, seed: int = 0) -> Description:
    """Counts from manifest and indices, picture sizes of up to 1,000 samples, and `pick` random samples of `seed`.

    UserError if there is no data set, or if it holds codes and `pick` is not 0.
    """
    store = open_store(url)
    manifest = load_any_manifest(store)
    facts: dict[str, Any] = {
        "kind": manifest.kind,
        "samples": manifest.samples,
        "shards": len(manifest.shards),
        "classes": len(manifest.classes),
        "bytes": manifest.bytes,
        "hash": manifest.hash,
    }
    if manifest.seen is not None:
        facts["seen"] = manifest.seen.model_dump(mode="json")
    if manifest.codes is not None:
        if pick:
            raise UserError(f"{store.url} holds codes: a contact sheet is drawn from images")
        facts |= {"codebook": manifest.codes.codebook_size, "grid": list(manifest.codes.grid)}
        return Description(facts | {"tokenizer": manifest.codes.tokenizer}, manifest.classes, ())
    rules = manifest.pixels or OLD_RULES
    labels: Counter[int] = Counter()
    wanted = _draw(manifest.samples, max(pick, MEASURED), seed)
    kept = set(wanted[:pick])
    found: dict[int, Picked] = {}
    first = 0
    with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
        for shard, members in _indices(store, manifest.shards):
            labels.update(member.label for member in members)
            here = [i for i in wanted if first <= i < first + shard.samples]
            picked = pool.map(
                lambda i, keep: _look(store, shard.name, members[i - first], keep, rules),  # noqa: B023 (read at once)
                here,
                [i in kept for i in here],
            )
            found.update(zip(here, picked, strict=True))
            first += shard.samples
    looked_at = [found[i] for i in wanted]
    facts |= {"labels": {str(label): labels[label] for label in sorted(labels)}}
    facts |= _measure(looked_at)
    return Description(facts, manifest.classes, tuple(looked_at[:pick]), rules)


def _draw(samples: int, count: int, seed: int) -> list[int]:
    """`count` different samples, or all, in random order. A larger count begins with the same samples."""
    random = np.random.Philox(key=seed)
    drawn: dict[int, None] = {}
    while len(drawn) < min(count, samples):
        drawn.setdefault(int(random.random_raw()) % samples)
    return list(drawn)


def _indices(store: Store, shards: Sequence[ShardInfo]) -> Iterator[tuple[ShardInfo, tuple[Member, ...]]]:
    """The shards' members, in order. Requests indices in small groups, to limit memory."""
    with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
        for begin in range(0, len(shards), REQUESTS_AT_ONCE):
            group = shards[begin : begin + REQUESTS_AT_ONCE]
            indices = pool.map(lambda shard: load_index(store, shard), group)
            yield from ((shard, index.members) for shard, index in zip(group, indices, strict=True))


def _look(store: Store, shard: str, member: Member, keep: bool, rules: PixelRules) -> Picked:
    data = store.read_range(shard, member.offset, member.offset + member.size)
    try:
        with Image.open(io.BytesIO(data)) as image:
            size = upright_size(image) if rules.version else image.size
            return Picked(member, size, (image.format or "unknown").lower(), data if keep else b"")
    except OSError:
        raise UserError(f"{store.url}/{shard}: sample {member.key} is damaged: run 'ibq-scale data verify'") from None


def _measure(picked: Sequence[Picked]) -> dict[str, Any]:
    """Quantiles over the pictures, and their count by format."""
    width, height = np.array([sample.size for sample in picked]).T
    formats = Counter(sample.format for sample in picked)
    columns = {
        "width": width,
        "height": height,
        "shortest side": np.minimum(width, height),
        "aspect": width / height,
        "picture bytes": np.array([sample.member.size for sample in picked]),
    }
    return {
        "measured": len(picked),
        "pictures": {name: _quantiles(values) for name, values in columns.items()},
        "formats": dict(formats.most_common()),
    }


def _quantiles(values: np.ndarray[Any, Any]) -> dict[str, float]:
    return {name: round(float(np.quantile(values, q)), 3) for name, q in QUANTILES.items()}


def as_text(described: Description) -> str:
    """The facts for a person: a table of picture sizes, and the labels as bars."""
    facts = dict(described.facts)
    labels = facts.pop("labels", None)
    pictures = facts.pop("pictures", None)
    formats = facts.pop("formats", None)
    measured = facts.pop("measured", None)
    seen = facts.pop("seen", None)
    lines = [
        f"{name:<10} {value:,}" if isinstance(value, int) else f"{name:<10} {value}" for name, value in facts.items()
    ]
    if seen:
        lines += ["", *Seen.model_validate(seen).lines()]
    if pictures:
        kinds = ", ".join(f"{count:,} {name}" for name, count in formats.items())
        lines += ["", f"{f'of {measured:,} pictures ({kinds})':<40}", f"{'':<14}" + _row(QUANTILES)]
        lines += [f"{name:<14}" + _row(_number(value) for value in row.values()) for name, row in pictures.items()]
    if labels and len(described.classes) > 1:
        lines += ["", "samples a class", *_bars(labels, described.classes)]
    return "\n".join(lines)


def _row(values: Any) -> str:
    return "".join(f"{value:>10}" for value in values)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.2f}"


def _bars(labels: dict[str, int], classes: Sequence[str]) -> list[str]:
    """All classes in order if they are few, else the fullest and the emptiest."""
    counts = [(labels.get(str(label), 0), name) for label, name in enumerate(classes)]
    top = max(count for count, _ in counts)
    if len(counts) <= SHOWN_LABELS:
        return [_bar(count, name, top) for count, name in counts]
    counts.sort(key=lambda pair: -pair[0])
    half = SHOWN_LABELS // 2
    between = f"  … {len(counts) - SHOWN_LABELS:,} classes between"
    ends = [[_bar(count, name, top) for count, name in part] for part in (counts[:half], counts[-half:])]
    return [*ends[0], between, *ends[1]]


def _bar(count: int, name: str, top: int) -> str:
    return f"  {name[:24]:<24} {count:>10,} {'█' * round(BAR * count / top)}".rstrip()
