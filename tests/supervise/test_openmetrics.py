"""Prometheus reads a run's state from a port or a file. Neither can end the run."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import urlopen

import pytest
from prometheus_client import generate_latest

from ibq_scale.config.layers import resolve
from ibq_scale.supervise.metrics import MetricsLog
from ibq_scale.supervise.openmetrics import OpenMetrics
from tests.docs.pages import ROOT
from tests.ports import free_port
from tests.services.prometheus import missing_packages
from tests.train.runs import ENDLESS, launched, lines, wait_until

LINE = {"step": 10, "samples_per_s": 12.5, "step_s": 0.5, "data_wait": 0.01, "memory_bytes": 2e9, "loss": 1.5}
LINE["skipped"] = 2.0
PANEL = ROOT / "docs/grafana.json"


def _run_dir(folder: Path) -> Path:
    (folder / "checkpoints/step-00000008").mkdir(parents=True)
    (folder / "checkpoints/step-00000008/manifest.json").touch()
    (folder / "checkpoints/latest").write_text("step-00000008\n")
    (folder / "heartbeat.json").write_text(json.dumps({"step": 12, "time": time.time(), "idle_s": 3.0}))
    return folder


def _open(folder: Path, *overrides: str) -> OpenMetrics:
    return OpenMetrics(folder, resolve("tokenizer/tiny", ["data.train=x", 'name=a"b\\c', *overrides]).config)


def _page(shown: OpenMetrics) -> str:
    return generate_latest(shown).decode()


def _samples(text: str) -> dict[str, float]:
    """By name, without labels."""
    found = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
    return {name.partition("{")[0]: float(value) for name, _, value in found}


def test_a_page_and_a_file_hold_the_runs_state(tmp_path: Path) -> None:
    port, file, begin = free_port(), tmp_path / "run.prom", time.time()
    shown = _open(_run_dir(tmp_path / "run"), f"metrics.port={port}", f"metrics.textfile={file}")
    shown.values(10, LINE)
    shown.alarm(10, "loss jumped")
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as response:
        page = response.read().decode()
        assert response.headers["Content-Type"] == "application/openmetrics-text; version=1.0.0; charset=utf-8"
    with pytest.raises(HTTPError, match="404"):
        urlopen(f"http://127.0.0.1:{port}/", timeout=30)
    shown.close()
    assert page.endswith("# EOF\n")
    assert 'ibq_scale_info{run="a\\"b\\\\c",task="tokenizer",version="' in page
    assert "# TYPE ibq_scale_alarms counter\nibq_scale_alarms_total{run=" in page
    values = _samples(page)
    expected = {"running": 1, "step": 12, "samples_per_second": 12.5, "data_wait_ratio": 0.01, "memory_bytes": 2e9}
    expected |= {"checkpoint_step": 8, "alarms_total": 1, "skipped_steps_total": 2, "healthy": 1}
    assert expected == {name: values[f"ibq_scale_{name}"] for name in expected}
    assert 3.0 <= values["ibq_scale_idle_seconds"] <= 3.0 + time.time() - begin
    assert values["ibq_scale_checkpoint_age_seconds"] >= 0
    # The older format, and the run has ended.
    assert "# TYPE ibq_scale_alarms_total counter\nibq_scale_alarms_total{run=" in file.read_text()
    assert _samples(file.read_text())["ibq_scale_running"] == 0
    assert _samples(file.read_text())["ibq_scale_healthy"] == 0


def test_a_taken_port_and_a_missing_folder_cost_a_line_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        words = [f"metrics.port={taken.getsockname()[1]}", "data.train=x"]
        MetricsLog(tmp_path, resolve("tokenizer/tiny", words).config, 0).close()
    assert capsys.readouterr().err.count("Address already in use") == 1
    shown = MetricsLog(
        tmp_path, resolve("tokenizer/tiny", ["data.train=x", f"metrics.textfile={tmp_path}/missing/run.prom"]).config, 0
    )
    for step in (10, 20, 30):
        shown.write(step, 16 * step, LINE, ("loss",))
    shown.close()
    assert caplog.text.count(f"{tmp_path}/missing/run.prom") == 1


def test_a_silent_heartbeat_is_no_health(tmp_path: Path) -> None:
    shown = _open(_run_dir(tmp_path))
    (tmp_path / "heartbeat.json").write_text(json.dumps({"step": 12, "time": time.time() - 5000, "idle_s": 3.0}))
    assert _samples(_page(shown))["ibq_scale_healthy"] == 0
    (tmp_path / "heartbeat.json").write_text("[")
    assert "ibq_scale_healthy" not in _page(shown)


def test_the_panel_asks_for_what_a_run_shows(tmp_path: Path) -> None:
    shown = _open(_run_dir(tmp_path))
    shown.values(10, LINE)
    known = set(_samples(_page(shown)))
    board = json.loads(PANEL.read_text())
    assert {"title", "uid", "schemaVersion", "templating", "panels"} <= board.keys()
    asked = " ".join(target["expr"] for panel in board["panels"] for target in panel["targets"])
    assert set(re.findall(r"ibq_scale_\w+", asked)) == known - {"ibq_scale_info", "ibq_scale_running"}
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    places = [(p["gridPos"]["x"], p["gridPos"]["y"], p["gridPos"]["w"], p["gridPos"]["h"]) for p in board["panels"]]
    assert all(x + w <= 24 for x, _, w, _ in places)


def _ask(port: int, query: str) -> list[Any]:
    with urlopen(f"http://127.0.0.1:{port}/api/v1/query?query={quote(query)}", timeout=30) as response:
        result: list[Any] = json.load(response)["data"]["result"]
    return result


def _eventually(found: Callable[[], list[Any]]) -> list[Any]:
    answer: list[Any] = []

    def ready() -> bool:
        nonlocal answer
        try:
            answer = found()
        except OSError:
            return False
        return bool(answer)

    wait_until(ready)
    return answer


@pytest.mark.services
@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.skipif(bool(missing_packages()), reason="needs Debian's prometheus: make services")
def test_a_real_prometheus_scrapes_a_running_training(dataset: str, tmp_path: Path) -> None:
    port, own, file, run = free_port(), free_port(), tmp_path / "run.prom", tmp_path / "run"
    (scrape,) = re.findall(r"```yaml\n(scrape_configs:.*?)```", (ROOT / "docs/operators.md").read_text(), re.DOTALL)
    settings = tmp_path / "prometheus.yml"
    settings.write_text(re.sub(r"node\d+:\d+", f"127.0.0.1:{port}", scrape).replace("15s", "1s"))
    subprocess.run(["promtool", "check", "config", settings], check=True)
    command = ["prometheus", f"--config.file={settings}", f"--storage.tsdb.path={tmp_path}/db"]
    server = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{own}"])
    more = (f"metrics.port={port}", f"metrics.textfile={file}", "train.checkpoint_every=2")
    try:
        with launched(dataset, run, *ENDLESS, *more) as trainer:
            wait_until(lambda: len(lines(run)) > 3, trainer)
            steps = _eventually(lambda: _ask(own, "ibq_scale_step > 2"))
            assert float(steps[0]["value"][1]) <= lines(run)[-1]["step"] + 1
            assert _ask(own, "up")[0]["value"][1] == "1"
            assert _eventually(lambda: _ask(own, "ibq_scale_checkpoint_age_seconds < 600"))
            assert _ask(own, "ibq_scale_healthy")[0]["value"][1] == "1"
            for panel in json.loads(PANEL.read_text())["panels"]:
                for target in panel["targets"]:
                    expression = target["expr"].replace("$run", ".*")
                    _eventually(lambda e=expression: _ask(own, e))  # type: ignore[misc]
        with file.open() as text:
            subprocess.run(["promtool", "check", "metrics"], stdin=text, check=True)
    finally:
        server.kill()
        server.wait()
