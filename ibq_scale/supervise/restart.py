"""All ranks of a run start again at once, each as the same process with the same command.

A process replaces its program by ``exec``, so its launcher (torchrun, srun, this package's own) sees no end, and its
GPU memory is free again. Any rank may ask for it, also while the others wait for it in a collective: a thread of each
rank listens on the side channel. The ranks meet at a new port, opened by rank 0 before its store ends.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from ibq_scale.console import tell
from ibq_scale.distributed.side_channel import LISTENER, NoAnswerError, SideChannel
from ibq_scale.distributed.signals import ASKING
from ibq_scale.distributed.world import World

# For the listening threads of all ranks to answer.
READY_SECONDS = 60.0
# Between a rank's last message through rank 0's store and its new program. Rank 0 leaves within it.
LEAVE_SECONDS = 0.5

log = logging.getLogger(__name__)


class Restart:
    """Listens for a request to start again, until `close`. Without a `command` (a program's words) nothing listens.

    `leaving` is called before the new program, on every rank.
    """

    def __init__(self, world: World, command: Sequence[str], leaving: Callable[[], None]) -> None:
        self._world = world
        self._command = tuple(command)
        self._leaving = leaving
        self._going = threading.Event()
        self._failed = threading.Event()
        if command:
            self._channel = SideChannel(world)
            # Connected now: rank 0 may be dead later, and a new connection to it would be tried for minutes.
            self._asking = self._channel.another()
            self._thread = threading.Thread(target=self._listen, name="restart", daemon=True)
            self._thread.start()

    def ask(self, why: str) -> None:
        """Starts all ranks again, `why` in words for the user. Returns only if not all ranks answer."""
        if not self._command:
            return
        for rank in range(self._world.size):
            self._asking.put(f"again/{rank}", why)
        self._failed.wait(2 * READY_SECONDS)

    def hold(self) -> None:
        """Keeps this thread from ending the process while it starts again. Returns at once if it does not."""
        if self._going.is_set():
            self._failed.wait(2 * READY_SECONDS)

    def close(self) -> None:
        if self._command:
            try:
                self._asking.put(f"again/{self._world.rank}", None)
                self._thread.join(1.0)
            except RuntimeError as e:
                log.warning("the ranks' meeting point is gone: %s", e)

    def _listen(self) -> None:
        try:
            why = self._channel.until(f"again/{self._world.rank}")
            if why is None:
                return
            self._going.set()
            log.warning("%s", why)
            self._start_again(self._meet(why))
        except (RuntimeError, OSError) as e:
            log.warning("this rank does not start again: %s", e)
        finally:
            self._failed.set()

    def _meet(self, why: str) -> dict[str, str]:
        """Waits for all ranks. Returns the environment of the new program. NoAnswerError if a rank does not answer."""
        channel, main, size = self._channel, self._world.is_main, self._world.size
        environ = {name: value for name, value in os.environ.items() if name != "TORCHELASTIC_USE_AGENT_STORE"}
        if main:
            tell(why)
            listener = _listener()
            environ[LISTENER] = str(listener)
            with socket.socket(fileno=os.dup(listener)) as server:
                channel.put("again/port", int(server.getsockname()[1]))
        channel.count("again/ready")
        if not _reached(channel, "again/ready", size):
            raise NoAnswerError(f"not all {size} ranks answer within {READY_SECONDS:.0f} s")
        environ["MASTER_PORT"] = str(channel.get("again/port"))
        channel.count("again/gone")
        if main:
            _reached(channel, "again/gone", size)
        else:
            time.sleep(LEAVE_SECONDS)
        return environ

    def _start_again(self, environ: dict[str, str]) -> None:
        for child in multiprocessing.active_children():
            child.kill()
        self._leaving()
        # The mask outlives the program: a signal from now on is delivered to the next one's handler.
        signal.pthread_sigmask(signal.SIG_BLOCK, ASKING)
        kept = environ.get(LISTENER) if self._world.is_main else None
        _close_at_exec({0, 1, 2} | ({int(kept)} if kept else set()))
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(self._command[0], self._command, environ)


def _reached(channel: SideChannel, counter: str, number: int) -> bool:
    deadline = time.monotonic() + READY_SECONDS
    while channel.count(counter, 0) < number:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _listener() -> int:
    """A listening socket for the next program. Returns its file descriptor."""
    if socket.has_dualstack_ipv6():
        server = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    else:
        server = socket.create_server(("", 0))
    server.set_inheritable(True)
    return server.detach()


def _close_at_exec(kept: set[int]) -> None:
    """Libraries may leave files open for the next program: sockets of collectives, and devices with their memory."""
    for fd in {int(path.name) for path in Path("/proc/self/fd").iterdir()} - kept:
        # That of the listing is closed already.
        with suppress(OSError):
            os.set_inheritable(fd, False)
