"""budgets.md: what each rehearsed step may ask for, and the rehearsals that find out what it does."""

from __future__ import annotations

import os
import pickle
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from ibq_scale.scaling.budget import FIXED
from ibq_scale.scaling.plan import Machine, make_plan
from tests.nursery import Nursery, server
from tests.rehearsal.gpu import build_driver
from tests.rehearsal.rehearse import STEP, Record, Records, rehearse, settled

LARGER = "## Larger"
TABLE = Path(__file__).with_name("budgets.md")
RANKS = 64


class Row(NamedTuple):
    """A line of the table: a part of a run.

    `our_waits` and `its_waits` (DeepSpeed's) of the host. In MB: `sent` by a rank, and `made`, the GPU memory that the
    part takes at its peak, None if not listed. `of_plan`: the peak's share of what `plan` says, 0 if not listed.
    """

    what: str
    part: str
    our_waits: int
    its_waits: int
    collectives: int
    sent: float
    made: float | None
    of_plan: float

    @staticmethod
    def of(what: str, part: str, record: Record, planned: Mapping[str, int]) -> Row:
        ours = sum(call.ours for call in record.syncs)
        sent = sum(call.sent for call in record.collectives) / 1e6
        share = record.peak / planned[part] if part in planned else 0.0
        its = len(record.syncs) - ours
        return Row(what, part, ours, its, len(record.collectives), round(sent, 1), record.made / 1e6, share)

    @property
    def counts(self) -> tuple[float, ...]:
        return self.our_waits, self.its_waits, self.collectives, self.sent

    def line(self) -> str:
        part = "" if self.part == STEP else f" {self.part}"
        share = f"{self.of_plan:.2f}" if self.of_plan else ""
        counts = f"{self.our_waits} | {self.its_waits} | {self.collectives} | {self.sent:.1f}"
        return f"| `{self.what}`{part} | {counts} | {self.made or 0:.0f} | {share} |"


class Run(NamedTuple):
    """The rows of a run, the step first. `large`: rehearsed by `make test-all` only."""

    what: str
    rows: list[Row]
    large: bool


def runs() -> list[Run]:
    """Of the tables, in order. The parts of a run come right after its step."""
    large, found = False, list[Run]()
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        large |= line.startswith(LARGER)
        if line.startswith("| `"):
            cell, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            what, _, part = cell.removeprefix("`").partition("`")
            waits, sent, made, share = cells[:3], float(cells[3]), float(cells[4]) if cells[4] else None, cells[5]
            row = Row(what, part.strip() or STEP, *map(int, waits), sent, made, float(share or 0))
            if row.part == STEP:
                found.append(Run(what, [], large))
            assert found[-1].what == what, line
            found[-1].rows.append(row)
    return found


def planned(what: str) -> dict[str, int]:
    """Bytes of a rank's GPU by `plan`, by part, without what no allocation of torch shows: gaps, and CUDA's own."""
    preset, *words = what.split()
    memory = make_plan(settled(preset, tuple(words), RANKS), Machine(gpus=RANKS), mfu=1.0).memory
    gaps = next(line.passes for line in memory.lines if line.name.startswith("fragmentation"))
    step = max(memory.passes - gaps, memory.step) - FIXED
    return {STEP: step} | ({"validation": memory.validation - FIXED} if memory.validation else {})


@contextmanager
def rehearsals() -> Iterator[Nursery]:
    """A fork server whose children can pretend to have GPUs."""
    with tempfile.TemporaryDirectory(prefix="rehearsal-") as folder, mock.patch.dict(os.environ):
        os.environ.update(build_driver(Path(folder)))
        os.environ.pop("TRITON_INTERPRET", None)
        with server() as address:
            yield Nursery(address)


def records_of(what: str, parts: Iterable[str], of: Nursery, before: Callable[[], object] = int) -> Records:
    """Rehearses ``PRESET WORDS``. AssertionError with the child's traceback where it fails."""
    preset, *words = what.split()
    with tempfile.NamedTemporaryFile() as result:
        call = partial(rehearse, preset, tuple(words), tuple(parts), RANKS, before)
        child = of.start(partial(_child, call, Path(result.name)), os.environ)
        code = child.wait()
        records, error = pickle.loads(Path(result.name).read_bytes())
        assert code == 0, f"{error}\n{child.said()}"
    assert isinstance(records, dict)
    return records


def record_of(what: str, of: Nursery, before: Callable[[], object] = int) -> Record:
    """Of the step alone."""
    return records_of(what, (), of, before)[STEP]


def _child(call: Callable[[], Records], result: Path) -> int:
    try:
        outcome: tuple[Records | None, str] = (call(), "")
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
