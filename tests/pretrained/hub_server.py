"""Enough of the Hub's protocol for its own library: repositories in memory, uploads by commits, files by revision."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

COMMIT = "c" * 40


def _entry(name: str, data: bytes) -> dict[str, object]:
    return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha256(data).hexdigest()}


class HubServer:
    """`files` by repository and name."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._read(body=True)

            def do_HEAD(self) -> None:
                self._read(body=False)

            def _read(self, *, body: bool) -> None:
                parts = unquote(self.path.partition("?")[0]).strip("/").split("/")
                if parts[:2] == ["api", "models"]:
                    repo = "/".join(parts[2:4])
                    if repo not in hub.files:
                        self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
                        return
                    if parts[4:5] == ["tree"]:
                        self._answer(200, [_entry(name, data) for name, data in sorted(hub.files[repo].items())])
                        return
                    siblings = [{"rfilename": name} for name in sorted(hub.files[repo])]
                    self._answer(200, {"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings, "tags": []})
                    return
                repo, name = "/".join(parts[:2]), "/".join(parts[4:])
                data = hub.files.get(repo, {}).get(name)
                if parts[2:3] != ["resolve"] or data is None:
                    self._answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
                    return
                etag = f'"{hashlib.sha256(data).hexdigest()}"'
                self._answer(200, data, {"ETag": etag, "X-Repo-Commit": COMMIT}, body=body)

            def do_POST(self) -> None:
                content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                path = self.path.partition("?")[0]
                if path == "/api/repos/create":
                    asked = json.loads(content)
                    repo = asked["name"] if "organization" not in asked else f"{asked['organization']}/{asked['name']}"
                    hub.files.setdefault(repo, {})
                    if asked.get("visibility") == "private" or asked.get("private"):
                        hub.private.add(repo)
                    self._answer(200, {"url": f"{hub.url}/{repo}", "name": repo, "id": repo})
                elif "/preupload/" in path:
                    named = [f["path"] for f in json.loads(content)["files"]]
                    kinds = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in named]
                    self._answer(200, {"files": kinds})
                elif "/commit/" in path:
                    repo = "/".join(path.split("/")[3:5])
                    for line in content.splitlines():
                        item = json.loads(line)
                        if item["key"] == "file":
                            hub.files[repo][item["value"]["path"]] = base64.b64decode(item["value"]["content"])
                    url = f"{hub.url}/{repo}/commit/{COMMIT}"
                    self._answer(200, {"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": ""})
                else:
                    self._answer(200, {})

            def _answer(
                self, code: int, content: object, headers: dict[str, str] | None = None, *, body: bool = True
            ) -> None:
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(code)
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if body and self.command != "HEAD":
                    self.wfile.write(data)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Stops listening."""
        self._server.shutdown()
        self._server.server_close()
