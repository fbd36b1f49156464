"""Training commands that start in a second: forked from a process that has imported what they need, and no more."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ibq_scale.distributed.environment import free_port
from tests.train.runs import PATIENCE


def _serve() -> None:
    """A line of JSON a request: what to start, or a process to look at; a line each in answer."""
    # What is imported prints there.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # The first engine imports it, and torch's compiler with it.
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401

    import ibq_scale.train.run
    import ibq_scale.train.tokenizer_task  # noqa: F401

    for line in sys.stdin:
        request = json.loads(line)
        if "pid" in request:
            pid, status = os.waitpid(request["pid"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if not answer:
                _become(**request)
        print(json.dumps(answer), file=answers, flush=True)


def _become(words: list[str], environ: dict[str, str], log: str) -> None:
    """The command, as if it had been started so."""
    from ibq_scale.cli.main import main

    os.environ.clear()
    os.environ.update(environ)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(file, standard)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = ["ibq-scale", *words]
    sys.exit(main())


class Forked:
    """A rank of a command, with what `subprocess.Popen` has. What it prints, to whichever stream, is in `log`."""

    def __init__(self, nursery: Nursery, pid: int, log: Path) -> None:
        self._nursery = nursery
        self.pid = pid
        self.log = log
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Its exit code, None while it runs."""
        if self.returncode is None:
            self.returncode = self._nursery.ask({"pid": self.pid})
        return self.returncode

    def wait(self, timeout: float = PATIENCE) -> int:
        """Its exit code, at its end."""
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)
        return code

    def communicate(self, timeout: float = PATIENCE) -> tuple[str, str]:
        """Nothing, and all that it printed, at its end."""
        self.wait(timeout)
        return "", self.log.read_text()

    def send_signal(self, number: int) -> None:
        """Where it runs still."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Ends it, where it runs still."""
        self.send_signal(signal.SIGKILL)
        self.wait()


class Nursery:
    """Starts commands, each rank as a launcher would have started it. `logs`: a folder for what they print."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._started: list[Forked] = []
        command = [sys.executable, "-c", f"from {__name__} import _serve; _serve()"]
        self._server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def start(self, words: Sequence[str], ranks: int = 1) -> list[Forked]:
        """``ibq-scale WORDS`` on so many ranks."""
        shared = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
        shared |= {"MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
        begun = []
        for rank in map(str, range(ranks)):
            log = self._logs / f"{len(self._started)}.log"
            environ = os.environ | shared | {"RANK": rank, "LOCAL_RANK": rank}
            pid = self.ask({"words": list(words), "environ": dict(environ), "log": str(log)})
            assert pid is not None
            log.touch()
            begun.append(Forked(self, pid, log))
            self._started.append(begun[-1])
        return begun

    def ask(self, request: dict[str, object]) -> int | None:
        """What the server answers."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        print(json.dumps(request), file=self._server.stdin, flush=True)
        answer: int | None = json.loads(self._server.stdout.readline())
        return answer

    def close(self) -> None:
        """Ends whatever it started."""
        for process in self._started:
            process.kill()
        self._server.kill()
        self._server.wait()
