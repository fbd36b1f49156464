"""A run's state for Prometheus: an OpenMetrics page over HTTP, and a text file for node_exporter. From rank 0.

Values are those of the last line of metrics.jsonl. The heartbeat and the newest checkpoint are read when asked for.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingTCPServer
from threading import Event, Lock, Thread
from typing import Any

from prometheus_client import write_to_textfile
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.openmetrics.exposition import CONTENT_TYPE_LATEST, generate_latest

from ibq_scale import __version__
from ibq_scale.checkpoint.reading import MANIFEST
from ibq_scale.config.run import AnyRun
from ibq_scale.documents import json_object
from ibq_scale.errors import UserError
from ibq_scale.supervise.dashboards import Dashboard
from ibq_scale.supervise.watchdog import BEAT_SECONDS

# Seconds between two versions of the text file, and the limit for a request.
EVERY_SECONDS, REQUEST_SECONDS = 15.0, 10.0
# By family: the key of a line, the help.
OF_LINES = {
    "samples_per_second": ("samples_per_s", "Images a second over all ranks."),
    "step_seconds": ("step_s", "Seconds a step."),
    "data_wait_ratio": ("data_wait", "Share of a step spent waiting for data."),
    "memory_bytes": ("memory_bytes", "Peak memory of the largest rank."),
    "loss": ("loss", "Mean loss since the line before."),
}

Kind = type[GaugeMetricFamily] | type[CounterMetricFamily]


class _Server(ThreadingTCPServer):
    """Unlike `HTTPServer` it does not ask for this host's name, which may wait for a DNS server."""

    allow_reuse_address = daemon_threads = True


class OpenMetrics(Dashboard):
    """A `Dashboard`: it serves `metrics.port` and writes `metrics.textfile`. UserError if the port is taken."""

    def __init__(self, run_dir: Path, config: AnyRun) -> None:
        self._run_dir = run_dir
        self._config = config
        self._line: Mapping[str, Any] = {}
        self._alarms = self._skipped = 0
        self._lock = Lock()
        self._closed = Event()
        settings = config.metrics
        self._textfile = settings.textfile
        self._server = None if settings.port is None else self._serve(settings.host, settings.port)
        if self._textfile is not None:
            Thread(target=self._write_often, name="metrics text file", daemon=True).start()

    def values(self, step: int, line: Mapping[str, Any]) -> None:
        self._line = line
        self._skipped += int(line.get("skipped", 0))
        self._write()

    def alarm(self, step: int, text: str) -> None:
        self._alarms += 1

    def close(self) -> None:
        self._closed.set()
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
        self._write()

    def collect(self) -> Iterator[Metric]:
        """The families now, each with one sample. This makes it a collector of prometheus_client."""
        line, train = self._line, self._config.train
        beat, running = json_object(self._run_dir / "heartbeat.json"), not self._closed.is_set()
        yield self._one("info", "The run.", 1, task=self._config.task, version=__version__)
        yield self._one("running", "1 until the run ends.", running)
        yield self._one("step", "Optimizer steps done.", max(line.get("step", 0), beat.get("step", 0)))
        yield self._one("steps_planned", "Optimizer steps of the whole run.", train.total_steps)
        for name, (key, about) in OF_LINES.items():
            if key in line:
                yield self._one(name, about, line[key])
        yield self._one("alarms", "Alarms since this start.", self._alarms, CounterMetricFamily)
        yield self._one(
            "skipped_steps", "Steps applied on no rank since this start.", self._skipped, CounterMetricFamily
        )
        if beat:
            # A heartbeat that stopped counts as none.
            age = time.time() - beat["time"]
            idle = beat["idle_s"] + (age if age > 2 * BEAT_SECONDS else 0.0)
            yield self._one("idle_seconds", "Seconds without progress, up to a heartbeat old.", idle)
            yield self._one("healthy", "1 while rank 0 makes progress.", running and idle < train.hang_timeout)
        folder = self._run_dir / "checkpoints"
        with suppress(OSError, ValueError):
            name = (folder / "latest").read_text(encoding="utf-8").strip()
            age = max(0.0, time.time() - (folder / name / MANIFEST).stat().st_mtime)
            yield self._one("checkpoint_step", "Step of the newest checkpoint.", int(name.removeprefix("step-")))
            yield self._one("checkpoint_age_seconds", "Age of the newest checkpoint.", age)

    def _one(self, name: str, about: str, value: float, kind: Kind = GaugeMetricFamily, **labels: str) -> Metric:
        """`labels`: in addition to the run's name, by which files of several runs differ."""
        family = kind(f"ibq_scale_{name}", about, labels=["run", *labels])
        family.add_metric([self._config.name, *labels.values()], value)
        return family

    def _serve(self, host: str, port: int) -> ThreadingTCPServer:
        run = self

        class Handler(BaseHTTPRequestHandler):
            timeout = REQUEST_SECONDS

            def do_GET(self) -> None:
                if self.path.partition("?")[0] != "/metrics":
                    self.send_error(404, "the metrics are at /metrics")
                    return
                page = generate_latest(run)  # type: ignore[no-untyped-call]
                self.send_response(200)
                self.send_header("Content-Type", CONTENT_TYPE_LATEST)
                self.end_headers()
                self.wfile.write(page)

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
            # `values` raises the same error at the next logged line.
            with suppress(OSError):
                self._write()

    def _write(self) -> None:
        """The file in the older text format, the only one that node_exporter reads."""
        if self._textfile is not None:
            with self._lock:
                write_to_textfile(self._textfile, self)
