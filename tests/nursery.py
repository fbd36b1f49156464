"""A fork server for tests: processes that start in milliseconds.

The server imports torch, DeepSpeed and this package once, at the first request, and forks a child per request. These
imports take seconds in each rank of each test. One server serves a whole test session: the pytest controller starts it
(tests/conftest.py) and the xdist workers connect to its Unix socket.

A fork cannot show import order, import-time environment variables or hash randomization. The tests of the launchers,
the tutorial, the demo, Slurm and chaos start commands as a user does and cover these.
"""

from __future__ import annotations

import atexit
import os
import pickle
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from ibq_scale.distributed.launch import _die_with_parent
from ibq_scale.distributed.side_channel import LISTENER
from tests.ports import free_port

# Seconds that a start may take on a loaded machine.
PATIENCE = 300.0
# The environment variable with the address of the session's fork server.
ADDRESS = "IBQ_SCALE_TEST_NURSERY"
IMPORTED = (
    "pytest",
    "hypothesis",
    "torch._inductor.compile_fx",
    # The first engine imports it.
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "ibq_scale.evaluate.generation",
    "ibq_scale.evaluate.reconstruction",
    "ibq_scale.generate.images",
    "ibq_scale.train.ar_task",
    "ibq_scale.train.startup_summary",
    "ibq_scale.train.run",
    "ibq_scale.train.tokenizer_task",
)


class Request(NamedTuple):
    """What to fork. `call`: a pickled function of no arguments, whose result is the exit code."""

    call: bytes
    environ: dict[str, str]
    folder: str
    out: str
    err: str


def serve(address: str) -> None:
    """Answers pickled requests on a Unix socket: a Request with a process id, an id with its exit code or None."""
    # Children must not read the terminal.
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(64)
        imported = False
        while True:
            client, _ = listener.accept()
            with client, client.makefile("rwb") as stream:
                request = pickle.load(stream)
                if not imported:
                    _import()
                    imported = True
                if isinstance(request, int):
                    answer = _exit_code(request)
                else:
                    answer = os.fork()
                    if not answer:
                        listener.close()
                        os.close(client.fileno())
                        _end(partial(_become, request))
                pickle.dump(answer, stream)


def _import() -> None:
    for name in IMPORTED:
        import_module(name)
    # Threads are not forked.
    assert threading.active_count() == 1, threading.enumerate()


def _become(request: Request) -> object:
    """As if it had been started so."""
    _die_with_parent(os.getppid())
    os.environ.clear()
    os.environ.update(request.environ)
    os.chdir(request.folder)
    for path, standard in ((request.out, 1), (request.err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), standard)
    return pickle.loads(request.call)()


def _end(what: Callable[[], object]) -> None:
    """Calls it and leaves this process as an interpreter does, but for the frames of who forked it."""
    code: object = 1
    random.seed()
    try:
        code = what()
    except SystemExit as e:
        code = e.code
    except BaseException:
        traceback.print_exc()
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


def _command(words: Sequence[str], before: str) -> int:
    """``ibq-scale WORDS``; ranks that its launcher starts are forks of it."""
    from ibq_scale.cli.main import main
    from ibq_scale.distributed import launch

    exec(before, {})
    vars(launch)["subprocess"] = SimpleNamespace(**{**vars(subprocess), "Popen": _fork_rank})
    sys.argv = ["ibq-scale", *words]
    return main()


def _program(code: str) -> int:
    exec(code, {"__name__": "__main__"})
    return 0


class _Process:
    """What `subprocess.Popen` has, of a process that was forked here or by the nursery."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._asked = threading.Lock()

    def poll(self) -> int | None:
        """Its exit code, None while it runs."""
        # A signal handler calls this within this: the second call leaves the answer to the first, as Popen does.
        if self.returncode is None and self._asked.acquire(blocking=False):
            try:
                self.returncode = self._look()
            finally:
                self._asked.release()
        return self.returncode

    def wait(self, timeout: float = PATIENCE) -> int:
        """Its exit code, at its end. `timeout`: in seconds; raises subprocess.TimeoutExpired after that."""
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            time.sleep(0.01)
        return code

    def send_signal(self, number: int) -> None:
        """Where it runs still."""
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """Ends it, where it runs still."""
        self.send_signal(signal.SIGKILL)
        self.wait()

    def _look(self) -> int | None:
        return _exit_code(self.pid)


def _exit_code(child: int) -> int | None:
    """Of a child of this process, None while it runs."""
    pid, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if pid else None


def _fork_rank(
    command: Sequence[str], env: Mapping[str, str], pass_fds: Sequence[int], preexec_fn: Callable[[], None]
) -> _Process:
    """A rank as `ibq_scale.distributed.launch` starts it: ``python -m ibq_scale WORDS``."""
    begun, words = list(command[:3]), command[3:]
    assert begun == [sys.executable, "-m", "ibq_scale"]
    if pid := os.fork():
        return _Process(pid)
    # A new program has no handlers of the old one.
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if not pass_fds:
        os.close(int(env[LISTENER]))
    preexec_fn()
    environ = dict(env)
    os.environ.clear()
    os.environ.update(environ)
    _end(partial(_command, words, ""))
    raise AssertionError


class Forked(_Process):
    """A process of the nursery. `out` and `err`: files of what it prints."""

    def __init__(self, nursery: Nursery, pid: int, out: Path, err: Path) -> None:
        super().__init__(pid)
        self._nursery = nursery
        self.out = out
        self.err = err

    def said(self) -> str:
        """All that it printed, standard output first."""
        return self.out.read_text() + self.err.read_text()

    def wait(self, timeout: float = PATIENCE) -> int:
        """As of any process, but that what it printed is shown where it does not end."""
        try:
            return super().wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(self.said()) from None

    def communicate(self, timeout: float = PATIENCE) -> tuple[str, str]:
        """What it printed on standard output and on standard error, at its end."""
        self.wait(timeout)
        return self.out.read_text(), self.err.read_text()

    def _look(self) -> int | None:
        return self._nursery.ask(self.pid)


class Nursery:
    """A client of the fork server at `address`."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._logs = Path(tempfile.mkdtemp(prefix="nursery-logs-"))
        atexit.register(shutil.rmtree, self._logs, ignore_errors=True)
        self._count = 0

    def start(self, call: Callable[[], object], environ: Mapping[str, str]) -> Forked:
        """A process that calls this, a picklable function whose result is the exit code, with `environ` and no more."""
        self._count += 1
        out, err = (self._logs / f"{self._count}.{name}" for name in ("out", "err"))
        out.touch()
        err.touch()
        pid = self.ask(Request(pickle.dumps(call), dict(environ), str(Path.cwd()), str(out), str(err)))
        assert pid is not None
        return Forked(self, pid, out, err)

    def ask(self, request: Request | int) -> int | None:
        """The server's answer."""
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(self._address)
            with client.makefile("rwb") as stream:
                pickle.dump(request, stream)
                stream.flush()
                answer: int | None = pickle.load(stream)
        return answer


@contextmanager
def server() -> Iterator[str]:
    """Runs a fork server; yields the address of its socket. The server and its children end with this context."""
    folder = tempfile.mkdtemp(prefix="nursery-")
    address = f"{folder}/socket"
    environ = os.environ | {"DS_ACCELERATOR": os.environ.get("DS_ACCELERATOR", "cpu")}
    process = subprocess.Popen(
        [sys.executable, "-c", f"from {__name__} import serve; serve({address!r})"],
        env=environ,
        preexec_fn=partial(_die_with_parent, os.getpid()),
    )
    try:
        deadline = time.monotonic() + PATIENCE
        while not Path(address).exists():
            assert process.poll() is None, "the fork server ended"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield address
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


@lru_cache(1)
def nursery() -> Nursery:
    """The session's fork server, or outside of pytest one of this process."""
    if ADDRESS in os.environ:
        return Nursery(os.environ[ADDRESS])
    own = server()
    address = own.__enter__()
    atexit.register(own.__exit__, None, None, None)
    return Nursery(address)


def rank_environ(ranks: int) -> list[dict[str, str]]:
    """The environment of each rank on this node as another launcher than this package's sets it."""
    shared = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    return [os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def command(words: Sequence[str], environ: Mapping[str, str] = os.environ, before: str = "") -> Forked:
    """Starts ``ibq-scale WORDS``, under its own launcher where it wants one. `before`: code that runs in it first."""
    return nursery().start(partial(_command, list(words), before), environ)


def program(code: str, environ: Mapping[str, str] = os.environ) -> Forked:
    """Starts ``python -c CODE``."""
    return nursery().start(partial(_program, code), environ)


def run(words: Sequence[str], environ: Mapping[str, str] = os.environ) -> subprocess.CompletedProcess[str]:
    """``ibq-scale WORDS``, to its end."""
    process = command(words, environ)
    try:
        out, err = process.communicate()
    finally:
        process.kill()
    return subprocess.CompletedProcess(list(words), process.wait(), out, err)


def commands(words: Sequence[str], ranks: int, before: str = "") -> list[Forked]:
    """Starts ``ibq-scale WORDS`` on so many ranks, as srun does."""
    return [command(words, environ, before) for environ in rank_environ(ranks)]
