"""Container images without a registry: OCI archives that are written here and imported into a node."""

from __future__ import annotations

import hashlib
import io
import json
import platform
import shutil
import subprocess
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PAUSE = "localhost/pause:1"
BUSYBOX = "localhost/busybox:1"
_ARCHITECTURE = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())


def layer(files: Mapping[str, bytes | Path], links: Mapping[str, str] | None = None) -> bytes:
    """A layer, as a tar: contents or files by their path in the image, executable; symbolic links by their target."""
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w") as tar:
        for path, content in files.items():
            data = content.read_bytes() if isinstance(content, Path) else content
            entry = tarfile.TarInfo(path)
            entry.size, entry.mode = len(data), 0o755
            tar.addfile(entry, io.BytesIO(data))
        for path, target in (links or {}).items():
            entry = tarfile.TarInfo(path)
            entry.type, entry.linkname, entry.mode = tarfile.SYMTYPE, target, 0o777
            tar.addfile(entry)
    return written.getvalue()


def write_archive(path: Path, reference: str, layers: Sequence[bytes], *, entrypoint: Sequence[str] = (),
                  command: Sequence[str] = (), environment: Sequence[str] = ("PATH=/usr/sbin:/usr/bin:/sbin:/bin",)) -> Path:  # fmt: skip
    """An OCI layout in a tar, with the one image `reference`, whose layers are tars that are not compressed."""
    blobs: dict[str, bytes] = {}

    def blob(kind: str, data: bytes) -> dict[str, Any]:
        digest = hashlib.sha256(data).hexdigest()
        blobs[digest] = data
        return {"mediaType": f"application/vnd.oci.image.{kind}", "digest": f"sha256:{digest}", "size": len(data)}

    described = [blob("layer.v1.tar", data) for data in layers]
    config = {
        "architecture": _ARCHITECTURE,
        "os": "linux",
        "config": {"Entrypoint": list(entrypoint), "Cmd": list(command), "Env": list(environment)},
        "rootfs": {"type": "layers", "diff_ids": [one["digest"] for one in described]},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": blob("config.v1+json", json.dumps(config).encode()),
        "layers": described,
    }
    listed = blob("manifest.v1+json", json.dumps(manifest).encode()) | {
        "platform": {"architecture": _ARCHITECTURE, "os": "linux"},
        "annotations": {"io.containerd.image.name": reference, "org.opencontainers.image.ref.name": reference},
    }
    files = {"oci-layout": b'{"imageLayoutVersion": "1.0.0"}',
             "index.json": json.dumps({"schemaVersion": 2, "manifests": [listed]}).encode(),
             **{f"blobs/sha256/{digest}": data for digest, data in blobs.items()}}  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(layer(files))
    return path


def own(directory: Path) -> list[Path]:
    """The two images that every node has: pause, and busybox with all that it can do. Both are Debian's static busybox."""
    busybox = Path(shutil.which("busybox") or "/bin/busybox")
    pause, whole = directory / "pause.tar", directory / "busybox.tar"
    if not pause.exists():
        # The first process of a sandbox: it ends at SIGTERM, and buries what is left to it.
        script = b"#!/bin/sh\ntrap 'exit 0' TERM INT\nwhile :; do sleep 2147483647 & wait; done\n"
        alone = layer({"bin/busybox": busybox, "pause": script}, {"bin/sh": "busybox", "bin/sleep": "busybox"})
        write_archive(pause, PAUSE, [alone], entrypoint=["/pause"])
    if not whole.exists():
        names = subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True).stdout.split()
        tools = layer({"bin/busybox": busybox}, {f"bin/{name}": "busybox" for name in names if name != "busybox"})
        write_archive(whole, BUSYBOX, [tools], command=["sh"])
    return [pause, whole]
