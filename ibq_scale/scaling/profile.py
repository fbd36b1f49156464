"""Rates and link speeds measured on a kind of device, in a file of the user's cache.

`ibq-scale bench tokenizer|ar|collectives --write` adds to the file. `plan` and `auto` use it for the same device. A
damaged file, or one with other versions of the packages, is left out with one line.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ibq_scale.checkpoint.files import write_whole
from ibq_scale.console import tell
from ibq_scale.documents import read_json
from ibq_scale.scaling.devices import BOARDS, named

FORMAT = 1
# A rate counts for the versions of these packages alone.
STAMPED = ("ibq-scale", "torch", "deepspeed")
# Tolerance in matching a rate to a model by its FLOPs. A rate of another model is not used.
SAME_FLOPS = 1e-3


@dataclass(frozen=True)
class StepRate:
    """Training's rate on one device of `ranks`, and its conditions. `executed_per_image`: FLOPs with recomputation."""

    task: str
    precision: str
    compile: bool
    ranks: int
    micro_batch: int
    flops_per_image: float
    executed_per_image: float
    images_per_s: float
    date: str

    @property
    def flops_per_s(self) -> float:
        """Executed FLOP/s of one device."""
        return self.images_per_s * self.executed_per_image

    def __str__(self) -> str:
        return f"rate: measured here {self.date}"


@dataclass(frozen=True)
class LinkRate:
    """A rank's link in all-reduces over `nodes` of `ranks` in all: bytes/s in one direction, and seconds of 8 KiB."""

    ranks: int
    nodes: int
    bytes_per_s: float
    latency_s: float
    date: str


@dataclass(frozen=True)
class MachineProfile:
    """All that is measured on `device`."""

    device: str
    rates: tuple[StepRate, ...] = ()
    links: tuple[LinkRate, ...] = ()

    def rates_of(self, task: str, precision: str, flops: float, *, compiled: bool) -> list[StepRate]:
        """The rates of a model with so many FLOPs an image, under any micro-batch."""
        kind = (task, precision, compiled)
        return [
            rate
            for rate in self.rates
            if (rate.task, rate.precision, rate.compile) == kind and abs(rate.flops_per_image / flops - 1) <= SAME_FLOPS
        ]

    def link(self, *, between_nodes: bool) -> LinkRate | None:
        """The link within a node or to other nodes, of the measurement with the most ranks."""
        found = [link for link in self.links if (link.nodes > 1) == between_nodes]
        return max(found, key=lambda link: link.ranks, default=None)

    def with_rate(self, rate: StepRate) -> MachineProfile:
        """With this rate instead of an earlier one under the same conditions."""
        return replace(self, rates=(*(old for old in self.rates if _conditions(old) != _conditions(rate)), rate))

    def with_link(self, link: LinkRate) -> MachineProfile:
        """With this link instead of an earlier one over the same ranks."""
        others = (old for old in self.links if (old.ranks, old.nodes) != (link.ranks, link.nodes))
        return replace(self, links=(*others, link))


def nearest(rates: list[StepRate], micro_batch: int) -> StepRate | None:
    """The rate under the nearest micro-batch, by their ratio. On a tie the smaller one, then that of fewer ranks."""
    return min(rates, key=lambda r: (abs(math.log(r.micro_batch / micro_batch)), r.micro_batch, r.ranks), default=None)


def profile_path(device: str) -> Path:
    """The file of a device: $XDG_CACHE_HOME or ~/.cache, then ibq-scale/machines/NAME.json."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    name = re.sub(r"[^a-z0-9]+", "-", _kind(device).lower()).strip("-")
    return Path(home) / "ibq-scale/machines" / f"{name}.json"


def read_profile(device: str | None) -> MachineProfile | None:
    """What is measured on a device, None without a usable file. An unusable file is reported in one line."""
    if device is None:
        return None
    path = profile_path(device)
    try:
        document = read_json(path)
        if document["format"] != FORMAT or document["device"] != _kind(device):
            raise ValueError(f"it is of {document['device']!r:.80}, in format {document['format']!r:.20}")
        if document["versions"] != versions():
            raise ValueError(f"it was measured with {_words(document['versions'])}, here is {_words(versions())}")
        return MachineProfile(
            document["device"],
            tuple(StepRate(**_checked(StepRate, rate)) for rate in document["rates"]),
            tuple(LinkRate(**_checked(LinkRate, link)) for link in document["links"]),
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as e:
        said = f"it has no {e}" if isinstance(e, KeyError) else " ".join(str(e).split())
        tell(f"ibq-scale: {path} is not used: {said:.300}. 'ibq-scale bench … --write' measures again")
        return None


def write_profile(profile: MachineProfile) -> Path:
    """Replaces the file of the profile's device, and returns its path. OSError."""
    path = profile_path(profile.device)
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {"format": FORMAT, "versions": versions()} | asdict(profile)
    write_whole(path, json.dumps(document, indent=1) + "\n")
    return path


def profile_to_extend(device: str) -> MachineProfile:
    """The profile of a device, an empty one where none is usable."""
    return read_profile(device) or MachineProfile(_kind(device))


def this_cpu(threads: int) -> str:
    """The name of this CPU with so many threads a rank. A rate depends on both."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    name = " ".join(model[1].split()) if model else "of an unknown model"
    return f"CPU {name}, {threads} thread{'s' * (threads > 1)}"


def versions(packages: Sequence[str] = STAMPED) -> dict[str, str | None]:
    """Versions of installed packages, None for absent ones. By default those that a rate depends on."""
    return {package: _version(package) for package in packages}


def today() -> str:
    """The date of a measurement (UTC)."""
    return datetime.now(UTC).date().isoformat()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _kind(device: str) -> str:
    """The name in the table of GPUs, else the device's own."""
    known = named(device)
    return known.name if known else BOARDS.get(device, device)


def _conditions(rate: StepRate) -> tuple[Any, ...]:
    return rate.task, rate.precision, rate.compile, rate.ranks, rate.micro_batch, round(rate.flops_per_image)


def _checked(schema: type[StepRate] | type[LinkRate], values: Any) -> dict[str, Any]:
    """The values of a record if each has its type and every number is above 0. ValueError, TypeError."""
    for name, kind in schema.__annotations__.items():
        value = values[name]
        if kind in ("int", "float"):
            right = isinstance(value, int if kind == "int" else (int, float)) and 0 < value < math.inf
        else:
            right = isinstance(value, str if kind == "str" else bool)
        if not right:
            raise ValueError(f"{name} is {value!r:.40}")
    return dict(values)


def _words(found: Any) -> str:
    return ", ".join(f"{name} {number}" for name, number in found.items()) if isinstance(found, dict) else "nothing"
