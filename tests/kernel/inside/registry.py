"""An image registry on loopback: what a pull asks of one (OCI's distribution specification), from an archive's blobs."""

from __future__ import annotations

import hashlib
import json
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

MANIFEST = "application/vnd.oci.image.manifest.v1+json"


class Registry:
    """Serves one image under every name and tag; notes which blobs were fetched."""

    def __init__(self, archive: Path) -> None:
        with tarfile.open(archive) as tar:
            read = {name: tar.extractfile(name).read() for name in tar.getnames()}  # type: ignore[union-attr]
        self.blobs = {f"sha256:{hashlib.sha256(content).hexdigest()}": content for content in read.values()}
        self.manifest = str(json.loads(read["index.json"])["manifests"][0]["digest"])
        described = json.loads(self.blobs[self.manifest])
        self.layers = [str(layer["digest"]) for layer in described["layers"]]
        self.fetched: list[str] = []
        registry = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self._answer(body=False)

            def do_GET(self) -> None:
                self._answer(body=True)

            def _answer(self, *, body: bool) -> None:
                kind, _, name = self.path.rpartition("/")
                digest = name if name.startswith("sha256:") else registry.manifest
                content = registry.blobs.get(digest)
                if self.path == "/v2/":
                    content, digest = b"{}", ""
                if content is None:
                    self.send_error(404)
                    return
                if body and kind.endswith("/blobs"):
                    registry.fetched.append(digest)
                self.send_response(200)
                self.send_header(
                    "Content-Type", MANIFEST if kind.endswith("/manifests") else "application/octet-stream"
                )
                self.send_header("Content-Length", str(len(content)))
                self.send_header("Docker-Content-Digest", digest)
                self.end_headers()
                if body:
                    self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.name = f"127.0.0.1:{self._server.server_port}/test/layers:1"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
