"""`runvol doctor` for root filesystems: the pool, the store, containerd's settings, the shared images."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

from blockdev import BlockdevError, Deadline, devicemapper
from blockdev.devicemapper import Mapper
from blockdev.dm_targets import MAX_THIN_ID
from guestmount import runtimes
from runvol import assembly
from runvol.config import Config
from runvol.diagnosis import BROKEN, OK, WARNING, Diagnosis
from snapshotter import backing
from snapshotter.errors import SnapshotterError
from snapshotter.images import Share
from snapshotter.node import STORE
from snapshotter.pool import Pool
from snapshotter.store import Store

_NAME = "runvol"
# Percent of the device ids that were given, from which on an operator is told.
_MANY_IDS = 75


def examine(config: Config) -> Iterator[Diagnosis]:
    """Nothing but one line where no pool was ever made."""
    state = config.text("snapshotter.state_dir")
    try:
        description = backing.load(state)
    except SnapshotterError as error:
        yield Diagnosis(state=BROKEN, subject="pool", finding=str(error))
        return
    if description is None:
        yield Diagnosis(state=OK, subject="snapshotter", finding="not set up; `runvol pool init` makes a pool")
        return
    yield from _kernel()
    yield from _pool(config, description)
    yield from _store(state)
    yield from _containerd(config)
    yield from _images(config)


def _kernel() -> Iterator[Diagnosis]:
    for program in ("thin_check", "thin_ls", "thin_delta", "thin_repair", "debugfs"):
        found = shutil.which(program, path="/usr/sbin:/sbin:/usr/bin:/bin")
        missing = "not installed; install thin-provisioning-tools and e2fsprogs"
        yield Diagnosis(state=OK if found else BROKEN, subject=program, finding=found or missing)
    if not devicemapper.available():
        yield Diagnosis(state=BROKEN, subject="device-mapper", finding="/dev/mapper/control does not open: modprobe "
                        "dm_mod dm_thin_pool, and run as root")  # fmt: skip


def _pool(config: Config, description: backing.Description) -> Iterator[Diagnosis]:
    if not devicemapper.available():
        return
    from runvol.serve_snapshots import limits

    try:
        with Mapper() as mapper:
            pool = Pool(mapper, description.name, description.identity, "", limits(config))
            for finding in pool.health():
                yield Diagnosis(state=finding.state, subject=f"pool {pool.name}", finding=finding.message)
    except (SnapshotterError, BlockdevError, ValueError) as error:
        yield Diagnosis(state=BROKEN, subject=f"pool {description.name}", finding=str(error))


def _store(state: str) -> Iterator[Diagnosis]:
    path = os.path.join(state, STORE)
    if not os.path.exists(path):
        yield Diagnosis(state=WARNING, subject="store", finding=f"{path} does not exist: the snapshotter never ran")
        return
    try:
        store = Store(path)
        quarantined, doomed = store.quarantined(), store.doomed()
        past, used = store.read_fact("past"), store.following() * 100 // MAX_THIN_ID
        yield Diagnosis(state=OK, subject="store", finding=f"{store.count()} snapshots, {len(doomed)} to be deleted")
        store.close()
    except SnapshotterError as error:
        yield Diagnosis(state=BROKEN, subject="store", finding=str(error))
        return
    if past:
        yield Diagnosis(state=BROKEN, subject="store", finding=past)
    if used >= _MANY_IDS:
        yield Diagnosis(state=WARNING, subject="store", finding=f"{used}% of the pool's {MAX_THIN_ID} device ids were "
                        "given; then a new epoch begins by itself, with those that nothing has any more")  # fmt: skip
    if quarantined:
        yield Diagnosis(state=WARNING, subject="store", finding=f"{len(quarantined)} devices of the pool belong to no "
                        "snapshot; `runvol pool quarantine` lists and frees them")  # fmt: skip


def _containerd(config: Config) -> Iterator[Diagnosis]:
    path, root = assembly.places(config).taken().config, config.text("paths.host_root")
    plugins = [table for table in runtimes.tables(path, "proxy_plugins", _NAME, root=root) if table]
    address = config.text("snapshotter.endpoint").removeprefix("unix://")
    if not plugins:
        yield Diagnosis(state=WARNING, subject=path, finding=f"has no [proxy_plugins.{_NAME}]: containerd does not "
                        "know the snapshotter; see deploy/containerd")  # fmt: skip
        return
    said = str(plugins[-1].get("address", ""))
    if said != address:
        yield Diagnosis(state=BROKEN, subject=path, finding=f"proxy_plugins.{_NAME}.address is {said!r}, but the "
                        f"snapshotter listens on {address!r}")  # fmt: skip
    users = sorted(_users(path, root))
    yield Diagnosis(
        state=OK if users else WARNING,
        subject="runtimes on it",
        finding=", ".join(users) if users else f"none: set snapshotter = {_NAME!r} in a runtime's table of {path}",
    )
    if config.text("snapshotter.images"):
        yield from _annotations(path, root, plugins[-1])


def _users(path: str, root: str) -> Iterator[str]:
    for plugin in runtimes.CRI_PLUGINS:
        for table in runtimes.tables(path, "plugins", plugin, "containerd", root=root):
            if table.get("snapshotter") == _NAME:
                yield "every runtime"
            for name, runtime in table.get("runtimes", {}).items():
                if isinstance(runtime, dict) and runtime.get("snapshotter") == _NAME:
                    yield str(name)


def _annotations(path: str, root: str, plugin: Mapping[str, Any]) -> Iterator[Diagnosis]:
    """Without the labels containerd asks for no chain by name, and every image is pulled."""
    disabled = True
    for names in (("io.containerd.cri.v1.images",), ("io.containerd.grpc.v1.cri", "containerd")):
        for table in runtimes.tables(path, "plugins", *names, root=root):
            disabled = bool(table.get("disable_snapshot_annotations", disabled))
    remote = str(dict(plugin.get("exports", {})).get("enable_remote_snapshot_annotations", "")) == "true"
    wanted = (
        "images on shared storage need disable_snapshot_annotations = false (CRI) or "
        'exports.enable_remote_snapshot_annotations = "true" (transfer service)'
    )
    if disabled and not remote:
        yield Diagnosis(state=BROKEN, subject=path, finding=wanted)
    else:
        yield Diagnosis(state=OK, subject=path, finding="sends the labels that shared images need")


def _images(config: Config) -> Iterator[Diagnosis]:
    directory = config.text("snapshotter.images")
    if not directory:
        return
    share = Share(directory)
    try:
        count = len(share.ask("listing the images", share.chains, Deadline.after(5)))
        yield Diagnosis(state=OK, subject=directory, finding=f"{count} shared images")
    except SnapshotterError as error:
        yield Diagnosis(state=BROKEN, subject=directory, finding=str(error))
