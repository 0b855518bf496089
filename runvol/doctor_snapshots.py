"""`runvol doctor` for root filesystems: the pool, the store, containerd's settings, the shared images."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping

from blockdev import BlockdevError, Deadline, devicemapper
from blockdev.devicemapper import Mapper
from guestmount import runtimes
from runvol import assembly
from runvol.config import Config
from runvol.diagnosis import BROKEN, OK, WARNING, Diagnosis
from snapshotter import backing, images
from snapshotter.errors import SnapshotterError
from snapshotter.images import Share
from snapshotter.node import STORE
from snapshotter.pool import Pool
from snapshotter.store import Store
from snapshotter.trust import Trust

_NAME = "runvol"
# Images of one kind that are named one by one.
_NAMED = 5


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
        yield Diagnosis(state=OK, subject="store", finding=f"{store.count()} snapshots, {len(doomed)} to be deleted")
        store.close()
    except SnapshotterError as error:
        yield Diagnosis(state=BROKEN, subject="store", finding=str(error))
        return
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


def _users(path: str, root: str) -> Iterator[str]:
    for plugin in runtimes.CRI_PLUGINS:
        for table in runtimes.tables(path, "plugins", plugin, "containerd", root=root):
            if table.get("snapshotter") == _NAME:
                yield "every runtime"
            for name, runtime in table.get("runtimes", {}).items():
                if isinstance(runtime, dict) and runtime.get("snapshotter") == _NAME:
                    yield str(name)


def _images(config: Config) -> Iterator[Diagnosis]:
    directory = config.text("snapshotter.images")
    if not directory:
        return
    trust = Trust(
        config.words("snapshotter.image_keys"), config.text("snapshotter.image_roots"),
        unsigned=bool(config.number("snapshotter.images_unsigned")),
    )  # fmt: skip
    yield from _trusts(config, trust)
    share, pins = Share(directory), _pins(config)
    try:
        chains = share.ask("listing the images", share.chains, Deadline.after(5))
        yield Diagnosis(state=OK, subject=directory, finding=f"{len(chains)} shared images")
        yield from _passed_over(share, trust, chains, pins)
    except SnapshotterError as error:
        yield Diagnosis(state=BROKEN, subject=directory, finding=str(error))


def _trusts(config: Config, trust: Trust) -> Iterator[Diagnosis]:
    """Whose images this node uses."""
    for trouble in trust.troubles():
        yield Diagnosis(state=BROKEN, subject="shared images", finding=trouble)
    if config.number("snapshotter.images_unsigned"):
        yield Diagnosis(state=WARNING, subject="shared images", finding="snapshotter.images_unsigned = 1: whoever can "
                        "write to the share decides what containers here run; `runvol images sign --all --key FILE`, "
                        "name the public key in snapshotter.image_keys, and set it to 0")  # fmt: skip
    elif trust.names():
        yield Diagnosis(state=OK, subject="shared images", finding=f"signed by {', '.join(trust.names())} are used")
    elif not config.text("snapshotter.image_roots"):
        yield Diagnosis(state=WARNING, subject="shared images", finding="only those are used that this node has used "
                        "before: name the public key that signs them in snapshotter.image_keys (`runvol images keygen "
                        "FILE` makes one), or list them in snapshotter.image_roots")  # fmt: skip


def _pins(config: Config) -> dict[str, str]:
    path = os.path.join(config.text("snapshotter.state_dir"), STORE)
    if not os.path.exists(path):
        return {}
    try:
        with contextlib.closing(Store(path)) as store:
            return images.pins(store)
    except SnapshotterError:
        return {}  # `_store` tells


def _passed_over(share: Share, trust: Trust, chains: list[str], pins: Mapping[str, str]) -> Iterator[Diagnosis]:
    """Images that this node does not use, or uses only since it did before: some by name, the others counted."""
    kinds: dict[tuple[str, str], list[Diagnosis]] = {}
    for chain in chains:
        said = share.said(chain, Deadline.after(5))
        if said is None:
            continue
        verdict, fresh = trust.judge(said, pins.get(chain)), trust.judge(said)
        if verdict.manifest is None:
            finding = f"is passed over, and its layers are pulled: {verdict.why}; {verdict.advice}"
            kind = ("passed over", verdict.reason)
        elif fresh.manifest is None:
            finding = f"is used only since this node has used it before: {fresh.why}; {fresh.advice}"
            kind = ("used", fresh.reason)
        else:
            continue
        kinds.setdefault(kind, []).append(Diagnosis(state=WARNING, subject=f"image {chain}", finding=finding))
    for (what, reason), found in sorted(kinds.items()):
        yield from found[:_NAMED]
        if len(found) > _NAMED:
            yield Diagnosis(state=WARNING, subject="shared images", finding=f"{len(found) - _NAMED} more are {what} "
                            f"({reason}); `runvol images` lists them")  # fmt: skip
