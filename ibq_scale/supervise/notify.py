"""Tells the addresses and commands of `notify` how an attempt ended: done, hang, requeue or failure.

A notice is sent by a process of its own, which imports no torch: a slow address or a hanging command neither delays nor
changes the exit. The ending process waits `WAIT_SECONDS` for it, since a container ends with its first process.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ibq_scale.config.secrets import masked
from ibq_scale.console import tell
from ibq_scale.documents import json_object
from ibq_scale.errors import UserError

if TYPE_CHECKING:
    from ibq_scale.config.run import AnyRun
    from ibq_scale.distributed.world import World

EVENTS = {0: "done", 69: "requeue", 70: "hang", 71: "requeue", 75: "requeue", 76: "requeue"}
"""By exit code. Others are failures."""
# Of the ending process, of an address, of a command.
WAIT_SECONDS, POST_SECONDS, COMMAND_SECONDS = 2.0, 10.0, 60.0
# Advance of the first cause over the errors that it causes on other ranks.
FOLLOWS_SECONDS = 0.5
MOST_CHARACTERS = 2000
# This package, wherever it was imported from.
IMPORT = "import json, sys; sys.path.insert(0, sys.argv[1]); from ibq_scale.supervise.notify import deliver"


class Notices:
    """One attempt's notice, from rank 0 or a surviving rank. `share` makes it one of all ranks."""

    def __init__(self, config: AnyRun, world: World) -> None:
        self._config = config
        self._world = world
        self._token: str | None = None
        self._sent = False

    def share(self) -> None:
        """Agrees on a token, by which one rank alone sends. Collective. UserError for an unset variable."""
        if self._config.notify:
            from ibq_scale.distributed.agree import by_rank_0

            self._token = by_rank_0(self._world, self._begin)

    def _begin(self) -> str:
        for target in self._config.notify:
            if _resolved(target) is None:
                if "/…" not in target:
                    raise UserError(f"notify={target}: the environment has no {target[1:]}")
                tell(f"notify={target}: the rest of this address is kept nowhere. Give it again: no notice goes there")
        return os.urandom(8).hex()

    def ended(self, code: int, reason: str, *, follows: bool = False) -> None:
        """Sends the notice of this exit code. `follows`: another rank probably knows the cause."""
        targets = [target for target in map(_resolved, self._config.notify) if target]
        # Before `share` rank 0 alone. Later every rank tries, since any of them may be dead.
        if not targets or self._sent or (self._token is None and not self._world.is_main):
            return
        self._sent = True
        facts = {
            "event": EVENTS.get(code, "failure"),
            "code": code,
            "reason": reason[:MOST_CHARACTERS],
            "run": self._config.name,
            "run_dir": str(Path(self._config.run_dir).absolute()),
            "rank": self._world.rank,
            "host": socket.gethostname(),
            "job": os.environ.get("SLURM_JOB_ID", ""),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        request = {"targets": targets, "facts": facts, "token": self._token, "delay": FOLLOWS_SECONDS * follows}
        try:
            child = subprocess.Popen(
                [sys.executable, "-c", f"{IMPORT}; deliver(**json.load(sys.stdin))", str(Path(__file__).parents[2])],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            # Less than a pipe's buffer.
            child.communicate(json.dumps(request).encode(), timeout=WAIT_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        except OSError as e:
            tell(f"no notice could be sent: {e}")


def _resolved(target: str) -> str | None:
    """The value of ``$NAME``. None if it is unset, and for an address without its path."""
    if target.startswith("$") and target[1:].isidentifier():
        return os.environ.get(target[1:])
    return None if "/…" in target else target


def deliver(targets: Sequence[str], facts: dict[str, Any], token: str | None, delay: float) -> None:
    """Sends a notice to all its targets at once, if no other rank has. Faults go to RUN/logs/notify.log."""
    time.sleep(delay)
    run_dir = Path(facts["run_dir"])
    if token is not None and not _first(run_dir / "logs", token):
        return
    # The last known step, and the newest checkpoint. The heartbeat may be 30 seconds old.
    facts |= {"step": json_object(run_dir / "heartbeat.json").get("step", 0), "checkpoint": ""}
    with suppress(OSError, ValueError):
        facts["checkpoint"] = (run_dir / "checkpoints/latest").read_text(encoding="utf-8").strip()
        facts["step"] = max(facts["step"], int(facts["checkpoint"].removeprefix("step-")))
    facts["text"] = f"{facts['run']}: {facts['event']} at step {facts['step']} on {facts['host']}: {facts['reason']}"
    with ThreadPoolExecutor(len(targets)) as threads:
        faults = list(threads.map(lambda target: _send(target, facts), targets))
    with suppress(OSError), (run_dir / "logs/notify.log").open("a", encoding="utf-8") as log:
        for target, fault in zip(targets, faults, strict=True):
            if fault:
                log.write(f"{facts['time']} {facts['event']}: {masked(target)}: {masked(fault)}\n")


def _first(folder: Path, token: str) -> bool:
    """Whether no other process made this attempt's mark. Where none can be made, every rank is the first."""
    mark = folder / f".notified-{token}"
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        return True
    for old in folder.glob(".notified-*"):
        if old != mark:
            old.unlink(missing_ok=True)
    return True


def _send(target: str, facts: dict[str, Any]) -> str | None:
    """The fault, if any."""
    body = json.dumps(facts).encode()
    try:
        if not target.startswith(("https://", "http://")):
            return _run(target, body, facts)
        headers = {"Content-Type": "application/json", "User-Agent": "ibq-scale"}
        with urllib.request.urlopen(urllib.request.Request(target, body, headers), timeout=POST_SECONDS):
            return None
    except Exception as e:  # of any type: the other targets go on
        return f"{type(e).__name__}: {e}"


def _run(command: str, body: bytes, facts: dict[str, Any]) -> str | None:
    """Runs a shell command with the facts as JSON in its input, and as variables."""
    child = subprocess.Popen(
        ["sh", "-c", command],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=os.environ | {f"IBQ_SCALE_{name.upper()}": str(value) for name, value in facts.items()},
        start_new_session=True,
    )
    try:
        _, said = child.communicate(body, timeout=COMMAND_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        return f"ended after {COMMAND_SECONDS:.0f} s"
    words = " ".join(said.decode(errors="replace").split())[:MOST_CHARACTERS]
    return f"exit code {child.returncode} {words}" if child.returncode else None
