"""An HTTP server on loopback that behaves as a test wants it to."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

CONTENT = bytes(range(256)) * 4096
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class WebServer:
    """Answers each request as `behave` does; `requests`: their number."""

    def __init__(self) -> None:
        self.behave: Callable[[BaseHTTPRequestHandler, int], None] = lambda h, _: send(h, CONTENT)
        self.requests = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.requests += 1
                outer.behave(self, outer.requests)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        Thread(target=self.http.serve_forever, args=[0.01], daemon=True).start()

    def close(self) -> None:
        """Answers no more."""
        self.http.shutdown()
        self.http.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}/weights.pth"


def send(handler: BaseHTTPRequestHandler, body: bytes, status: int = 200, declared: int | None = None) -> None:
    """An answer with `body`, which may be less than the length that it declares."""
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(body) if declared is None else declared))
    handler.end_headers()
    handler.wfile.write(body)
