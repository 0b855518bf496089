"""`runvol doctor` for root filesystems: the pool, the store, containerd's settings, the shared images."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping

from blockdev import BlockdevError, Deadline, devicemapper
from blockdev.devicemapper import Mapper
from blockdev.dm_targets import MAX_THIN_ID
from runvol import assembly, doctor_gauge, doctor_proxy_plugin, pool_absence
from runvol.config import Config
from runvol.diagnosis import BROKEN, OK, WARNING, Diagnosis
from runvol.gauge_place import gauge_path
from snapshotter import backing, images
from snapshotter.errors import SnapshotterError
from snapshotter.failures import disk_trouble
from snapshotter.gauge import fill
from snapshotter.images import Share
from snapshotter.node import STORE
from snapshotter.pool import Pool
from snapshotter.store import Store
from snapshotter.trust import Trust

# Percent of the device ids that were given, from which on an operator is told.
_MANY_IDS = 75
# Images of one kind that are named one by one.
_NAMED = 5


def examine(config: Config) -> Iterator[Diagnosis]:
    """What there is; where no pool was made yet, what setting it up still takes."""
    state = config.text("snapshotter.state_dir")
    try:
        description = backing.load(state)
    except SnapshotterError as error:
        yield Diagnosis(state=BROKEN, subject="pool", finding=str(error))
        return
    if description is None:
        yield from _newcomer(config, state)
        return
    yield from _programs(config)
    if trouble := _kernel_trouble():
        yield Diagnosis(state=BROKEN, subject="device-mapper", finding=trouble)
    else:
        yield from _pool(config, description)
    yield from _store(state)
    yield from doctor_proxy_plugin.examine(config)
    yield from _images(config)


def _newcomer(config: Config, state: str) -> Iterator[Diagnosis]:
    """A node need not have it: only one whose containerd has an entry of it lacks something."""
    known = doctor_proxy_plugin.entry(config) is not None
    yield Diagnosis(
        state=BROKEN if known else OK, subject="snapshotter",
        finding=f"no pool is described in {state}; `runvol pool init` makes one"
        + (": containerd has an entry of the snapshotter, and can start nothing on it" if known else
           " (only for root filesystems on device-mapper)"),
    )  # fmt: skip
    lacking = [one for one in _programs(config) if one.state != OK]
    if trouble := _kernel_trouble():
        lacking.append(Diagnosis(state=BROKEN, subject="device-mapper", finding=trouble))
    for one in lacking:
        yield Diagnosis(state=one.state if known else OK, subject=f"snapshotter: {one.subject}", finding=one.finding)
    if known:
        yield from doctor_proxy_plugin.examine(config)
    else:
        path = assembly.places(config).taken().config
        yield Diagnosis(state=OK, subject="snapshotter: containerd", finding=f"{path} has no [proxy_plugins.runvol]; "
                        f"{doctor_proxy_plugin.COMMAND} prints or writes the file that has")  # fmt: skip


def _programs(config: Config) -> Iterator[Diagnosis]:
    """Only what these settings need."""
    ext4 = config.text("snapshotter.fstype") == "ext4"
    package = "e2fsprogs" if ext4 else "xfsprogs"
    for program in ("mkfs.ext4", "debugfs") if ext4 else ("mkfs.xfs",):
        found = pool_absence.installed(program)
        yield Diagnosis(state=OK if found else BROKEN, subject=program,
                        finding=found or f"is not installed; install {package}")  # fmt: skip
    if not ext4 and gauge_path(config) and not pool_absence.installed("mkfs.ext4"):
        yield Diagnosis(state=WARNING, subject="mkfs.ext4", finding="is not installed; install e2fsprogs, for the "
                        "filesystem that shows the pool's fill, or set snapshotter.gauge to an empty text")  # fmt: skip
    for program, needed, what in (
        ("thin_check", True, ""),
        ("thin_ls", True, ""),
        ("thin_delta", True, ""),
        ("thin_repair", False, ", for `runvol pool check --repair`"),
    ):
        found = pool_absence.installed(program)
        state = OK if found else (BROKEN if needed else WARNING)
        yield Diagnosis(state=state, subject=program, finding=found or pool_absence.INSTALL + what)


def _kernel_trouble() -> str:
    if not devicemapper.available():
        return "/dev/mapper/control does not open: modprobe dm_mod dm_thin_pool, and run as root"
    with Mapper() as mapper:
        return pool_absence.kernel_trouble(mapper)


def _pool(config: Config, description: backing.Description) -> Iterator[Diagnosis]:
    from runvol.serve_snapshots import limits

    subject = f"pool {description.name}"
    try:
        with Mapper() as mapper:
            if not pool_absence.is_assembled(mapper, description):
                reason = pool_absence.why(mapper, config.text("snapshotter.state_dir"), description)
                yield Diagnosis(state=BROKEN, subject=subject, finding=f"is not assembled: {reason}")
                return
            pool = Pool(mapper, description.name, description.identity, "", limits(config))
            for finding in pool.health():
                yield Diagnosis(state=finding.state, subject=subject, finding=finding.message)
            wanted = fill(pool.status(), description.block, pool.limits.data_reserve)
        yield from doctor_gauge.examine(gauge_path(config), config.text("snapshotter.state_dir"), wanted)
    except (SnapshotterError, BlockdevError, ValueError) as error:
        yield Diagnosis(state=BROKEN, subject=subject, finding=str(error))


def _store(state: str) -> Iterator[Diagnosis]:
    path = os.path.join(state, STORE)
    if trouble := disk_trouble(path, flush=True):
        yield Diagnosis(state=BROKEN, subject="store", finding=f"the filesystem of {state} takes no writes: {trouble}. "
                        "Put its disk right, stop the service, mount the filesystem anew, start it")  # fmt: skip
        return
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
