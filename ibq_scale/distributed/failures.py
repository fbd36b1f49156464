"""Why ranks failed, told once: each leaves its error with whoever started it, who then names the first cause.

The first rank to fail ends the others inside their collectives, and their errors are all that a reader would see of a
thousand ranks. No torch: launchers and batch scripts read what ranks leave.
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

# Names the folder, for ranks whose starter will ask. Others tell of themselves.
FOLDER = "IBQ_SCALE_FAILURES"
# Names the file of which torchrun reads why a rank ended.
TORCHRUN = "TORCHELASTIC_ERROR_FILE"
# Ranks named in a line.
NAMED = 16
# What a collective says when another rank has gone, by the error's class or in its words (gloo, NCCL, the store).
OF_OTHERS = (
    "DistBackendError", "DistNetworkError", "DistStoreError", "NoAnswerError", "gloo/transport", "Broken pipe",
    "Connection closed by peer", "Connection reset by peer", "NCCL communicator was aborted", "ncclRemoteError",
    "ncclSystemError",
)  # fmt: skip


@dataclass(frozen=True)
class Failure:
    """How one rank `of` so many ended. `time`: seconds since the epoch, by its node's clock; `trace`: empty for a
    user's mistake; `follows`: another rank's end will have caused it.
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
    """Whoever started the ranks may gather what they say. Else each tells of itself."""
    if not leave(error, code):
        tell_alone(error)


def leave(error: Exception, code: int) -> bool:
    """Leaves what ended this rank where its starter looks. False where nobody does, or nothing can be written there:
    a folder that is not there may be one that this rank's container does not see, and is not made.
    """
    if (folder := asked()) is None or not folder.is_dir():
        return False
    trace = "" if isinstance(error, UserError) else "".join(traceback.format_exception(error)).rstrip()
    # Under srun torch's own name is there from the joining on.
    of = int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS", "1"))
    failure = Failure(rank(), of, socket.gethostname(), time.time(), code, describe(error), trace, _follows(error))
    path = folder / f"rank-{failure.rank:05d}.json"
    try:
        part = path.with_suffix(".part")
        part.write_text(json.dumps(asdict(failure)), encoding="utf-8")
        part.replace(path)
    except OSError:
        return False
    return True


def tell_alone(error: Exception) -> None:
    """Tells what ended this rank, where nobody gathers what ranks say. torchrun reads the first cause from a file that
    it names, and has it in its last words.
    """
    if torchrun := os.environ.get(TORCHRUN):
        _leave_with_torchrun(Path(torchrun), error)
    if isinstance(error, UserError):
        # Mostly of all ranks: where torchrun tells of one that is not rank 0, once is enough.
        if rank() == 0 or not torchrun:
            tell(f"ibq-scale: {f'rank {rank()}: ' * (rank() > 0)}{error}")
        return
    # A note says where the traceback is.
    if not getattr(error, "__notes__", []):
        traceback.print_exception(error)
    tell(f"ibq-scale: rank {rank()}: {describe(error)}")


def _leave_with_torchrun(path: Path, error: Exception) -> None:
    """As torch.distributed.elastic.multiprocessing.errors records an exception; the earliest of all ranks is the root
    cause, so what follows from another's end says nothing.
    """
    if _follows(error):
        return
    trace = "".join(traceback.format_exception(error))
    extra = {"py_callstack": trace, "timestamp": str(int(time.time()))}
    with suppress(OSError):
        path.write_text(json.dumps({"message": {"message": describe(error), "extraInfo": extra}}), encoding="utf-8")


def _follows(error: Exception) -> bool:
    words = f"{type(error).__name__}: {error}"
    return any(mark in words for mark in OF_OTHERS) and not isinstance(error, UserError)


def describe(error: Exception) -> str:
    """One line: the message of a user's mistake, else class, message, and notes on it."""
    if isinstance(error, UserError):
        return str(error)
    words = " ".join([" ".join(str(error).split()), *getattr(error, "__notes__", [])])
    return f"{type(error).__name__}: {words}"


def asked() -> Path | None:
    """Where the ranks of this job step leave what they have to say, if anybody is to gather it."""
    folder = os.environ.get(FOLDER)
    return Path(folder) if folder else None


def collect(folder: Path) -> list[Failure]:
    """All that ranks have left, the first cause first: what follows from another's end comes last, whatever the nodes'
    clocks say.
    """
    found = []
    for path in sorted(folder.glob("rank-*.json")):
        with suppress(OSError, ValueError, TypeError):
            found.append(Failure(**json.loads(path.read_text(encoding="utf-8"))))
    return sorted(found, key=lambda f: (f.follows, f.time, f.rank))


def explain(failures: Sequence[Failure], killed: Mapping[int, int]) -> str:
    """One message on `failures` (as `collect` sorts them) and on ranks that a signal killed (signal by rank).

    A user's mistake is said as it is. Else: the first cause's traceback, a line for each kind of what came after it,
    and last, where one looks first, the first cause. Empty where there is nothing to tell.
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
    """Tells what the ranks of this job's step have left, once, and clears it away; the exit code of the first cause,
    None where no rank has named one.
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
    """Where in our own code it was."""
    ours = [
        line.strip() for line in failure.trace.splitlines() if "ibq_scale" in line and line.strip().startswith("File")
    ]
    return f" [{ours[-1]}]" if ours else ""


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {several([*map(str, sorted(ranks))], NAMED)}"
