"""Each rank publishes its position outside of the collectives. After a hang the positions show the missing ranks."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ibq_scale.console import several
from ibq_scale.distributed.side_channel import SideChannel, within

# Most ranks in a line.
NAMED = 16
# For one small answer of the store. All ranks ask at once.
ANSWER_SECONDS = 10.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """A rank's position: its last finished `step`, the `phase` since, and the collective in progress."""

    step: int
    phase: str
    collective: str | None


@dataclass(frozen=True)
class Missing:
    """Ranks that the others wait for, with the reason in one line. `silent`: their heartbeats have stopped."""

    ranks: list[int]
    why: str
    silent: bool = False


class Heartbeats:
    """Publishes `where()` every `interval` seconds, from its own thread."""

    def __init__(self, channel: SideChannel, interval: float, where: Callable[[], Place]) -> None:
        self.interval = interval
        self._channel = channel
        self._where = where
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeats", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        beat = 0
        name = f"heartbeat/{self._channel.world.rank}"
        while True:
            try:
                self._channel.put(name, asdict(self._where()) | {"beat": beat})
            except RuntimeError as e:
                log.warning("heartbeats end, the ranks' meeting point is gone: %s", e)
                return
            beat += 1
            if self._closed.wait(self.interval):
                return

    def close(self) -> None:
        """Ends the heartbeats. A thread blocked by the store is abandoned."""
        self._closed.set()
        self._thread.join(1.0)


def find_missing(channel: SideChannel, hosts: Sequence[str], interval: float) -> Missing:
    """The missing ranks, the same for every rank that asks. Takes about three intervals. Call `leave` afterwards.

    The first rank to ask reads all heartbeats twice. The others wait for its answer.
    """
    patience = 3 * interval + 10.0
    try:
        channel = within(ANSWER_SECONDS, channel.another, "the ranks' meeting point")
        first = within(ANSWER_SECONDS, lambda: channel.count("hang/asked"), "the heartbeats")
        if first == 1:
            # Two reads show whether a rank is alive. A timestamp does not, since the nodes' clocks differ.
            before = within(patience, lambda: channel.of_each_rank("heartbeat"), "the heartbeats")
            time.sleep(2 * interval)
            after = within(patience, lambda: channel.of_each_rank("heartbeat"), "the heartbeats")
            found = judge(before, after, hosts)
            channel.put("hang/missing", asdict(found))
            return found
        return Missing(**channel.wait("hang/missing", 2 * patience))
    except RuntimeError as e:
        return Missing([0], f"{_name(0, hosts)} does not answer, where the ranks' meeting point is ({e})", silent=True)


def leave(channel: SideChannel, missing: Missing, seconds: float) -> None:
    """Waits until all ranks except silent ones call it: the first exit may end other ranks before they print."""

    def all_left() -> bool:
        own = channel.another()
        expected = own.world.size - len(missing.ranks) * missing.silent
        left = own.count("hang/left")
        while left < expected:
            time.sleep(0.1)
            left = own.count("hang/left", 0)
        return True

    within(seconds, all_left, "the other ranks")


def judge(
    before: Sequence[dict[str, Any] | None], after: Sequence[dict[str, Any] | None], hosts: Sequence[str]
) -> Missing:
    """The missing ranks by two reads of the heartbeats.

    These are the silent ranks, else those a step behind, else those outside of the others' collective.
    """
    silent = [r for r, (b, a) in enumerate(zip(before, after, strict=True)) if a is None or a == b]
    if silent:
        why = f"{_names(silent, hosts)}: no sign of life (stopped, dead, or cut off){_rest(after, silent)}"
        return Missing(silent, why, silent=True)
    places = [beat for beat in after if beat is not None]
    latest = max(p["step"] for p in places)
    behind = [r for r, p in enumerate(places) if p["step"] < latest]
    outside = [r for r, p in enumerate(places) if p["collective"] is None]
    for ranks in (behind, outside if len(outside) < len(places) else []):
        if ranks:
            phases = sorted({f"{places[r]['phase']} after step {places[r]['step']}" for r in ranks})
            return Missing(ranks, f"{_names(ranks, hosts)}: alive, in {' and '.join(phases)}{_rest(after, ranks)}")
    return Missing([], f"every rank is alive, none is behind{_rest(after, [])}")


def _rest(beats: Sequence[dict[str, Any] | None], missing: Sequence[int]) -> str:
    others = [beat for rank, beat in enumerate(beats) if beat is not None and rank not in missing]
    places = sorted({f"{b['collective'] or b['phase']} after step {b['step']}" for b in others})
    return f"; the other {len(others)} are in {', '.join(places[:4])}" if others else ""


def _names(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    return several([_name(rank, hosts) for rank in ranks], NAMED)


def _name(rank: int, hosts: Sequence[str]) -> str:
    return f"rank {rank} on {hosts[rank]}"
