"""Each rank writes its error to a file, and the launcher reports the first cause once.

The first failure ends the other ranks inside their collectives. Without this module a reader would see only their
errors, by the thousand. Imports no torch, since launchers and batch scripts read the files.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from ibq_scale.console import rank, several, tell
from ibq_scale.errors import UserError

# Environment variable: the folder for the ranks' reports. Without it each rank prints its own error.
FOLDER = "IBQ_SCALE_FAILURES"
# Environment variable: torchrun's file for the error of a rank.
TORCHRUN = "TORCHELASTIC_ERROR_FILE"
# Most ranks in a line.
NAMED = 16
# Marks of an error caused by another rank's end, in its class or message (gloo, NCCL, the store).
OF_OTHERS = (
    "DistBackendError", "DistNetworkError", "DistStoreError", "NoAnswerError", "gloo/transport", "Broken pipe",
    "Connection closed by peer", "Connection reset by peer", "NCCL communicator was aborted", "ncclRemoteError",
    "ncclSystemError",
)  # fmt: skip


@dataclass(frozen=True)
class Failure:
    """The end of one rank out of `of`.

    `time`: seconds since the epoch, by its node's clock. `code`: its exit code. `said`: the error in one line. `trace`:
    the traceback, empty for a user's mistake. `follows`: probably caused by another rank's end.
    """

    rank: int
    of: int
    host: str
    time: float
    code: int
    said: str
    trace: str
    follows: bool


def leave_or_tell(error: Exception, code: int) -> None:
    """Writes the error for the launcher if it gathers errors, else prints it."""
    if not leave(error, code):
        tell_alone(error)


def leave(error: Exception, code: int) -> bool:
    """Writes this rank's error to the launcher's folder. False without a folder, or if the write fails.

    A missing folder is not made: it may be one of the host, invisible in this rank's container.
    """
    if (folder := asked()) is None or not folder.is_dir():
        return False
    trace = "" if isinstance(error, UserError) else "".join(traceback.format_exception(error)).rstrip()
    # Under srun WORLD_SIZE is set only by `environment.join`.
    of = int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS", "1"))
    failure = Failure(rank(), of, socket.gethostname(), time.time(), code, describe(error), trace, follows(error))
    path = folder / f"rank-{failure.rank:05d}.json"
    try:
        part = path.with_suffix(".part")
        part.write_text(json.dumps(asdict(failure)), encoding="utf-8")
        part.replace(path)
    except OSError:
        return False
    return True


def tell_alone(error: Exception) -> None:
    """Prints this rank's error, for a launcher that gathers none.

    Under torchrun the error also goes to the rank's error file. torchrun prints the first cause at its end.
    """
    if torchrun := os.environ.get(TORCHRUN):
        _leave_with_torchrun(Path(torchrun), error)
    if isinstance(error, UserError):
        # Mostly all ranks have the same one. Under torchrun rank 0 prints it, and torchrun reports another rank's.
        if rank() == 0 or not torchrun:
            tell(f"ibq-scale: {f'rank {rank()}: ' * (rank() > 0)}{error}")
        return
    # A note has the path of the traceback.
    if not getattr(error, "__notes__", []):
        traceback.print_exception(error)
    tell(f"ibq-scale: rank {rank()}: {describe(error)}")


def _leave_with_torchrun(path: Path, error: Exception) -> None:
    """Writes the record of torch.distributed.elastic.multiprocessing.errors.

    torchrun takes the earliest of all ranks as the root cause, so errors caused by another rank's end are not written.
    """
    if follows(error):
        return
    trace = "".join(traceback.format_exception(error))
    extra = {"py_callstack": trace, "timestamp": str(int(time.time()))}
    with suppress(OSError):
        path.write_text(json.dumps({"message": {"message": describe(error), "extraInfo": extra}}), encoding="utf-8")


def follows(error: Exception) -> bool:
    """Whether the error was probably caused by another rank's end."""
    words = f"{type(error).__name__}: {error}"
    return any(mark in words for mark in OF_OTHERS) and not isinstance(error, UserError)


def describe(error: Exception) -> str:
    """One line: the message of a user's mistake, else class, message and notes."""
    if isinstance(error, UserError):
        return str(error)
    words = " ".join([" ".join(str(error).split()), *getattr(error, "__notes__", [])])
    return f"{type(error).__name__}: {words}"


def asked() -> Path | None:
    """The folder for the reports of this job step's ranks, if the launcher gathers them."""
    folder = os.environ.get(FOLDER)
    return Path(folder) if folder else None


def collect(folder: Path) -> list[Failure]:
    """All reports of the ranks, the first cause first.

    Errors caused by another rank's end come last, regardless of the nodes' clocks.
    """
    found = []
    for path in sorted(folder.glob("rank-*.json")):
        with suppress(OSError, ValueError, TypeError):
            found.append(Failure(**json.loads(path.read_text(encoding="utf-8"))))
    return sorted(found, key=lambda f: (f.follows, f.time, f.rank))


def explain(failures: Sequence[Failure], killed: Mapping[int, int]) -> str:
    """One message on `failures` (sorted as by `collect`) and on ranks killed by a signal (signal by rank).

    A user's mistake is printed as it is. Otherwise the message has the first cause's traceback, a line for each kind of
    later error, and last, where a reader looks first, the first cause. Empty if there is nothing to report.
    """
    mistakes = dict.fromkeys(f.said for f in failures if not f.trace)
    if mistakes:
        return "\n".join(f"ibq-scale: {said}" for said in mistakes)
    causes = [failure for failure in failures if not failure.follows][:1]
    groups: dict[str, list[Failure]] = {}
    for failure in failures[len(causes) :]:
        groups.setdefault(failure.said.partition(" (traceback in ")[0], []).append(failure)
    lines = [first.trace for first in causes]
    lines += [f"ibq-scale: then {_ranks([f.rank for f in g])}: {said}{_place(g[0])}" for said, g in groups.items()]
    lines += [f"ibq-scale: {_killed(killed)}"] if killed else []
    lines += [f"ibq-scale: rank {f.rank} of {f.of} on {f.host} failed first: {f.said}" for f in causes]
    if failures and not causes and not killed:
        lines.append("ibq-scale: no rank tells of a first cause: one was ended from outside, or its node is gone")
    return "\n".join(lines)


def tell_of_job_step() -> int | None:
    """Prints the reports of this job step's ranks once, and removes them.

    Returns the exit code of the first cause, None if no rank reported one.
    """
    if (folder := asked()) is None or not folder.is_dir():
        return None
    failures = collect(folder)
    if said := explain(failures, {}):
        tell(said)
    shutil.rmtree(folder, ignore_errors=True)
    return failures[0].code if failures and not failures[0].follows else None


def _killed(killed: Mapping[int, int]) -> str:
    by: dict[int, list[int]] = {}
    for number, signum in killed.items():
        by.setdefault(signum, []).append(number)
    words = []
    for signum, ranks in by.items():
        why = ": the kernel does that when memory runs out ('dmesg' tells)" if signum == signal.SIGKILL else ""
        words.append(f"{_ranks(ranks)} killed by {_signal(signum)}{why}")
    return "; ".join(words)


def _signal(signum: int) -> str:
    try:
        return signal.Signals(signum).name
    except ValueError:
        return f"signal {signum}"


def _place(failure: Failure) -> str:
    ours = [
        line.strip() for line in failure.trace.splitlines() if "ibq_scale" in line and line.strip().startswith("File")
    ]
    return f" [{ours[-1]}]" if ours else ""


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {several([*map(str, sorted(ranks))], NAMED)}"
