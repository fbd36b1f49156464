"""An HTTP proxy in front of an S3 endpoint that does to requests what networks and object stores do to them."""

from __future__ import annotations

import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

# What belongs to one connection, or is written anew.
_OWN_HEADERS = {"connection", "content-length", "date", "keep-alive", "server", "transfer-encoding"}


@dataclass
class Exchange:
    """A request, with the answer that the real server gave (not yet passed on)."""

    method: str
    path: str
    query: str
    headers: dict[str, str]
    status: int = 0
    answer: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    promised: int | None = None
    """Content-Length, where it is not the body's."""
    reset: bool = False
    """The connection ends with RST after the body, as when a machine in between dies; else with FIN."""
    pace: float = 0.0
    """Seconds between a byte of the body and the next, 0 for all at once."""

    def refuse(self, status: int, code: str) -> None:
        """Answers with an S3 error instead (HEAD's has no body)."""
        self.status = status
        self.answer = {"Content-Type": "application/xml"}
        text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code} from the proxy</Message></Error>"
        self.body = b"" if self.method == "HEAD" else text.encode()


Fault = Callable[[Exchange], None]


def slow_down(exchange: Exchange) -> None:
    """503, please reduce your request rate."""
    exchange.refuse(503, "SlowDown")


def expired(exchange: Exchange) -> None:
    """The temporary credentials are past their time."""
    exchange.refuse(403, "ExpiredToken")


def cut(exchange: Exchange) -> None:
    """The connection breaks in the middle of the body."""
    exchange.promised, exchange.reset = len(exchange.body), True
    exchange.body = exchange.body[: len(exchange.body) // 2]


def truncated(exchange: Exchange) -> None:
    """The body ends early, politely, though Content-Length promises more."""
    exchange.promised = len(exchange.body)
    exchange.body = exchange.body[: len(exchange.body) // 2]


def shortened(exchange: Exchange) -> None:
    """The body ends early and Content-Length agrees with it: only whoever knows what was asked for can tell."""
    exchange.body = exchange.body[: len(exchange.body) // 2]


def flipped(exchange: Exchange) -> None:
    """One bit in the middle is another."""
    body = bytearray(exchange.body)
    body[len(body) // 2] ^= 1
    exchange.body = bytes(body)


def trickling(exchange: Exchange) -> None:
    """The body comes, byte by byte: a time limit on silence never ends it."""
    exchange.pace = 0.1


def stalled(seconds: float = 2.0) -> Fault:
    """The server answers late."""

    def fault(exchange: Exchange) -> None:
        time.sleep(seconds)

    return fault


def overwritten(exchange: Exchange) -> None:
    """Another object of the same size under this name: another ETag, other bytes."""
    exchange.answer["ETag"] = '"another"'
    exchange.body = bytes(b ^ 1 for b in exchange.body)


class FaultProxy:
    """Passes requests on, with faults for those that match. `url` is an S3 endpoint; `log` names what came."""

    def __init__(self, upstream: str) -> None:
        parts = urlsplit(upstream)
        self._upstream = (parts.hostname or "", parts.port or 80)
        self._plans: list[tuple[Fault, str, re.Pattern[str], list[int]]] = []
        self._lock = threading.Lock()
        self.log: list[str] = []
        """METHOD /bucket/key [range], in order of arrival."""
        self.down = False
        """Requests are neither passed on nor answered."""
        self.under_way = 0
        """Requests that have come and are not answered yet."""
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                proxy._serve(self)

            do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def inject(self, fault: Fault, name: str = "", *, method: str = "GET", skip: int = 0, times: int = 10**9) -> None:
        """`fault` for requests in whose path the expression `name` is found: `times` of them, after `skip` others."""
        self._plans.append((fault, method, re.compile(name), [-skip, times]))

    def clear(self) -> None:
        """From here on all is well."""
        self._plans.clear()
        self.log.clear()

    def _faults(self, method: str, path: str) -> list[Fault]:
        due = []
        with self._lock:
            for fault, of, name, state in self._plans:
                if of == method and name.search(path):
                    state[0] += 1
                    if 0 < state[0] <= state[1]:
                        due.append(fault)
        return due

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        with self._lock:
            self.under_way += 1
        try:
            self._pass_on(handler)
        finally:
            with self._lock:
                self.under_way -= 1

    def _pass_on(self, handler: BaseHTTPRequestHandler) -> None:
        length = int(handler.headers.get("Content-Length") or 0)
        sent = handler.rfile.read(length)
        if self.down:
            handler.close_connection = True
            return
        headers = dict(handler.headers.items())
        ranges = headers.get("Range", "")
        self.log.append(f"{handler.command} {handler.path} {ranges}".rstrip())
        url = urlsplit(handler.path)
        exchange = Exchange(handler.command, url.path, url.query, headers)
        connection = HTTPConnection(*self._upstream, timeout=60)
        try:
            connection.request(handler.command, handler.path, sent, headers)
            self._take(exchange, connection.getresponse())
        finally:
            connection.close()
        for fault in self._faults(exchange.method, exchange.path):
            fault(exchange)
        try:
            self._answer(handler, exchange)
        except OSError:
            # The client went away: a fault of its own making.
            handler.close_connection = True

    @staticmethod
    def _take(exchange: Exchange, response: HTTPResponse) -> None:
        exchange.status = response.status
        exchange.body = response.read()
        exchange.answer = {k: v for k, v in response.getheaders() if k.lower() not in _OWN_HEADERS}
        if exchange.method == "HEAD":
            exchange.promised = int(response.getheader("Content-Length") or 0)

    @staticmethod
    def _answer(handler: BaseHTTPRequestHandler, exchange: Exchange) -> None:
        handler.send_response(exchange.status)
        for name, value in exchange.answer.items():
            handler.send_header(name, value)
        promised = len(exchange.body) if exchange.promised is None else exchange.promised
        handler.send_header("Content-Length", str(promised))
        handler.end_headers()
        for byte in exchange.body if exchange.pace else b"":
            handler.wfile.write(bytes([byte]))
            time.sleep(exchange.pace)
        handler.wfile.write(b"" if exchange.pace else exchange.body)
        handler.wfile.flush()
        if exchange.reset:
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if exchange.method != "HEAD" and promised != len(exchange.body):
            handler.close_connection = True


@contextmanager
def fault_proxy(upstream: str) -> Iterator[FaultProxy]:
    """A running proxy in front of the endpoint `upstream`."""
    proxy = FaultProxy(upstream)
    thread = threading.Thread(target=proxy.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.server.shutdown()
        proxy.server.server_close()
        thread.join()
