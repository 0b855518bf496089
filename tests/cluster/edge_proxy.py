"""A node-local proxy before the API server, as EdgeHub and YurtHub are: it passes requests on, keeps what is read, and
answers from that while the cloud is away.

    python -m tests.cluster.edge_proxy PORT KUBECONFIG CACHE

Lists are kept with what watches say since; a watch without a cloud is silent, until the client's time for it is over.
What writes is refused then. All of it in JSON, which clients have to ask for; a watch that begins with a list
(`sendInitialEvents`) is refused as a server without it does, so that clients list first.
"""

from __future__ import annotations

import base64
import hashlib
import json
import ssl
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPResponse, HTTPSConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

import yaml

_SECONDS = 3.0
# What says only how a list is read, not what it is a list of.
_HOW = {"resourceVersion", "resourceVersionMatch", "limit", "continue", "watch", "allowWatchBookmarks", "timeoutSeconds",
        "sendInitialEvents", "timeout"}  # fmt: skip


class Upstream:
    """The API server, with the client certificate of a kubeconfig."""

    def __init__(self, kubeconfig: Path) -> None:
        read = yaml.safe_load(kubeconfig.read_text())
        cluster, user = read["clusters"][0]["cluster"], read["users"][0]["user"]
        self.server = urlsplit(cluster["server"])
        self.context = ssl.create_default_context(
            cadata=base64.b64decode(cluster["certificate-authority-data"]).decode()
        )
        with tempfile.NamedTemporaryFile() as both:
            both.write(base64.b64decode(user["client-key-data"]) + base64.b64decode(user["client-certificate-data"]))
            both.flush()
            self.context.load_cert_chain(both.name)

    def asked(self, method: str, path: str, headers: dict[str, str], body: bytes | None, seconds: float) -> tuple[
        HTTPConnection, HTTPResponse]:  # fmt: skip
        connection = HTTPSConnection(self.server.hostname or "", self.server.port or 443, timeout=_SECONDS,
                                     context=self.context)  # fmt: skip
        connection.connect()
        connection.sock.settimeout(seconds)
        connection.request(method, path, body, headers)
        return connection, connection.getresponse()


class Cache:
    """What was read, one file each, by program, path and what it selects."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.lock = directory, threading.RLock()
        directory.mkdir(parents=True, exist_ok=True)

    def _file(self, agent: str, path: str, query: dict[str, str]) -> Path:
        wanted = sorted((key, value) for key, value in query.items() if key not in _HOW)
        return self.directory / hashlib.sha256(repr((agent, path, wanted)).encode()).hexdigest()

    def put(self, agent: str, path: str, query: dict[str, str], body: bytes) -> None:
        with self.lock:
            file = self._file(agent, path, query)
            file.with_suffix(".new").write_bytes(body)
            file.with_suffix(".new").rename(file)

    def get(self, agent: str, path: str, query: dict[str, str]) -> bytes | None:
        with self.lock:
            file = self._file(agent, path, query)
            return file.read_bytes() if file.exists() else None

    def told(self, agent: str, path: str, query: dict[str, str], line: bytes) -> None:
        """An event of a watch, in the list that it goes on from."""
        event = json.loads(line)
        what = event.get("object", {})
        with self.lock:
            kept = self.get(agent, path, query)
            if kept is None or event.get("type") == "ERROR":
                return
            whole = json.loads(kept)
            if event["type"] != "BOOKMARK":
                own = what["metadata"].get("uid"), what["metadata"]["name"]
                items = [one for one in whole["items"] if (one["metadata"].get("uid"), one["metadata"]["name"]) != own]
                whole["items"] = items + ([what] if event["type"] != "DELETED" else [])
            whole["metadata"]["resourceVersion"] = what["metadata"]["resourceVersion"]
            self.put(agent, path, query, json.dumps(whole).encode())


def _handler(upstream: Upstream, cache: Cache) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            parts = urlsplit(self.path)
            query = dict(parse_qsl(parts.query, keep_blank_values=True))
            agent = (self.headers.get("User-Agent") or "").split("/")[0]
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0)) or None
            if query.get("sendInitialEvents"):
                self.answer(422, _status(422, "Invalid", "sendInitialEvents is forbidden for watch"))
            elif self.command != "GET":
                self.passed_on(body)
            elif query.get("watch") in ("1", "true"):
                self.watched(agent, parts.path, query)
            else:
                self.read_once(agent, parts.path, query)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_any  # noqa: N815  (http.server's names)

        def headers_up(self) -> dict[str, str]:
            kept = {name: value for name, value in self.headers.items()
                    if name.lower() in ("user-agent", "content-type", "authorization")}  # fmt: skip
            return {**kept, "Accept": "application/json"}

        def passed_on(self, body: bytes | None) -> None:
            try:
                connection, reply = upstream.asked(self.command, self.path, self.headers_up(), body, 30)
                content = reply.read()
                connection.close()
                self.answer(reply.status, content)
            except OSError:
                self.answer(503, _status(503, "ServiceUnavailable", "the cloud is away, and nothing is written"))

        def read_once(self, agent: str, path: str, query: dict[str, str]) -> None:
            # A list in one piece is one answer that can be kept.
            whole = {key: value for key, value in query.items() if key not in ("limit", "continue")}
            try:
                where = f"{path}?{urlencode(whole)}" if whole else path
                connection, reply = upstream.asked("GET", where, self.headers_up(), None, 10)
                content = reply.read()
                connection.close()
            except OSError:
                kept = cache.get(agent, path, query)
                if kept is None:
                    self.answer(504, _status(504, "Timeout", "the cloud is away, and this was never read"))
                else:
                    self.answer(200, kept)
                return
            if reply.status == 200:
                cache.put(agent, path, query, content)
            self.answer(reply.status, content)

        def watched(self, agent: str, path: str, query: dict[str, str]) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.close_connection = True
            try:
                for line in _events(upstream, self.path, self.headers_up(), float(query.get("timeoutSeconds", 300))):
                    cache.told(agent, path, query, line)
                    self.wfile.write(f"{len(line):x}\r\n".encode() + line + b"\r\n")
                    self.wfile.flush()
                self.wfile.write(b"0\r\n\r\n")
            except OSError:
                return

        def answer(self, status: int, content: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  (its name there)
            sys.stderr.write(f"{time.strftime('%H:%M:%S')} {format % args}\n")

    return Handler


def _events(upstream: Upstream, path: str, headers: dict[str, str], seconds: float) -> Iterator[bytes]:
    """Line by line, until the cloud goes; none at all while it is away."""
    try:
        connection, reply = upstream.asked("GET", path, headers, None, seconds + 10)
    except OSError:
        time.sleep(min(seconds, 20))
        return
    try:
        while line := reply.readline():
            yield line
    except OSError:
        return
    finally:
        connection.close()


def _status(code: int, reason: str, message: str) -> bytes:
    return json.dumps({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason,
                       "message": message}).encode()  # fmt: skip


def main() -> None:
    port, kubeconfig, cache = int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    server = ThreadingHTTPServer(("127.0.0.1", port), _handler(Upstream(kubeconfig), Cache(cache)))
    server.daemon_threads = True
    server.serve_forever()


if __name__ == "__main__":
    main()
