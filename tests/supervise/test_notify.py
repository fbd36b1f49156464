"""`notify`: any surviving rank sends one notice at the end of an attempt. Exits are not delayed, secrets not logged."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch

from ibq_scale.cli.main import main
from ibq_scale.config.layers import load_resolved, resolve, to_yaml
from ibq_scale.config.secrets import masked
from ibq_scale.distributed.world import World
from ibq_scale.supervise import notify
from ibq_scale.supervise.notify import EVENTS, Notices, deliver
from tests.nursery import run as run_command
from tests.ranks import run_ranks
from tests.train.runs import ENDLESS, each_rank, lines, wait_until, words

SECRET = "T0/B0/verysecret"


class _Hook(HTTPServer):
    """A webhook. `told`: the bodies of its requests."""

    def __init__(self) -> None:
        self.told: list[dict[str, Any]] = []
        told = self.told

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                told.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(500 if "broken" in self.path else 200)
                self.end_headers()

            def log_message(self, *_: object) -> None: ...

        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"


@pytest.fixture
def hook() -> Iterator[_Hook]:
    server = _Hook()
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_notice_reaches_addresses_and_commands_and_its_faults_name_no_secret(hook: _Hook, tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "heartbeat.json").write_text('{"step": 12}')
    out = tmp_path / "out"
    command = f'cat > {out}.json; echo "$IBQ_SCALE_EVENT $IBQ_SCALE_CODE $IBQ_SCALE_STEP" > {out}.env'
    targets = [f"{hook.url}/{SECRET}", f"{hook.url}/broken/{SECRET}", command, "echo no TOKEN=abc >&2; exit 3"]
    facts = {"run": "tok", "event": "hang", "code": 70, "host": "n1", "reason": "x", "run_dir": str(tmp_path)}
    request = {"targets": targets, "facts": facts | {"time": "now"}, "token": "a", "delay": 0}
    deliver(**request)
    deliver(**request)
    assert len(hook.told) == 2, "one notice, to two addresses"
    assert hook.told[0]["text"] == "tok: hang at step 12 on n1: x"
    assert json.loads(Path(f"{out}.json").read_text()) == hook.told[0]
    assert Path(f"{out}.env").read_text() == "hang 70 12\n"
    said = (tmp_path / "logs/notify.log").read_text()
    assert "HTTP Error 500" in said
    assert "exit code 3 no TOKEN=…" in said
    assert SECRET not in said


def test_no_file_keeps_an_address(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    address = f"https://hooks.example/{SECRET}"
    command = f"curl -H 'Authorization: Bearer abc' https://hooks.example/{SECRET}"
    config = resolve("ar/tiny", ["data.train=x", f"notify=['{address}', \"{command}\", $HOOK]"]).config
    assert config.notify[1] == command
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    kept = load_resolved(tmp_path / "config.yaml").notify
    assert kept == ("https://hooks.example/…", "curl -H 'Authorization: Bearer …' https://hooks.example/…", "$HOOK")
    assert masked("python tell.py --to me") == "python tell.py --to me"
    assert main(["submit", "ar/tiny", "data.train=x", f"notify={address}", "--nodes", "1", "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert "notify='$NAME'" in said
    assert SECRET not in said
    assert resolve("ar/tiny", ["notify=null"]).config.notify == ()
    assert set(EVENTS) == {0, 69, 70, 71, 75, 76}


def _fail_on_two_ranks(rank: int, size: int, folder: Path, sleeper: str) -> float:
    world = World(rank, size, rank, torch.device("cpu"))
    config = resolve("ar/tiny", ["data.train=x", f"out={folder}", f'notify=["echo $IBQ_SCALE_RANK >> {folder}/told"]'])
    notices = Notices(config.config, world)
    notices.share()
    # The second rank knows the cause, the first one loses its connection.
    notices.ended(1, "broken", follows=rank == 0)
    notices.ended(1, "again")
    hanging = Notices(resolve("ar/tiny", ["data.train=x", f"out={folder}", f"notify={sleeper}"]).config, world)
    hanging.share()
    begin = time.monotonic()
    notify.WAIT_SECONDS = 0.2
    hanging.ended(0, "done")
    return time.monotonic() - begin


@pytest.mark.slow
@pytest.mark.distributed
def test_the_rank_with_the_cause_sends_one_notice_and_a_hanging_command_is_left_behind(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    waited = run_ranks(_fail_on_two_ranks, 2, tmp_path, f"echo $$ > {tmp_path}/pid; sleep 1000")
    # A thousand seconds of the command, were it waited for.
    assert max(waited) < 500
    assert (tmp_path / "told").read_text() == "1\n"
    pid = tmp_path / "pid"
    wait_until(lambda: pid.is_file() and pid.read_text().strip() != "")
    os.killpg(int(pid.read_text()), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.distributed
def test_runs_tell_of_their_end(dataset: str, hook: _Hook, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOOK", f"{hook.url}/{SECRET}")
    monkeypatch.setattr(notify, "WAIT_SECONDS", 60.0)
    patient = "from ibq_scale.supervise import notify; notify.WAIT_SECONDS = 60"
    run = tmp_path / "run"
    with each_rank(dataset, run, *ENDLESS, "notify=$HOOK", before=patient) as ranks:
        wait_until(lambda: len(lines(run)) > 1, *ranks)
        ranks[1].send_signal(signal.SIGTERM)
        assert [rank.wait() for rank in ranks] == [75, 75]
    wait_until(lambda: len(hook.told) == 1)
    with each_rank(dataset, run, *ENDLESS, "notify=$HOOK", before=patient) as ranks:
        wait_until(lambda: lines(run)[-1]["step"] > hook.told[0]["step"] + 1, *ranks)
        ranks[0].send_signal(signal.SIGKILL)
        assert ranks[1].wait() == 1
    wait_until(lambda: len(hook.told) == 2)
    done = run_command([*words(dataset, run, "train.steps=1", f"notify={hook.url}/{SECRET}"), "--ranks", "2"])
    assert done.returncode == 0, done.stderr
    wait_until(lambda: len(hook.told) == 3)
    assert [(told["event"], told["code"], told["rank"]) for told in hook.told] == [
        ("requeue", 75, 0),
        ("failure", 1, 1),
        ("done", 0, 0),
    ]
    left = [path for path in run.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert left == []
    assert run_command([*words(dataset, run, "notify=$NOWHERE"), "--ranks", "1"]).returncode == 2
