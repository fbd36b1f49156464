"""Messages between ranks through torch's key-value store, on a separate connection. No collective blocks them.

The store is the rendezvous's, in rank 0's process or torchrun's agent. A thousand ranks cost it some tens of small
messages a second. Files would cost a shared file system as many metadata operations, and the file system is the first
part to hang.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from ibq_scale.distributed.failed_nodes import attempt
from ibq_scale.distributed.world import World
from ibq_scale.errors import PortTakenError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import TCPStore

T = TypeVar("T")
POLL_SECONDS = 0.1
FOREVER = timedelta(days=3650)
LISTENER = "IBQ_SCALE_LISTENER"
"""Environment variable: rank 0's file descriptor of a listening socket at MASTER_PORT, if its launcher made one."""


class NoAnswerError(RuntimeError):
    """The store, or the expected writer, did not answer in time."""


class SideChannel:
    """Small JSON values by name. `open_store` comes first."""

    def __init__(self, world: World) -> None:
        self.world = world
        # Keeps apart an earlier attempt in a restarted torchrun's store, and another job at this port.
        self._prefix = "/".join(["ibq_scale", *attempt(), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")])
        self._store = _connect(is_master=False, timeout=timedelta(seconds=60))

    def another(self) -> SideChannel:
        """A second connection. A stopped store blocks all users of one connection."""
        return SideChannel(self.world)

    def put(self, name: str, value: Any) -> None:
        """Writes without waiting for an answer."""
        self._store.set(self._key(name), json.dumps(value))

    def get(self, name: str) -> Any:
        """The value of `name`, None if there is none. May block while the store's process is stopped."""
        key = self._key(name)
        return json.loads(self._store.get(key)) if self._store.check([key]) else None

    def count(self, name: str, more: int = 1) -> int:
        """Adds to a counter and returns it. The first call returns `more`. May block as `get`."""
        return int(self._store.add(self._key(name), more))

    def wait(self, name: str, seconds: float) -> Any:
        """The value of `name` as soon as there is one. NoAnswerError after `seconds`."""
        return within(seconds, lambda: self._poll(name, seconds), name)

    def until(self, name: str) -> Any:
        """The value of `name`, waited for without messages. Blocks this connection. RuntimeError if the store ends."""
        self._store.wait([self._key(name)], FOREVER)
        return self.get(name)

    def of_each_rank(self, name: str) -> list[Any]:
        """``NAME/RANK`` of all ranks, None without a value. Two round trips per rank, so for a single caller."""
        return [self.get(f"{name}/{rank}") for rank in range(self.world.size)]

    def gather(self, name: str, value: Any, decide: Callable[[list[Any]], Any], seconds: float) -> Any:
        """`decide` on rank 0 over all ranks' `value` (None for a missing rank). Every rank gets its answer.

        Not a collective of the process group, so it works with a broken device. NoAnswerError if rank 0 is silent.
        """
        self.put(f"{name}/{self.world.rank}", value)
        if self.world.is_main:
            deadline = time.monotonic() + seconds
            missing = list(range(self.world.size))
            while missing and time.monotonic() < deadline:
                missing = [rank for rank in missing if self.get(f"{name}/{rank}") is None]
                time.sleep(0.01 if missing else 0)
            self.put(f"{name}/answer", decide(self.of_each_rank(name)))
        answer = self.wait(f"{name}/answer", 2 * seconds)
        self.count(f"{name}/read")
        return answer

    def all_have_read(self, name: str, ranks: int, seconds: float) -> None:
        """On rank 0: waits at most `seconds` until `ranks` ranks have the answer of `gather`.

        Rank 0 may host the store, so after bad news it must not end first.
        """
        deadline = time.monotonic() + seconds
        while self.world.is_main and self.count(f"{name}/read", 0) < ranks and time.monotonic() < deadline:
            time.sleep(0.01)

    def _poll(self, name: str, seconds: float) -> Any:
        deadline = time.monotonic() + seconds
        while (found := self.get(name)) is None and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        return found

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}"


def open_store(world: World, timeout: timedelta) -> TCPStore:
    """The rendezvous store. Rank 0 hosts it, unless torchrun's agent does. The other ranks wait for it.

    It ends with the returned object. RuntimeError if no store answers within `timeout`. PortTakenError on the hosting
    rank if another program has the port. A single rank takes any port and writes it to MASTER_PORT.
    """
    from torch.distributed import DistNetworkError

    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not world.is_main or agent:
        return _connect(is_master=False, timeout=timeout)
    listener = os.environ.pop(LISTENER, None)
    if world.size == 1 and listener is None:
        os.environ["MASTER_PORT"] = "0"
    try:
        store = _connect(is_master=True, timeout=timeout, listener=None if listener is None else int(listener))
    except DistNetworkError as e:
        if "EADDRINUSE" not in str(e):
            raise
        raise PortTakenError(
            f"port {os.environ['MASTER_PORT']} of {os.environ['MASTER_ADDR']}, where the ranks are to meet, is another "
            "program's: set another MASTER_PORT (a job that Slurm starts again takes another one by itself)"
        ) from None
    os.environ["MASTER_PORT"] = str(store.port)
    return store


def _connect(*, is_master: bool, timeout: timedelta, listener: int | None = None) -> TCPStore:
    from torch._C._distributed_c10d import TCPStore

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # Multi-tenant, since the process group uses the same store.
    return TCPStore(
        host,
        port,
        is_master=is_master,
        wait_for_workers=False,
        timeout=timeout,
        multi_tenant=is_master,
        master_listen_fd=listener,
    )


def within(seconds: float, ask: Callable[[], T | None], what: str) -> T:
    """The answer of `ask`, called in a thread. NoAnswerError if none comes in time.

    The store's client waits forever for a stopped process. The blocked thread is then abandoned.
    """
    answers: list[T] = []
    errors: list[RuntimeError] = []

    def call() -> None:
        try:
            found = ask()
        except RuntimeError as e:
            errors.append(e)
        else:
            answers.extend([] if found is None else [found])

    thread = threading.Thread(target=call, name=f"ask for {what}", daemon=True)
    thread.start()
    thread.join(seconds)
    if not answers:
        raise NoAnswerError(f"no answer about {what}: {errors[0] if errors else f'{seconds:.0f} s are over'}")
    return answers[0]
