"""A run's state for Prometheus: an OpenMetrics page over HTTP, and a text file for node_exporter. From rank 0.

Values are those of the last line of metrics.jsonl. The heartbeat and the newest checkpoint are read when asked for.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import TCPServer
from threading import Event, Lock, Thread
from types import MappingProxyType
from typing import Any, NamedTuple

from ibq_scale import __version__
from ibq_scale.checkpoint.files import write_whole
from ibq_scale.checkpoint.reading import MANIFEST, STEP_NAME
from ibq_scale.config.run import AnyRun
from ibq_scale.documents import json_object
from ibq_scale.errors import UserError
from ibq_scale.supervise.dashboards import Dashboard

# Seconds between two versions of the text file, and the limit for a request.
EVERY_SECONDS, REQUEST_SECONDS = 15.0, 10.0
# A heartbeat is written at least this often.
BEAT_SECONDS = 30.0
ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})
OPEN_METRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"
# By family: the key of a line, the help.
OF_LINES = {
    "samples_per_second": ("samples_per_s", "Images a second over all ranks."),
    "step_seconds": ("step_s", "Seconds a step."),
    "data_wait_ratio": ("data_wait", "Share of a step spent waiting for data."),
    "memory_bytes": ("memory_bytes", "Peak memory of the largest rank."),
    "loss": ("loss", "Mean loss since the line before."),
}

log = logging.getLogger(__name__)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def server_bind(self) -> None:
        """Without the base's search for this host's name, which may wait for a DNS server."""
        TCPServer.server_bind(self)


class Family(NamedTuple):
    """A metric with its one sample. `labels`: in addition to the run's name, by which files of several runs differ."""

    name: str
    kind: str
    help: str
    value: float
    labels: Mapping[str, str] = MappingProxyType({})


class OpenMetrics(Dashboard):
    """A `Dashboard`: it serves `metrics.port` and writes `metrics.textfile`. UserError if the port is taken."""

    def __init__(self, run_dir: Path, config: AnyRun) -> None:
        self._run_dir = run_dir
        self._config = config
        self._line: Mapping[str, Any] = {}
        self._alarms = self._skipped = 0
        self._running = 1
        self._told = False
        self._lock = Lock()
        self._closed = Event()
        settings = config.metrics
        self._textfile = None if settings.textfile is None else Path(settings.textfile)
        self._server = None if settings.port is None else self._serve(settings.host, settings.port)
        if self._textfile is not None:
            Thread(target=self._write_often, name="metrics text file", daemon=True).start()

    def values(self, step: int, line: Mapping[str, Any]) -> None:
        with self._lock:
            self._line = line
            self._skipped += int(line.get("skipped", 0))
        self._write()

    def alarm(self, step: int, text: str) -> None:
        self._alarms += 1

    def close(self) -> None:
        self._running = 0
        self._closed.set()
        self._write()
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()

    def page(self) -> str:
        return _text(self._families(), self._config.name, "") + "# EOF\n"

    def _serve(self, host: str, port: int) -> ThreadingHTTPServer:
        page = self.page

        class Handler(BaseHTTPRequestHandler):
            timeout = REQUEST_SECONDS

            def do_GET(self) -> None:
                found = self.path.partition("?")[0] == "/metrics"
                body = page().encode() if found else b"the metrics are at /metrics\n"
                self.send_response(200 if found else 404)
                self.send_header("Content-Type", OPEN_METRICS if found else "text/plain")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Nothing: a scraper asks every few seconds."""

        try:
            server = _Server((host, port), Handler)
        except OSError as e:
            raise UserError(
                f"metrics.port={port} on {host} cannot be opened ({e.strerror}): no metrics there"
            ) from None
        Thread(target=server.serve_forever, name="metrics server", daemon=True).start()
        return server

    def _write_often(self) -> None:
        while not self._closed.wait(EVERY_SECONDS):
            self._write()

    def _write(self) -> None:
        """The file in the older text format, the only one that node_exporter reads."""
        if self._textfile is None:
            return
        with self._lock:
            try:
                write_whole(self._textfile, _text(self._families(), self._config.name, "_total"))
                self._told = False
            except OSError as e:
                if not self._told:
                    log.warning("could not write %s: %s", self._textfile, e)
                self._told = True

    def _families(self) -> Iterator[Family]:
        line, train = self._line, self._config.train
        beat = json_object(self._run_dir / "heartbeat.json")
        yield Family("info", "gauge", "The run.", 1, {"task": self._config.task, "version": __version__})
        yield Family("running", "gauge", "1 until the run ends.", self._running)
        steps = [value for value in (line.get("step"), beat.get("step")) if isinstance(value, int)]
        yield Family("step", "gauge", "Optimizer steps done.", max(steps, default=0))
        yield Family("steps_planned", "gauge", "Optimizer steps of the whole run.", train.total_steps)
        for name, (key, about) in OF_LINES.items():
            if isinstance(line.get(key), (int, float)):
                yield Family(name, "gauge", about, line[key])
        yield Family("alarms", "counter", "Alarms since this start.", self._alarms)
        yield Family("skipped_steps", "counter", "Steps applied on no rank since this start.", self._skipped)
        idle = _idle(beat)
        if idle is not None:
            yield Family("idle_seconds", "gauge", "Seconds without progress, up to a heartbeat old.", idle)
            healthy = bool(self._running) and idle < train.hang_timeout
            yield Family("healthy", "gauge", "1 while rank 0 makes progress.", int(healthy))
        saved = _newest(self._run_dir / "checkpoints")
        if saved is not None:
            step, age = saved
            yield Family("checkpoint_step", "gauge", "Step of the newest checkpoint.", step)
            yield Family("checkpoint_age_seconds", "gauge", "Age of the newest checkpoint.", age)


def _idle(beat: Mapping[str, Any]) -> float | None:
    """Seconds since the last progress. A heartbeat that stopped counts as none."""
    try:
        age = max(0.0, time.time() - float(beat["time"]))
        return float(beat["idle_s"]) + (age if age > 2 * BEAT_SECONDS else 0.0)
    except (KeyError, TypeError, ValueError):
        return None


def _newest(folder: Path) -> tuple[int, float] | None:
    """Step and age in seconds of the checkpoint that `latest` names."""
    try:
        name = (folder / "latest").read_text(encoding="utf-8").strip()
        found = STEP_NAME.fullmatch(name)
        age = time.time() - (folder / name / MANIFEST).stat().st_mtime
    except (OSError, UnicodeDecodeError):
        return None
    return None if found is None else (int(found[1]), max(0.0, age))


def _text(families: Iterator[Family], run: str, counter: str) -> str:
    """`counter`: the ending of a counter's family, which the older format has in every line."""
    lines = []
    for family in families:
        name = f"ibq_scale_{family.name}"
        is_counter = family.kind == "counter"
        values = {"run": run, **family.labels}
        labels = ",".join(f'{key}="{value.translate(ESCAPES)}"' for key, value in values.items())
        lines.append(f"# HELP {name}{counter * is_counter} {family.help}")
        lines.append(f"# TYPE {name}{counter * is_counter} {family.kind}")
        lines.append(f"{name}{'_total' * is_counter}{{{labels}}} {float(family.value)!r}")
    return "".join(f"{line}\n" for line in lines)
