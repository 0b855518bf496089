"""An API server as far as pods, RuntimeClasses, volumes, claims and snapshots go: get, list by pages, watch with
bookmarks, replace.

It has a history that ends: who asks for a moment before that is told 410, in an event, as the real one does it.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

KINDS = {"/api/v1/pods": "pods", "/apis/node.k8s.io/v1/runtimeclasses": "runtimeclasses",
         "/api/v1/persistentvolumes": "persistentvolumes",
         "/apis/storage.k8s.io/v1/storageclasses": "storageclasses",
         "/api/v1/nodes": "nodes",
         "/api/v1/persistentvolumeclaims": "persistentvolumeclaims",
         "/apis/snapshot.storage.k8s.io/v1/volumesnapshots": "volumesnapshots",
         "/apis/snapshot.storage.k8s.io/v1/volumesnapshotcontents": "volumesnapshotcontents"}  # fmt: skip


class ApiDouble:
    """Serves until `stop`; `put` and `drop` change what there is, `requests` is what was asked, by whom."""

    def __init__(self) -> None:
        self.objects: dict[str, dict[str, dict[str, Any]]] = {kind: {} for kind in KINDS.values()}
        self.events: list[tuple[int, str, str, dict[str, Any]]] = []
        self.version, self.forgotten = 10, 0
        self.requests: list[tuple[str, str]] = []
        # A server that takes connections and says nothing.
        self.frozen = False
        # What every question, or every watch, is answered instead: a status, and a body.
        self.says: tuple[int, object] | None = None
        self.says_of_watches: tuple[int, object] | None = None
        # Who asks may change nothing.
        self.forbids = False
        # Watches get a byte now and then, and never a line.
        self.drips = False
        # What is forbidden, by path and query.
        self.refuses: Callable[[str, dict[str, str]], bool] = lambda _path, _query: False
        # Whether fieldSelector is obeyed, which not every proxy does.
        self.selects = True
        # Kinds that nobody here may ask for.
        self.denied: set[str] = set()
        # Somebody else's change, just before one is put there.
        self.before_put: Callable[[], object] | None = None
        self.changed = threading.Condition()
        self.bookmark_seconds = 0.2
        self._server: ThreadingHTTPServer | None = None
        self.port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self.stopped = False
        double = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                double.answer(self)

            def do_PUT(self) -> None:
                double.replace(self)

            def do_POST(self) -> None:
                double.create(self)

            def do_PATCH(self) -> None:
                double.merge(self)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Every connection ends, as with a server that dies."""
        self.stopped = True
        with self.changed:
            self.changed.notify_all()
        self._server.shutdown()
        self._server.server_close()

    def put(self, kind: str, name: str, what: dict[str, Any]) -> None:
        with self.changed:
            self.version += 1
            old = self.objects[kind].get(name)
            what = {
                **what,
                "metadata": {"name": name, **what.get("metadata", {}), "resourceVersion": str(self.version)},
            }
            self.objects[kind][name] = what
            self.events.append((self.version, kind, "MODIFIED" if old else "ADDED", what))
            self.changed.notify_all()

    def drop(self, kind: str, name: str) -> None:
        with self.changed:
            self.version += 1
            self.events.append((self.version, kind, "DELETED", self.objects[kind].pop(name)))
            self.changed.notify_all()

    def forget(self) -> None:
        """Of what was before this moment no watch can begin."""
        self.version += 1
        self.forgotten, self.events = self.version, []

    def pod(self, name: str, uid: str, *, node: str = "node-1", runtime_class: str = "") -> None:
        spec = {"nodeName": node, **({"runtimeClassName": runtime_class} if runtime_class else {}), "containers": []}
        self.put("pods", name, {"metadata": {"uid": uid, "namespace": "default"}, "spec": spec})

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        parts = urlsplit(request.path)
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        self.requests.append((request.path, request.headers["User-Agent"]))
        while self.frozen and not self.stopped:
            time.sleep(0.02)
        kind = KINDS.get(parts.path)
        said = self.says_of_watches if query.get("watch") else self.says
        if self.refuses(parts.path, query):
            said = (403, {"kind": "Status", "code": 403, "reason": "Forbidden"})
        if said is not None:
            _send(request, *said)
        elif any(f"/{kind}" in parts.path for kind in self.denied):
            _send(request, 403, {"kind": "Status", "code": 403})
        elif kind and query.get("watch"):
            self._watched(request, kind, query)
        elif kind:
            self._listed(request, kind, query)
        else:
            self._one(request, parts.path)

    def replace(self, request: BaseHTTPRequestHandler) -> None:
        """409 for another version than the one that is there."""
        *_, kind, name = request.path.split("/")
        self.requests.append((f"PUT {request.path}", request.headers["User-Agent"]))
        if self.before_put is not None:
            self.before_put()
        what = json.loads(request.rfile.read(int(request.headers["Content-Length"])))
        found = self.objects.get(kind, {}).get(name)
        if self.forbids:
            _send(request, 403, {"kind": "Status", "code": 403})
        elif found is None:
            _send(request, 404, {"kind": "Status", "code": 404})
        elif found["metadata"]["resourceVersion"] != what["metadata"]["resourceVersion"]:
            _send(request, 409, {"kind": "Status", "code": 409})
        else:
            self.put(kind, name, what)
            _send(request, 200, self.objects[kind][name])

    def create(self, request: BaseHTTPRequestHandler) -> None:
        """201; an event's kind is known without being listed."""
        *_, kind = request.path.split("/")
        self.requests.append((f"POST {request.path}", request.headers["User-Agent"]))
        what = json.loads(request.rfile.read(int(request.headers["Content-Length"])))
        while self.frozen and not self.stopped:
            time.sleep(0.02)
        if self.forbids:
            _send(request, 403, {"kind": "Status", "code": 403})
            return
        self.objects.setdefault(kind, {})
        self.put(kind, what["metadata"]["name"], what)
        _send(request, 201, what)

    def merge(self, request: BaseHTTPRequestHandler) -> None:
        *_, kind, name = request.path.split("/")
        self.requests.append((f"PATCH {request.path}", request.headers["User-Agent"]))
        changed = json.loads(request.rfile.read(int(request.headers["Content-Length"])))
        found = self.objects.get(kind, {}).get(name)
        if request.headers["Content-Type"] != "application/merge-patch+json":
            _send(request, 415, {"kind": "Status", "code": 415})
        elif found is None:
            _send(request, 404, {"kind": "Status", "code": 404})
        else:
            self.put(kind, name, found | changed)
            _send(request, 200, self.objects[kind][name])

    def _selected(self, kind: str, query: dict[str, str]) -> list[dict[str, Any]]:
        return [one for _name, one in sorted(self.objects[kind].items()) if self._is_wanted(one, query)]

    def _is_wanted(self, one: dict[str, Any], query: dict[str, str]) -> bool:
        node = query.get("fieldSelector", "").removeprefix("spec.nodeName=")
        return not node or not self.selects or one["spec"].get("nodeName") == node

    def _listed(self, request: BaseHTTPRequestHandler, kind: str, query: dict[str, str]) -> None:
        found, limit, first = self._selected(kind, query), int(query.get("limit", 500)), int(query.get("continue", 0))
        metadata = {"resourceVersion": str(self.version)}
        if first + limit < len(found):
            metadata["continue"] = str(first + limit)
        _send(request, 200, {"kind": "List", "metadata": metadata, "items": found[first : first + limit]})

    def _one(self, request: BaseHTTPRequestHandler, path: str) -> None:
        *_, kind, name = path.split("/")
        found = self.objects.get(kind, {}).get(name)
        _send(request, 200 if found else 404, found or {"kind": "Status", "code": 404})

    def _watched(self, request: BaseHTTPRequestHandler, kind: str, query: dict[str, str]) -> None:
        request.send_response(200)
        request.end_headers()
        since = int(query["resourceVersion"])
        until = time.monotonic() + int(query.get("timeoutSeconds", 300))

        def tell(event: str, what: dict[str, Any]) -> None:
            request.wfile.write(json.dumps({"type": event, "object": what}).encode() + b"\n")
            request.wfile.flush()

        try:
            if since < self.forgotten:
                tell("ERROR", {"kind": "Status", "code": 410, "message": f"too old resource version: {since}"})
                return
            while self.drips and not self.stopped:
                request.wfile.write(b" ")
                time.sleep(0.05)
            while not self.stopped and time.monotonic() < until:
                with self.changed:
                    news = [one for one in self.events if one[0] > since]
                    if not news:
                        self.changed.wait(self.bookmark_seconds)
                for version, of, event, what in news:
                    since = version
                    if of == kind and self._is_wanted(what, query):
                        tell(event, what)
                if not news and not self.frozen:
                    tell("BOOKMARK", {"metadata": {"resourceVersion": str(since)}})
        except OSError:
            return


def _send(request: BaseHTTPRequestHandler, status: int, body: object) -> None:
    content = json.dumps(body).encode()
    request.send_response(status)
    request.send_header("Content-Length", str(len(content)))
    request.end_headers()
    request.wfile.write(content)
