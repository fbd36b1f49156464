"""budgets.md: what each rehearsed step may ask for, and the rehearsals that find out what it does."""

from __future__ import annotations

import os
import pickle
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from tests.nursery import Nursery, server
from tests.rehearsal.gpu import build_driver
from tests.rehearsal.rehearse import Record, rehearse

LARGER = "## Larger"
TABLE = Path(__file__).with_name("budgets.md")
RANKS = 64


class Row(NamedTuple):
    """A line of the table. `our_waits` and `its_waits` (DeepSpeed's) of the host; `sent`: MB of a rank."""

    what: str
    our_waits: int
    its_waits: int
    collectives: int
    sent: float
    large: bool = False

    @staticmethod
    def of(what: str, record: Record) -> Row:
        ours = sum(call.ours for call in record.syncs)
        sent = sum(call.sent for call in record.collectives) / 1e6
        return Row(what, ours, len(record.syncs) - ours, len(record.collectives), round(sent, 1))

    def line(self) -> str:
        return f"| `{self.what}` | {self.our_waits} | {self.its_waits} | {self.collectives} | {self.sent:.1f} |"


def rows() -> Iterator[Row]:
    """Of both tables, in order."""
    large = False
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        large |= line.startswith(LARGER)
        if line.startswith("| `"):
            what, *numbers = (cell.strip().strip("`") for cell in line.strip("|").split("|"))
            yield Row(what, *(int(number) for number in numbers[:3]), float(numbers[3]), large)


@contextmanager
def rehearsals() -> Iterator[Nursery]:
    """A fork server whose children can pretend to have GPUs."""
    with tempfile.TemporaryDirectory(prefix="rehearsal-") as folder, mock.patch.dict(os.environ):
        os.environ.update(build_driver(Path(folder)))
        os.environ.pop("TRITON_INTERPRET", None)
        with server() as address:
            yield Nursery(address)


def record_of(what: str, of: Nursery, before: Callable[[], object] = int) -> Record:
    """Rehearses ``PRESET WORDS``. AssertionError with the child's traceback where it fails."""
    preset, *words = what.split()
    with tempfile.NamedTemporaryFile() as result:
        child = of.start(partial(_child, preset, tuple(words), before, Path(result.name)), os.environ)
        code = child.wait()
        record, error = pickle.loads(Path(result.name).read_bytes())
        assert code == 0, f"{error}\n{child.said()}"
    assert isinstance(record, Record)
    return record


def _child(preset: str, words: tuple[str, ...], before: Callable[[], object], result: Path) -> int:
    try:
        outcome: tuple[Record | None, str] = (rehearse(preset, words, RANKS, before), "")
    except BaseException:
        outcome = (None, traceback.format_exc())
    result.write_bytes(pickle.dumps(outcome))
    return 0 if outcome[0] else 1


def told(record: Record) -> str:
    """Who waits and who sends, a line each."""
    waits = [f"{count} x {kind}, {place}" for (kind, place, _), count in Counter(record.syncs).items()]
    sizes: Counter[tuple[str, str]] = Counter()
    calls: Counter[tuple[str, str]] = Counter()
    for call in record.collectives:
        sizes[call.kind, call.place] += call.size
        calls[call.kind, call.place] += 1
    sent = [f"{calls[key]} x {key[0]}, {size:,} bytes, {key[1]}" for key, size in sizes.items()]
    laid = [f"{count} x {operator} of {order}" for (operator, order), count in sorted(record.layouts.items())]
    return "\n".join([*record.faults, *waits, *sent, *laid])
