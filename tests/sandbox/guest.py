"""The test guest: Debian's kernel and an initramfs made of Debian's programs and our agent, built once and cached.

`python -m tests.sandbox.guest` builds it and says where it is.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("RUNVOL_CACHE", Path.home() / ".cache" / "runvol"))
PROGRAMS = ("fio", "mkfs.ext4", "mkfs.xfs", "e2fsck", "modprobe", "python3", "blkid")
MODULES = (
    "virtio_pci", "virtio_console", "virtio_scsi", "virtio_blk", "sd_mod", "ext4", "xfs",
    "crc32c_generic", "9pnet_virtio", "9p", "virtiofs", "overlay", "loop",
    "virtio_net", "nfs", "nfsv3", "nfsv4",
)  # fmt: skip
# Parts of Python's library that no agent needs.
_PYTHON_WITHOUT = (
    "test",
    "idlelib",
    "tkinter",
    "lib2to3",
    "ensurepip",
    "distutils",
    "pydoc_data",
    "turtledemo",
    "__pycache__",
)
_LIBRARY = re.compile(r"(?:=> )?(/\S+) \(0x")


@dataclass(frozen=True)
class Guest:
    """A kernel and an initramfs that boot into the agent."""

    kernel: Path
    initramfs: Path


def build() -> Guest:
    """The guest for this checkout; made anew when anything that goes into it has changed."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with _alone(CACHE / "guest.lock"):
        tree = _kernel_tree()
        place = CACHE / "guest" / _fingerprint(tree)
        guest = Guest(kernel=next((tree / "boot").glob("vmlinuz-*")), initramfs=place / "initramfs")
        if not guest.initramfs.exists():
            shutil.rmtree(CACHE / "guest", ignore_errors=True)
            staging = place.with_suffix(".new")
            staging.mkdir(parents=True)
            _fill(staging / "root", tree)
            _pack(staging / "root", staging / "initramfs")
            shutil.rmtree(staging / "root")
            staging.rename(place)
        return guest


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _say(text: str) -> None:
    print(f"guest: {text}", file=sys.stderr, flush=True)


def _kernel_tree() -> Path:
    """Debian's newest kernel for this machine, unpacked."""
    listed = subprocess.run(
        ["apt-cache", "depends", "linux-image-amd64"], check=True, capture_output=True, text=True
    ).stdout
    package = re.search(r"Depends: (linux-image-\S+)", listed)
    if package is None:
        raise RuntimeError("apt-cache knows no linux-image-amd64; run apt-get update")
    tree = CACHE / "kernels" / package[1]
    if not tree.exists():
        _say(f"fetching {package[1]}")
        new = tree.with_suffix(".new")
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        subprocess.run(["apt-get", "download", "-q", package[1]], cwd=new, check=True, capture_output=True)
        deb = next(new.glob("*.deb"))
        subprocess.run(["dpkg", "-x", deb.name, "."], cwd=new, check=True)
        deb.unlink()
        version = next((new / "boot").glob("vmlinuz-*")).name.removeprefix("vmlinuz-")
        if (new / "usr/lib/modules").exists() and not (new / "lib").exists():
            (new / "lib").symlink_to("usr/lib")
        subprocess.run(["depmod", "-b", str(new), version], check=True)
        new.rename(tree)
    return tree


def _fingerprint(tree: Path) -> str:
    digest = hashlib.sha256(tree.name.encode())
    sources = [Path(__file__), ROOT / "guestmount/ttrpc.py", *sorted((ROOT / "proto").glob("*.proto"))]
    for source in [*sources, *sorted((ROOT / "tests/sandbox/agent").glob("*"))]:
        if source.is_file():
            digest.update(source.read_bytes())
    for program in PROGRAMS:
        path = Path(_program(program)).resolve()
        digest.update(f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


def _program(name: str) -> str:
    # Debian's own programs, not those of an environment that somebody has activated.
    found = shutil.which(name, path="/usr/sbin:/usr/bin:/sbin:/bin")
    if found is None:
        raise RuntimeError(f"{name} is not installed; run tests/prepare/debian.sh")
    return found


def _fill(root: Path, tree: Path) -> None:
    _say("building the initramfs")
    for directory in ("bin", "sbin", "etc", "proc", "sys", "dev", "run", "tmp", "agent", "root", "lib", "mnt"):
        (root / directory).mkdir(parents=True)
    _copy(_program("busybox"), root)
    for program in PROGRAMS:
        _copy(_program(program), root)
    (root / "bin/busybox").unlink(missing_ok=True)
    shutil.copy2(Path(_program("busybox")).resolve(), root / "bin/busybox")
    for applet in ("sh", "cat", "ls", "dd", "mount", "umount", "sync", "sleep", "echo", "md5sum", "id", "stat", "touch",
                   "grep", "dmesg", "df", "mkdir", "rm", "true", "false", "ip", "ps", "kill", "sed"):  # fmt: skip
        (root / "bin" / applet).symlink_to("busybox")
    if not (root / "sbin/modprobe").exists():
        (root / "sbin/modprobe").symlink_to(_program("modprobe"))
    _copy_python(root)
    _copy_agent(root)
    _copy_modules(root, tree)


def _copy(path: str, root: Path) -> None:
    """A program or library with everything that it is linked to, each under its own name and its real one."""
    source = Path(path)
    target = root / path.lstrip("/")
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(source.resolve(), target)
    listed = subprocess.run(["ldd", str(source.resolve())], check=False, capture_output=True, text=True).stdout
    for library in _LIBRARY.findall(listed):
        _copy(library, root)


def _copy_python(root: Path) -> None:
    version = subprocess.run(
        [_program("python3"), "-c", "import sys; print('%d.%d' % sys.version_info[:2])"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    library = Path("/usr/lib") / f"python{version}"
    target = root / str(library).lstrip("/")
    shutil.copytree(
        library, target, ignore=shutil.ignore_patterns(*_PYTHON_WITHOUT, "dist-packages", "config-*"), symlinks=False
    )
    # Without bytecode the agent spends seconds of an emulated machine on compiling; mtimes do not survive everywhere.
    compileall = [_program("python3"), "-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash", str(target)]
    subprocess.run(compileall, check=False, stdout=subprocess.DEVNULL)
    for module in (target / "lib-dynload").glob("*.so"):
        for needed in _LIBRARY.findall(
            subprocess.run(["ldd", str(module)], check=False, capture_output=True, text=True).stdout
        ):
            _copy(needed, root)


def _copy_agent(root: Path) -> None:
    agent = root / "agent"
    shutil.copy2(ROOT / "tests/sandbox/agent/agent.py", agent)
    shutil.copy2(ROOT / "guestmount/ttrpc.py", agent)
    shutil.copytree(
        ROOT / "runvol_proto", agent / "runvol_proto", ignore=shutil.ignore_patterns("__pycache__", "*.pyi", "csi_pb2*")
    )
    packages = Path(sysconfig.get_paths()["platlib"])
    for package in ("google/protobuf", "google/_upb"):
        shutil.copytree(packages / package, agent / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy2(ROOT / "tests/sandbox/agent/init", root / "init")
    (root / "init").chmod(0o755)
    subprocess.run(
        [_program("python3"), "-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash", str(agent)], check=True
    )


def _copy_modules(root: Path, tree: Path) -> None:
    version = next((tree / "boot").glob("vmlinuz-*")).name.removeprefix("vmlinuz-")
    modules = tree / "lib/modules" / version
    needs = {}
    for line in (modules / "modules.dep").read_text().splitlines():
        name, _, after = line.partition(":")
        needs[Path(name).name.split(".")[0].replace("-", "_")] = [name, *after.split()]
    present = []
    for module in MODULES:
        files = needs.get(module)
        if files is None:
            continue  # built into this kernel
        present.append(module)
        for file in files:
            target = root / "lib/modules" / version / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(modules / file, target)
    for extra in ("modules.order", "modules.builtin", "modules.builtin.modinfo"):
        shutil.copy2(modules / extra, root / "lib/modules" / version)
    subprocess.run(["depmod", "-b", str(root), version], check=True)
    (root / "etc/guest-modules").write_text("\n".join(present) + "\n")


def _pack(root: Path, target: Path) -> None:
    names = subprocess.run(["find", ".", "-print0"], cwd=root, check=True, capture_output=True).stdout
    with target.open("wb") as out:
        subprocess.run(["cpio", "--null", "-o", "-H", "newc", "--quiet"], cwd=root, input=names, stdout=out, check=True)
    _say(f"{target.stat().st_size >> 20} MiB")


if __name__ == "__main__":
    print(build())
