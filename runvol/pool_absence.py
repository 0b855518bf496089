"""Why a pool that is described is not assembled, or stands still; looking changes nothing."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass

from blockdev import ioctls
from blockdev.devicemapper import Mapper, MapperError
from snapshotter import assembly, backing
from snapshotter.assembly import UUID
from snapshotter.backing import Description

_THIN = "thin-pool"
_MODULE = "dm_thin_pool"
SUSPENDED = "is suspended: whatever is read or written on it waits"
# Seconds for which an extension may have the pool suspended.
_EXTENDING = 1.0


def installed(program: str) -> str:
    """Where it is; empty for nowhere."""
    return shutil.which(program, path="/usr/sbin:/sbin:/usr/bin:/bin:/usr/local/sbin:/usr/local/bin") or ""


def is_assembled(mapper: Mapper, it: Description) -> bool:
    """Whether the kernel has this very pool."""
    found = mapper.find(it.name)
    return found is not None and found.active and found.uuid == UUID + it.identity


def stays_suspended(mapper: Mapper, name: str) -> bool:
    """Whether the pool is, and not just for the moment in which it is made larger."""

    def is_suspended() -> bool:
        found = mapper.find(name)
        return found is not None and found.suspended

    until = time.monotonic() + _EXTENDING
    while is_suspended():
        if time.monotonic() > until:
            return True
        time.sleep(0.05)
    return False


@dataclass(frozen=True, kw_only=True)
class Absence:
    """Why a pool is not assembled, and what to do; what is typed stands between backquotes."""

    why: str
    todo: str
    foreign: bool = False

    def __str__(self) -> str:
        return f"{self.why}; {self.todo}"


def why(mapper: Mapper, state_dir: str, it: Description) -> Absence:
    """What is missing, with what to do; where nothing is, who assembles it."""
    return next(_reasons(mapper, state_dir, it))


def _reasons(mapper: Mapper, state_dir: str, it: Description) -> Iterator[Absence]:
    found = mapper.find(it.name)
    if found is not None and found.uuid != UUID + it.identity:
        said = f"a mapped device {it.name} exists that is not this pool (its UUID is {found.uuid or 'empty'})"
        yield Absence(why=said, todo="rename it, or describe this pool under another name", foreign=True)
    if begun := assembly.unfinished(state_dir, it):
        yield Absence(why=f"{begun[0]} did not end", todo=f"repeat {begun[1]}")
    if trouble := kernel_trouble(mapper):
        yield trouble
    if not installed("thin_check"):
        yield Absence(why="thin_check is not installed", todo="install thin-provisioning-tools")
    file = os.path.join(state_dir, backing.FILE)
    for path in (it.metadata, it.data):
        if it.kind == "lvm":
            name = f"{it.group.replace('-', '--')}-{path.replace('-', '--')}"
            if mapper.find(name) is None:
                volume = f"{it.group}/{path}"
                yield Absence(why=f"the logical volume {volume} is not active",
                              todo=f"`lvchange -ay {volume}` activates it, or says why not")  # fmt: skip
        elif it.kind == "loop" and not os.path.isfile(path):
            yield Absence(why=f"{path} does not exist", todo=f"bring it back, {file} names it")
        elif it.kind == "device" and path and not ioctls.is_block(path):
            yield Absence(why=f"{path} is no block device now", todo=f"bring it back, {file} names it")
    yield Absence(why="all that it stands on is there, and nobody has assembled it",
                  todo="`systemctl start runvol-snapshotter` does; what keeps it from that stands in its log, and "
                  "`runvol pool check` looks at the metadata")  # fmt: skip


def kernel_trouble(mapper: Mapper) -> Absence | None:
    """What the kernel lacks for thin pools; None for nothing. A module that can be loaded is none."""
    try:
        if _THIN in mapper.targets() or _loadable():
            return None
    except MapperError as error:
        return Absence(why=f"device-mapper does not answer: {error}", todo=f"`modprobe -a dm_mod {_MODULE}`, as root")
    return Absence(why=f"the kernel has no target {_THIN}",
                   todo=f"`modprobe {_MODULE}` (the package of this kernel's modules brings it)")  # fmt: skip


def _loadable() -> bool:
    base = f"/lib/modules/{os.uname().release}"
    for name in ("modules.builtin", "modules.dep"):
        try:
            with open(os.path.join(base, name)) as opened:
                if any("/dm-thin-pool.ko" in line for line in opened):
                    return True
        except OSError:
            continue
    return False
