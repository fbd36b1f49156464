"""Changes of files as damage, other programs and attackers make them, drawn from a seed."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
import yaml

from ibq_scale.checkpoint.reading import OWN_SHA256, manifest_text

ODD: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    2**31,
    2**40,
    2**63,
    2**64,
    10**30,
    -(2**60),
    0.5,
    1e308,
    float("nan"),
    float("inf"),
    "",
    " ",
    "a",
    "1",
    "-1",
    "../canary/new",
    "a/../../canary/kept",
    "/etc/passwd",
    "~",
    "a\0b",
    "a\nb",
    "\ud800",
    "é" * 90,
    "a" * 300,
    "a" * 5000,
    "${oc.env:HOME}",
    "${name}",
    "<!--<script>",
    "$(touch ../canary/new)",
    [],
    {},
    [[]],
    [1, "a", None],
    {"a": 1},
    {"": {"": 0}},
)
TEXTS = (b"", b" ", b"3.0", b"-1", b"4 2", b"\xff\xfe", b"a" * 10_000, b"[" * 100_000, b"\0", b"1" * 5000, b"nan\n")
NAMES = (b"../../canary/new", b"/tmp/x", b"\xff\xfe.jpg", b"a\nb.jpg", b".jpg", b"a", b"a" * 99, b"a/", b"..", b"")
FIELDS = {
    "name": (0, 100),
    "mode": (100, 8),
    "size": (124, 12),
    "type": (156, 1),
    "link": (157, 100),
    "magic": (257, 8),
}
SIZES = (
    b"77777777777\0",
    b"-0000000001\0",
    b"\xff" * 12,
    b"\x80" + b"\xff" * 11,
    b"          1 ",
    b"x" * 12,
    bytes(12),
)
TYPES = (*b"0123456789gxLKSDMV\0z",)
SHAPES = ((), (0,), (1,), (3, 5), (2, 0, 2), (1, 1, 1, 1), (2**20, 2))


def mutate(random: Random, name: str, data: bytes) -> bytes:
    """`data` with one change, which knows the form that a file of this name has, or is one of bytes."""
    change = _FORMS.get(Path(name).suffix)
    if change is None or random.random() < 0.25:
        return _bytes(random, data)
    try:
        return change(random, data)
    except Exception:
        # An earlier change has left nothing of the form.
        return _bytes(random, data)


def values(random: Random, document: Any) -> Any:
    """Nested values with one place changed."""
    places = list(_places(document))
    if not places or random.random() < 0.03:
        return random.choice(ODD)
    holder, key = random.choice(places)
    match random.randrange(8):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[random.choice(("x", "", "A" * 300, str(key).upper()))] = holder.pop(key)
        case 2 if isinstance(holder[key], (int, float)):
            holder[key] = holder[key] * random.choice((-1, 10, 10**6, 10**12)) + random.choice((0, 1))
        case 3:
            other, there = random.choice(places)
            holder[key] = json.loads(json.dumps(other[there]))
        case 4 if isinstance(holder, list):
            holder += [holder[key]] * random.choice((1, 1000))
        case 5:
            for _ in range(random.choice((10, 500))):
                holder[key] = [holder[key]]
        case _:
            holder[key] = random.choice(ODD)
    return document


def _places(document: Any) -> Iterator[tuple[Any, Any]]:
    level = [document]
    while level:
        holder = level.pop()
        keys = list(holder) if isinstance(holder, dict) else range(len(holder)) if isinstance(holder, list) else ()
        for key in keys:
            yield holder, key
            level.append(holder[key])


def _bytes(random: Random, data: bytes) -> bytes:
    content = bytearray(data)
    at = random.randrange(len(content) + 1)
    match random.randrange(9):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + random.randbytes(random.choice((1, 8, 512))) + data[at:]
        case 2:
            content[at : at + 64] = bytes(len(content[at : at + 64]))
        case 3:
            return random.choice(TEXTS)
        case 4:
            return data.decode("latin-1").encode("utf-16")
        case 5:
            return data + bytes(1024)
        case 6:
            return data + data[:at]
        case _:
            for _ in range(random.choice((1, 1, 8))) if content else ():
                content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    return bytes(content)


def _json(random: Random, data: bytes) -> bytes:
    document = json.loads(data)
    stamped = isinstance(document, dict) and document.pop(OWN_SHA256, None) is not None
    changed = values(random, document)
    if stamped and isinstance(changed, dict) and random.random() < 0.8:
        return manifest_text(changed).encode()
    return json.dumps(changed).encode()


def _json_lines(random: Random, data: bytes) -> bytes:
    lines = data.splitlines()
    at = random.randrange(len(lines))
    lines[at] = _json(random, lines[at])
    return b"\n".join(lines) + b"\n"


def _yaml(random: Random, data: bytes) -> bytes:
    changed = values(random, yaml.safe_load(data))
    return yaml.safe_dump(changed, allow_unicode=True).encode("utf-8", "surrogatepass")


def _safetensors(random: Random, data: bytes) -> bytes:
    (size,) = struct.unpack("<Q", data[:8])
    if random.random() < 0.1:
        return struct.pack("<Q", random.choice((0, size + 1, 2**40, 2**63))) + data[8:]
    header = json.dumps(values(random, json.loads(data[8 : 8 + size]))).encode()
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


def _checkpoint(random: Random, data: bytes) -> bytes:
    """Of the published code: other tensors under other names."""
    content = torch.load(io.BytesIO(data), weights_only=True)
    state = content["state_dict"] if "state_dict" in content and random.random() < 0.9 else content
    name = random.choice(list(state))
    match random.randrange(6):
        case 0:
            del state[name]
        case 1:
            number = str(random.choice((7, 99, 999_999, 10**12)))
            new = "".join(number if c.isdigit() and random.random() < 0.5 else c for c in str(name))
            state[new] = state[name]
        case 2:
            state[name] = torch.zeros(random.choice(SHAPES), dtype=random.choice((torch.float32, torch.int64)))
        case 3:
            state[random.choice((0, 1.5, None, "x", "transformer.tok_emb.weight"))] = state[name]
        case 4:
            state[name] = random.choice(ODD)
        case _:
            sizes = content.get("ibq_scale")
            content["ibq_scale"] = values(random, sizes) if sizes else random.choice(ODD)
    out = io.BytesIO()
    torch.save(content, out)
    return out.getvalue()


def _tar(random: Random, data: bytes) -> bytes:
    """A field of a header, under a checksum that is right mostly."""
    content = bytearray(data)
    headers = [at for at in range(0, len(data) - 511, 512) if data[at + 257 : at + 262] == b"ustar"]
    at = random.choice(headers)
    field = random.choice(list(FIELDS))
    start, length = FIELDS[field]
    choices = {"name": NAMES, "link": NAMES, "size": SIZES, "type": [bytes([t]) for t in TYPES]}
    new = random.choice(choices.get(field, TEXTS))[:length].ljust(length, b"\0")
    content[at + start : at + start + length] = new
    if random.random() < 0.9:
        content[at + 148 : at + 156] = b" " * 8
        content[at + 148 : at + 156] = b"%06o\0 " % sum(content[at : at + 512])
    return bytes(content)


_FORMS: dict[str, Callable[[Random, bytes], bytes]] = {
    ".json": _json,
    ".jsonl": _json_lines,
    ".yaml": _yaml,
    ".safetensors": _safetensors,
    ".ckpt": _checkpoint,
    ".tar": _tar,
}
