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
from tests.web import CONTENT, SHA256, WebServer, rest, send


def _fetch(server: WebServer, folder: Path, prefix: str = SHA256[:8]) -> list[tuple[int, int | None]]:
    seen: list[tuple[int, int | None]] = []
    download(server.url, folder / "weights.pth", prefix, lambda have, whole: seen.append((have, whole)))
    assert [p.name for p in folder.iterdir()] == ["weights.pth"]
    assert (folder / "weights.pth").read_bytes() == CONTENT
    return seen


def _refused(server: WebServer, folder: Path, said: str, prefix: str = SHA256[:8]) -> None:
    with pytest.raises(UserError, match=said):
        download(server.url, folder / "weights.pth", prefix, lambda *_: None)
    assert list(folder.iterdir()) == []


def test_a_whole_file_and_its_progress(web_server: WebServer, tmp_path: Path) -> None:
    assert _fetch(web_server, tmp_path)[-1] == (len(CONTENT), len(CONTENT))
    assert web_server.ranges == [None]
    # Others of the group may read it: an ordinary file, by the umask.
    (tmp_path / "ordinary").touch()
    assert (tmp_path / "weights.pth").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_a_cut_connection_is_taken_up_where_it_broke(web_server: WebServer, tmp_path: Path) -> None:
    def cut_twice(handler: BaseHTTPRequestHandler, request: int) -> None:
        start = rest(handler)
        body = CONTENT[start : start + 300_000] if request < 3 else CONTENT[start:]
        send(handler, body, 206 if start else 200, len(CONTENT) - start, start)

    web_server.behave = cut_twice
    seen = _fetch(web_server, tmp_path)
    assert web_server.ranges == [None, "bytes=300000-", "bytes=600000-"]
    assert {whole for _, whole in seen} == {len(CONTENT)}


def test_a_server_without_ranges_begins_again(web_server: WebServer, tmp_path: Path) -> None:
    def cut_once(handler: BaseHTTPRequestHandler, request: int) -> None:
        send(handler, CONTENT[:1000] if request == 1 else CONTENT, declared=len(CONTENT))

    web_server.behave = cut_once
    _fetch(web_server, tmp_path)
    assert web_server.ranges == [None, "bytes=1000-"]


def test_an_end_that_was_not_declared_is_noticed(web_server: WebServer, tmp_path: Path) -> None:
    """Without a length the end of a cut answer looks like the end of the file: the hash tells, and 416 is an end."""

    def undeclared(handler: BaseHTTPRequestHandler, request: int) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(CONTENT if request > 1 else CONTENT[:1000])

    web_server.behave = undeclared
    _refused(web_server, tmp_path, "sha256 begins with")


def test_a_file_that_ended_just_before_the_cut(web_server: WebServer, tmp_path: Path) -> None:
    def all_but_the_length(handler: BaseHTTPRequestHandler, request: int) -> None:
        if rest(handler):
            send(handler, b"", 416)
        else:
            send(handler, CONTENT, declared=len(CONTENT) + 5)

    web_server.behave = all_but_the_length
    _fetch(web_server, tmp_path)


def test_what_was_damaged_on_the_way_is_fetched_afresh(web_server: WebServer, tmp_path: Path) -> None:
    def changed_between(handler: BaseHTTPRequestHandler, request: int) -> None:
        start = rest(handler)
        if request == 1:
            send(handler, b"x" * 1000, declared=len(CONTENT))
        else:
            send(handler, CONTENT[start:], 206 if start else 200, start=start)

    web_server.behave = changed_between
    _fetch(web_server, tmp_path)
    assert web_server.ranges == [None, "bytes=1000-", None]


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
    assert len(web_server.ranges) == 3


def test_a_redirect_is_followed_and_keeps_the_range(web_server: WebServer, tmp_path: Path) -> None:
    def elsewhere(handler: BaseHTTPRequestHandler, request: int) -> None:
        if handler.path == "/weights.pth":
            handler.send_response(302)
            handler.send_header("Location", "/elsewhere")
            handler.send_header("Content-Length", "0")
            handler.end_headers()
        elif request == 2:
            send(handler, CONTENT[:1000], declared=len(CONTENT))
        else:
            send(handler, CONTENT[rest(handler) :], 206, start=rest(handler))

    web_server.behave = elsewhere
    _fetch(web_server, tmp_path)
    assert web_server.ranges == [None, None, "bytes=1000-", "bytes=1000-"]


def test_another_file_is_refused_at_once(web_server: WebServer, tmp_path: Path) -> None:
    web_server.behave = lambda handler, _: send(handler, b"<html>please log in</html>")
    _refused(
        web_server,
        tmp_path,
        "what came is not the published file: its sha256 begins with [0-9a-f]{8}, not 00000000",
        "0" * 8,
    )
    assert len(web_server.ranges) == 1


def test_an_absent_file_is_refused_at_once(web_server: WebServer, tmp_path: Path) -> None:
    web_server.behave = lambda handler, _: send(handler, b"", 404)
    _refused(web_server, tmp_path, "is answered with 404 Not Found")
    assert len(web_server.ranges) == 1


def test_a_server_that_never_recovers(web_server: WebServer, tmp_path: Path) -> None:
    web_server.behave = lambda handler, _: send(handler, b"", 503)
    _refused(web_server, tmp_path, "cannot fetch .*: 503 Service Unavailable")
    assert len(web_server.ranges) == module.ATTEMPTS


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


def test_an_interrupted_download_leaves_nothing(web_server: WebServer, tmp_path: Path) -> None:
    def interrupt(have: int, whole: int | None) -> None:
        assert len(list(tmp_path.iterdir())) == 1
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download(web_server.url, tmp_path / "weights.pth", SHA256[:8], interrupt)
    assert list(tmp_path.iterdir()) == []


def test_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/x"
        with pytest.raises(NoNetworkError, match=r"cannot reach 127\.0\.0\.1:\d+ \(Connection refused\): no internet"):
            download(url, tmp_path / "x", "0", lambda *_: None)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(web_server: WebServer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot write .*No such file"):
        download(web_server.url, tmp_path / "absent/x", SHA256[:8], lambda *_: None)
