"""`runvol doctor` for what runvol stands on: programs, loop devices, filesystems, capabilities."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

from blockdev import confined
from runvol.config import Config
from runvol.diagnosis import BROKEN, OK, WARNING, Diagnosis, broken, good, unknown, warning

_CAP_SYS_ADMIN, _CAP_SYS_RESOURCE = 21, 24
_PATH = "/usr/sbin:/sbin:/usr/bin:/bin"
# Program, package, and whether no volume works without it.
_PROGRAMS = (
    ("mkfs.ext4", "e2fsprogs", True),
    ("e2fsck", "e2fsprogs", True),
    ("blkid", "util-linux", True),
    ("mkfs.xfs", "xfsprogs", False),
    ("xfs_logprint", "xfsprogs", False),
    ("tar", "tar", False),
    ("du", "coreutils", False),
)
# Filesystem, and whether it is the one of volumes whose class names none.
_FILESYSTEMS = (("ext4", True), ("xfs", False))
_CONTROL = "/dev/loop-control"


def programs(path: str = _PATH) -> Iterator[Diagnosis]:
    for program, package, needed in _PROGRAMS:
        found = shutil.which(program, path=path)
        if found:
            yield good("programs.present", program, found)
        else:
            yield Diagnosis(
                state=BROKEN if needed else WARNING, id=f"programs.{package}-missing", subject=program,
                finding=f"is not in {path}", fix=f"install the package {package}",
            )  # fmt: skip


def examine(config: Config, *, on_node: bool, root: str = "/") -> Iterator[Diagnosis]:
    """`root`: where /dev, /proc and /lib are looked for."""
    if on_node and "loop" in config.words("volumes.backends"):
        yield _loop(root)
        for name, needed in _FILESYSTEMS:
            yield _filesystem(name, root, config.text("paths.host_root"), needed=needed)
    yield from _capabilities()
    doubt = confined.doubt("/")
    if doubt:
        yield warning("kernel.confinement-missing", "confined copies", f"volumes with the content of others cannot be "
                      f"made here: {doubt}")  # fmt: skip
    else:
        yield good("kernel.confinement", "confined copies", "tar is held in the directory that it writes to")


def _loop(root: str) -> Diagnosis:
    if os.path.exists(os.path.join(root, _CONTROL.lstrip("/"))):
        return good("kernel.loop", "loop devices", f"{_CONTROL} is there")
    fix = "`modprobe loop`; in a container, mount the host's /dev"
    return broken("kernel.loop-missing", "loop devices", f"there is no {_CONTROL}", fix)


def _filesystem(name: str, root: str, host: str, *, needed: bool) -> Diagnosis:
    """A container sees the node's modules below `host` only, if at all."""
    subject = f"filesystem {name}"
    try:
        with open(os.path.join(root, "proc/filesystems")) as file:
            known = {line.split()[-1] for line in file if line.strip()}
    except OSError as error:
        return unknown("doctor.not-looked", subject, f"/proc/filesystems: {error.strerror}")
    if name in known:
        return good("kernel.filesystem", subject, "the kernel mounts it")
    places = [place for place in (root, host) if os.path.isdir(_modules(place))]
    if any(loadable(name, place) for place in places):
        return good("kernel.filesystem", subject, "the kernel has a module of it, and loads it when it is mounted")
    if not places:
        finding = f"the kernel has not mounted it yet, and its modules are not seen ({_modules('/')})"
        return unknown("kernel.filesystem-missing", subject, finding, f"`modprobe {name}` on the node tells")
    return Diagnosis(
        state=BROKEN if needed else WARNING, id="kernel.filesystem-missing", subject=subject,
        finding="the kernel does not mount it, and has no module of it",
        fix=f"`modprobe {name}` (the package of this kernel's modules brings it); classes may name another fstype",
    )  # fmt: skip


def _modules(root: str) -> str:
    return os.path.join(root, "lib/modules", os.uname().release)


def loadable(module: str, root: str = "/") -> bool:
    """Whether the running kernel has a module of this name in it or on the disk."""
    base, wanted = _modules(root), f"/{module}.ko"
    for name in ("modules.builtin", "modules.dep"):
        try:
            with open(os.path.join(base, name)) as opened:
                if any(wanted in line.partition(":")[0] for line in opened):
                    return True
        except OSError:
            continue
    return False


def _capabilities() -> Iterator[Diagnosis]:
    with open("/proc/self/status") as status:
        effective = next(int(line.split()[1], 16) for line in status if line.startswith("CapEff"))
    for number, name, known, state, cost in (
        (_CAP_SYS_ADMIN, "CAP_SYS_ADMIN", "kernel.admin-missing", BROKEN, "nothing can be mounted"),
        (_CAP_SYS_RESOURCE, "CAP_SYS_RESOURCE", "kernel.resource-missing", WARNING,
         "a mounted ext4 cannot grow (XFS can, and both can while unmounted)"),
    ):  # fmt: skip
        if effective >> number & 1:
            yield Diagnosis(state=OK, id="kernel.capability", subject=name, finding="is granted")
        else:
            yield Diagnosis(state=state, id=known, subject=name, finding=f"is missing: {cost}")
