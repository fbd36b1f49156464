"""Downloads over a real HTTP server that misbehaves: whole and verified, or not there at all."""

from __future__ import annotations

import socket
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from threading import Event

import pytest

from ibq_scale import download as module
from ibq_scale.download import NoNetworkError, download
from ibq_scale.errors import UserError
from tests.web import CONTENT, SHA256, WebServer, send


def _fetch(server: WebServer, folder: Path) -> None:
    download(server.url, folder / "weights.pth", SHA256[:8])
    assert [p.name for p in folder.iterdir()] == ["weights.pth"]
    assert (folder / "weights.pth").read_bytes() == CONTENT


def _refused(server: WebServer, folder: Path, said: str, prefix: str = SHA256[:8]) -> None:
    with pytest.raises(UserError, match=said):
        download(server.url, folder / "weights.pth", prefix)
    assert list(folder.iterdir()) == []
    assert socket.getdefaulttimeout() is None


def test_a_whole_file(web_server: WebServer, tmp_path: Path) -> None:
    _fetch(web_server, tmp_path)
    assert web_server.requests == 1
    # Others of the group may read it: an ordinary file, by the umask.
    (tmp_path / "ordinary").touch()
    assert (tmp_path / "weights.pth").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_a_cut_or_damaged_file_is_fetched_again(web_server: WebServer, tmp_path: Path) -> None:
    bodies = [CONTENT[:1000], b"x" * len(CONTENT), CONTENT]
    web_server.behave = lambda handler, request: send(handler, bodies[request - 1], declared=len(CONTENT))
    _fetch(web_server, tmp_path)
    assert web_server.requests == 3


def test_passing_troubles_are_tried_again(web_server: WebServer, tmp_path: Path) -> None:
    def busy(handler: BaseHTTPRequestHandler, request: int) -> None:
        if request == 1:
            send(handler, b"", 503)
        elif request == 2:
            handler.connection.shutdown(socket.SHUT_RDWR)
        else:
            send(handler, CONTENT)

    web_server.behave = busy
    _fetch(web_server, tmp_path)
    assert web_server.requests == 3


def test_a_redirect_is_followed(web_server: WebServer, tmp_path: Path) -> None:
    def elsewhere(handler: BaseHTTPRequestHandler, request: int) -> None:
        if handler.path == "/weights.pth":
            handler.send_response(302)
            handler.send_header("Location", "/elsewhere")
            handler.send_header("Content-Length", "0")
            handler.end_headers()
        else:
            send(handler, CONTENT)

    web_server.behave = elsewhere
    _fetch(web_server, tmp_path)


def test_another_file_is_refused(web_server: WebServer, tmp_path: Path) -> None:
    web_server.behave = lambda handler, _: send(handler, b"<html>please log in</html>")
    _refused(web_server, tmp_path, 'not the whole published file: .*expected "00000000", got', "0" * 8)


def test_an_absent_file_is_refused_at_once(web_server: WebServer, tmp_path: Path) -> None:
    web_server.behave = lambda handler, _: send(handler, b"", 404)
    _refused(web_server, tmp_path, "is answered with 404 Not Found")
    assert web_server.requests == 1


def test_a_server_that_never_recovers(web_server: WebServer, tmp_path: Path) -> None:
    web_server.behave = lambda handler, _: send(handler, b"", 503)
    _refused(web_server, tmp_path, "cannot fetch .*: 503 Service Unavailable")
    assert web_server.requests == module.ATTEMPTS


def test_a_stalled_server_is_given_up(web_server: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TIMEOUT_S", 0.2)
    monkeypatch.setattr(module, "ATTEMPTS", 2)
    end = Event()

    def stall(handler: BaseHTTPRequestHandler, request: int) -> None:
        send(handler, b"x", declared=len(CONTENT))
        handler.wfile.flush()
        end.wait(10)

    web_server.behave = stall
    _refused(web_server, tmp_path, "timed out")
    end.set()


def test_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/x"
        with pytest.raises(NoNetworkError, match=r"cannot reach 127\.0\.0\.1:\d+ \(Connection refused\): no internet"):
            download(url, tmp_path / "x", "0")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(web_server: WebServer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot write .*No such file"):
        download(web_server.url, tmp_path / "absent/x", SHA256[:8])
