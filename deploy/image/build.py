"""The image of runvol's pods, made without a container engine: Debian packages, the program, an OCI layout as one tar.

    .venv/bin/python deploy/image/build.py [--output runvol-image.tar] [--name runvol.io/runvol:VERSION]

Needs root and Debian's `mmdebstrap`. The same sources and packages give the same bytes. Beside the tar lies what is in
it, a bill of materials in CycloneDX's JSON (`.cdx.json`). The tar is what `ctr -n k8s.io images import`, `skopeo copy
oci-archive:…` and `podman load` take.
"""

from __future__ import annotations

import argparse
import email.parser
import gzip
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SUITE = "bookworm"
# What the program runs: Python, mkfs and fsck of both filesystems, blkid and mount, tar, udev's library.
PACKAGES = ("python3-minimal", "libpython3-stdlib", "e2fsprogs", "xfsprogs", "util-linux", "mount", "tar", "libudev1",
            "ca-certificates")  # fmt: skip
LEFT_OUT = ("/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*", "/usr/share/doc/*", "/usr/share/lintian/*")
# Needed while packages are configured, and by nothing afterwards.
REMOVED = ("usr/share/perl5", "usr/share/perl", "var/cache", "var/log", "var/lib/apt", "usr/share/bash-completion")
PLACE = "usr/lib/runvol"
LAUNCHER = """#!/usr/bin/python3 -Es
import sys
sys.path.insert(0, "/usr/lib/runvol")
from runvol.{module} import main
sys.exit(main())
"""
_OCI = "application/vnd.oci.image."


def main() -> None:
    """Say what is done, and how large it became."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--output", type=Path, default=ROOT / "runvol-image.tar")
    arguments.add_argument("--name", default=f"runvol.io/runvol:{_version()}")
    arguments.add_argument("--cache", type=Path, help="a directory that keeps Debian's part for the next time")
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory(prefix="runvol-image-") as work:
        base = Path(work) / "base"
        _cached_debian(base, given.cache)
        _say("runvol and what it depends on")
        program = Path(work) / "program"
        _program(program)
        _say("the layout")
        _layout(Path(work) / "layout", [base, program], given.name, given.output)
        bill = given.output.with_suffix(".cdx.json")
        bill.write_text(json.dumps(_bill(base, program), indent=1, sort_keys=True) + "\n")
    print(f"{given.output}: {given.output.stat().st_size / 1e6:.0f} MB, {given.name}; its contents: {bill}")


def _say(what: str) -> None:
    print(f"==> {what}", flush=True)


def _version() -> str:
    with (ROOT / "pyproject.toml").open("rb") as file:
        return str(tomllib.load(file)["project"]["version"])


def _moment() -> int:
    """Of all files, in seconds since 1970: that of the last change that was committed."""
    if "SOURCE_DATE_EPOCH" in os.environ:
        return int(os.environ["SOURCE_DATE_EPOCH"])
    done = subprocess.run(["git", "-C", ROOT, "log", "-1", "--format=%ct"], capture_output=True, text=True, check=False)
    return int(done.stdout) if done.returncode == 0 else 0


def _cached_debian(base: Path, cache: Path | None) -> None:
    wanted = hashlib.sha256(repr((SUITE, PACKAGES, LEFT_OUT, REMOVED)).encode()).hexdigest()[:16]
    kept = cache / f"debian-{wanted}.tar" if cache is not None else None
    if kept is not None and kept.exists():
        base.mkdir()
        subprocess.run(["tar", "-xpf", kept, "-C", base], check=True)
        return
    _say("Debian packages (half a minute)")
    _debian(base)
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        new = kept.with_suffix(f".{os.getpid()}.new")
        subprocess.run(["tar", "-cpf", new, "--exclude=./dev/*", "-C", base, "."], check=True)
        new.rename(kept)


def _debian(base: Path) -> None:
    if shutil.which("mmdebstrap") is None:
        sys.exit("mmdebstrap is not installed: apt-get install mmdebstrap")
    excluded = [f"--dpkgopt=path-exclude={path}" for path in LEFT_OUT]
    subprocess.run(
        ["mmdebstrap", "--quiet", "--variant=essential", f"--include={','.join(PACKAGES)}", *excluded,
         "--dpkgopt=path-include=/usr/share/doc/*/copyright", "--format=directory", SUITE, base], check=True,
        env={**os.environ, "SOURCE_DATE_EPOCH": str(_moment())},
    )  # fmt: skip
    for place in REMOVED:
        shutil.rmtree(base / place, ignore_errors=True)
    for path in base.glob("usr/lib/*/perl*"):
        shutil.rmtree(path, ignore_errors=True)


def _program(top: Path) -> None:
    place = top / PLACE
    with tempfile.TemporaryDirectory() as wheels:
        pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
        subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", wheels, ROOT], check=True)
        wheel = next(Path(wheels).glob("runvol-*.whl"))
        # What is installed beside --target has nothing to do with it, and pip would call it a conflict.
        told = ["--no-compile", "--root-user-action=ignore", "--no-warn-conflicts"]
        subprocess.run([*pip, "install", *told, "--target", place, wheel], check=True)
    shutil.rmtree(place / "bin", ignore_errors=True)
    for name in ("pip", "setuptools", "tests"):
        shutil.rmtree(place / name, ignore_errors=True)
    for path in [
        *place.rglob("*.pyi"),
        *place.rglob("direct_url.json"),
        *place.rglob("INSTALLER"),
        *place.rglob("RECORD"),
    ]:
        path.unlink()
    # The root filesystem of a pod is read-only, so nobody compiles it later; by content, since times say nothing here.
    compile_all = [sys.executable, "-m", "compileall", "-q", "-j", "0", "--invalidation-mode", "unchecked-hash"]
    subprocess.run([*compile_all, "-s", top, "-p", "/", place], check=True)
    for name, module in (("runvol", "entry"), ("runvol-flexvolume", "flexvolume_driver")):
        launcher = top / "usr/bin" / name
        launcher.parent.mkdir(parents=True, exist_ok=True)
        launcher.write_text(LAUNCHER.format(module=module))
        launcher.chmod(0o755)


def _layout(place: Path, layers: list[Path], name: str, output: Path) -> None:
    blobs = place / "blobs/sha256"
    blobs.mkdir(parents=True)

    def blob(content: bytes, kind: str) -> dict[str, Any]:
        digest = hashlib.sha256(content).hexdigest()
        (blobs / digest).write_bytes(content)
        return {"mediaType": kind, "digest": f"sha256:{digest}", "size": len(content)}

    described, plain = [], []
    for layer in layers:
        content = _tar(layer)
        plain.append(f"sha256:{hashlib.sha256(content).hexdigest()}")
        described.append(blob(gzip.compress(content, 9, mtime=0), f"{_OCI}layer.v1.tar+gzip"))
    config = blob(
        json.dumps({
            "architecture": _architecture(), "os": "linux",
            "config": {"Entrypoint": ["/usr/bin/runvol"], "Cmd": ["csi"], "WorkingDir": "/",
                       "Env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C.UTF-8"],
                       "Labels": {"org.opencontainers.image.title": "runvol",
                                  "org.opencontainers.image.version": _version(),
                                  "org.opencontainers.image.licenses": "Apache-2.0"}},
            "rootfs": {"type": "layers", "diff_ids": plain},
        }).encode(), f"{_OCI}config.v1+json",
    )  # fmt: skip
    manifest = {"schemaVersion": 2, "mediaType": f"{_OCI}manifest.v1+json", "config": config, "layers": described}
    entry = blob(json.dumps(manifest).encode(), f"{_OCI}manifest.v1+json")
    entry["annotations"] = {"io.containerd.image.name": name, "org.opencontainers.image.ref.name": name}
    index = {"schemaVersion": 2, "mediaType": f"{_OCI}index.v1+json", "manifests": [entry]}
    (place / "index.json").write_text(json.dumps(index))
    (place / "oci-layout").write_text(json.dumps({"imageLayoutVersion": "1.0.0"}))
    output.write_bytes(_tar(place))


def _architecture() -> str:
    return {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine, os.uname().machine)


def _tar(top: Path) -> bytes:
    """Everything below the directory, in order, root's, and of one time. Nodes of /dev are the runtime's to make."""
    moment, out = _moment(), io.BytesIO()

    def plain(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        member.mtime, member.uname, member.gname = moment, "", ""
        return None if member.isdev() else member

    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for path in sorted(top.iterdir()):
            tar.add(path, path.name, filter=plain)
    return out.getvalue()


def _bill(base: Path, program: Path) -> dict[str, Any]:
    found = [*_packages(base), *_distributions(program / PLACE)]
    return {"bomFormat": "CycloneDX", "specVersion": "1.5", "version": 1, "components": found,
            "metadata": {"component": {"type": "container", "name": "runvol", "version": _version()}}}  # fmt: skip


def _packages(base: Path) -> Iterator[dict[str, str]]:
    parser = email.parser.Parser()
    for block in (base / "var/lib/dpkg/status").read_text().split("\n\n"):
        one = parser.parsestr(block.strip(), headersonly=True)
        if one["Package"]:
            yield {"type": "library", "name": one["Package"], "version": one["Version"],
                   "purl": f"pkg:deb/debian/{one['Package']}@{one['Version']}?arch={one['Architecture']}"}  # fmt: skip


def _distributions(place: Path) -> Iterator[dict[str, str]]:
    parser = email.parser.Parser()
    for path in sorted(place.glob("*.dist-info/METADATA")):
        one = parser.parsestr(path.read_text(), headersonly=True)
        yield {"type": "library", "name": one["Name"], "version": one["Version"],
               "purl": f"pkg:pypi/{one['Name'].lower()}@{one['Version']}"}  # fmt: skip


if __name__ == "__main__":
    main()
