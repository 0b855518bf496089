"""Why a pool that is described is not assembled; looking changes nothing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

from blockdev import ioctls
from blockdev.devicemapper import Mapper, MapperError
from snapshotter import assembly, backing
from snapshotter.assembly import UUID
from snapshotter.backing import Description

INSTALL = "is not installed; install thin-provisioning-tools"
_THIN = "thin-pool"
_MODULE = "dm_thin_pool"


def installed(program: str) -> str:
    """Where it is; empty for nowhere."""
    return shutil.which(program, path="/usr/sbin:/sbin:/usr/bin:/bin:/usr/local/sbin:/usr/local/bin") or ""


def is_assembled(mapper: Mapper, it: Description) -> bool:
    """Whether the kernel has this very pool."""
    found = mapper.find(it.name)
    return found is not None and found.active and found.uuid == UUID + it.identity


def why(mapper: Mapper, state_dir: str, it: Description) -> str:
    """What is missing, with what to do; where nothing is, who assembles it."""
    return next(_reasons(mapper, state_dir, it))


def _reasons(mapper: Mapper, state_dir: str, it: Description) -> Iterator[str]:
    found = mapper.find(it.name)
    if found is not None and found.uuid != UUID + it.identity:
        yield (f"a mapped device {it.name} exists that is not this pool (its UUID is {found.uuid or 'empty'}); rename "
               "it, or describe this pool under another name")  # fmt: skip
    if begun := assembly.unfinished(state_dir, it):
        yield begun
    if trouble := kernel_trouble(mapper):
        yield trouble
    if not installed("thin_check"):
        yield f"thin_check {INSTALL}"
    file = os.path.join(state_dir, backing.FILE)
    for path in (it.metadata, it.data):
        if it.kind == "lvm":
            name = f"{it.group.replace('-', '--')}-{path.replace('-', '--')}"
            if mapper.find(name) is None:
                yield f"the logical volume {it.group}/{path} is not active; `lvchange -ay {it.group}/{path}` says why"
        elif it.kind == "loop" and not os.path.isfile(path):
            yield f"{path} does not exist; bring it back, {file} names it"
        elif it.kind == "device" and path and not ioctls.is_block(path):
            yield f"{path} is no block device now; bring it back, {file} names it"
    yield ("all that it stands on is there: `systemctl start runvol-snapshotter` assembles it, and what keeps it from "
           "that stands in its log; `runvol pool check` looks at its metadata")  # fmt: skip


def kernel_trouble(mapper: Mapper) -> str:
    """What the kernel lacks for thin pools, with what to do; empty for nothing. A module that can be loaded is none."""
    try:
        if _THIN in mapper.targets() or _loadable():
            return ""
    except MapperError as error:
        return f"device-mapper does not answer: {error}"
    return f"the kernel has no target {_THIN}: modprobe {_MODULE} (the package of this kernel's modules brings it)"


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
