"""`runvol doctor` for root filesystems: the pool, the store, containerd's settings, the shared images."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence

from blockdev import BlockdevError, Deadline, devicemapper, disk_troubles
from blockdev.devicemapper import Mapper
from blockdev.dm_targets import MAX_THIN_ID, PoolStatus
from runvol import assembly, doctor_gauge, doctor_proxy_plugin, pool_absence
from runvol.config import Config
from runvol.diagnosis import BROKEN, OK, WARNING, Diagnosis, broken, good, warning
from runvol.gauge_place import gauge_path
from runvol.sizes import words as size
from snapshotter import backing, names, store_seen
from snapshotter.errors import SnapshotterError
from snapshotter.gauge import fill
from snapshotter.images import Share
from snapshotter.node import STORE
from snapshotter.pool import Pool
from snapshotter.trust import Trust
from snapshotter.watermarks import Health

# Percent of the device ids that were given, from which on an operator is told.
_MANY_IDS = 75
_SHARE = "shared images"
# Images of one kind that are named one by one.
_NAMED = 5


def examine(config: Config) -> Iterator[Diagnosis]:
    """What there is; where no pool was made yet, what setting it up still takes."""
    state = config.text("snapshotter.state_dir")
    try:
        description = backing.load(state)
    except SnapshotterError as error:
        yield broken("pool.description-damaged", "pool", str(error))
        return
    if description is None:
        yield from _newcomer(config, state)
        return
    yield from _programs(config)
    yield from _promised(description)
    trouble = _kernel()
    yield trouble
    if trouble.state == OK:
        yield from _pool(config, description)
    yield from _store(state)
    yield from doctor_proxy_plugin.examine(config)
    yield from _images(config)


def _newcomer(config: Config, state: str) -> Iterator[Diagnosis]:
    """A node need not have it: only one whose containerd has an entry of it lacks something."""
    known = doctor_proxy_plugin.entry(config) is not None
    if known:
        yield broken("pool.missing", "pool", f"none is described in {state}, and containerd has an entry of the "
                     "snapshotter: it can start nothing on it")  # fmt: skip
        yield from _programs(config)
        yield _kernel()
        yield from doctor_proxy_plugin.examine(config)
        return
    lacking = [one for one in (*_programs(config), _kernel()) if one.state != OK]
    path = assembly.places(config).taken().config
    yield good("pool.not-set-up", "pool", f"none is described in {state}; `runvol pool init` makes one (only for root "
               "filesystems on device-mapper)")  # fmt: skip
    for one in lacking:
        yield good("pool.not-set-up", f"pool: {one.subject}", f"{one.finding}; first {one.fix}")
    yield good("containerd.not-there", "snapshotter in containerd", f"{path} has no [proxy_plugins.runvol]; "
               f"{doctor_proxy_plugin.COMMAND} prints or writes the file that has")  # fmt: skip


def _programs(config: Config) -> Iterator[Diagnosis]:
    """Only what these settings need."""
    ext4 = config.text("snapshotter.fstype") == "ext4"
    package = "e2fsprogs" if ext4 else "xfsprogs"
    for program in ("mkfs.ext4", "debugfs") if ext4 else ("mkfs.xfs",):
        yield _program(program, package, BROKEN, "root filesystems cannot be made")
    if not ext4 and gauge_path(config) and not pool_absence.installed("mkfs.ext4"):
        yield warning("programs.e2fsprogs-missing", "mkfs.ext4", "is not installed: it makes the filesystem that shows "
                      "the pool's fill", "install the package e2fsprogs, or `snapshotter.gauge = \"\"`")  # fmt: skip
    tools = "thin-provisioning-tools"
    for program in ("thin_check", "thin_ls", "thin_delta"):
        yield _program(program, tools, BROKEN, "no pool can be served")
    yield _program("thin_repair", tools, WARNING, "`runvol pool check --repair` takes it")


def _program(program: str, package: str, state: str, cost: str) -> Diagnosis:
    found = pool_absence.installed(program)
    if found:
        return good("programs.present", program, found)
    return Diagnosis(state=state, id=f"programs.{package}-missing", subject=program,
                     finding=f"is not installed: {cost}", fix=f"install the package {package}")  # fmt: skip


def _kernel() -> Diagnosis:
    subject = "device-mapper"
    if not devicemapper.available():
        return broken("devicemapper.missing", subject, "/dev/mapper/control does not open")
    with Mapper() as mapper:
        trouble = pool_absence.kernel_trouble(mapper)
    if trouble is None:
        return good("devicemapper.kernel", subject, "the kernel has thin pools")
    if trouble.why.startswith("device-mapper does not answer"):
        return broken("devicemapper.missing", subject, trouble.why)
    return broken("devicemapper.thin-pool-missing", subject, trouble.why)


# By `pool.Health.mode`.
_HEALTH = {
    "failed": "pool.failed",
    "needs_check": "pool.needs-check",
    "out_of_data_space": "pool.data-full",
    "out_of_metadata": "pool.metadata-full",
    "read_only": "pool.read-only",
}


def _pool(config: Config, description: backing.Description) -> Iterator[Diagnosis]:
    from runvol.serve_snapshots import limits

    subject, state = "pool", config.text("snapshotter.state_dir")
    try:
        with Mapper() as mapper:
            if not pool_absence.is_assembled(mapper, description):
                yield _absent(mapper, state, description)
                return
            pool = Pool(mapper, description.name, description.identity, "", limits(config))
            if pool_absence.stays_suspended(mapper, description.name):
                yield broken("pool.suspended", subject, f"{description.name} {pool_absence.SUSPENDED}")
            status = pool.status()
            for finding in pool.health(status):
                yield _health(finding, _remedy(finding, status, description))
            wanted = fill(status, description.block, pool.limits.data_reserve)
        yield from doctor_gauge.examine(gauge_path(config), state, wanted)
    except (SnapshotterError, BlockdevError, ValueError) as error:
        yield broken("pool.unreadable", subject, str(error))


def _absent(mapper: Mapper, state: str, description: backing.Description) -> Diagnosis:
    absence = pool_absence.why(mapper, state, description)
    known = "pool.foreign" if absence.foreign else "pool.not-assembled"
    return broken(known, "pool", f"{description.name} is not assembled: {absence.why}", absence.todo)


def _promised(description: backing.Description) -> Iterator[Diagnosis]:
    """A pool in files may be larger than their disk has room for."""
    if description.kind != "loop":
        return
    owed, path = 0, description.data
    try:
        for one in (description.data, description.metadata):
            facts = os.stat(one)
            owed += max(0, facts.st_size - facts.st_blocks * 512)
        disk = os.statvfs(os.path.dirname(path))
    except OSError:
        return  # that a file is not there is told where the pool is looked at
    free = disk.f_bavail * disk.f_frsize
    if owed > free:
        yield warning("pool.over-promised", "pool", f"{path} was promised {size(owed)} that it does not have yet, and "
                      f"its disk has {size(free)} free")  # fmt: skip


def _remedy(finding: Health, status: PoolStatus, description: backing.Description) -> str:
    """What makes this pool larger, in the part that lacks room; empty where that does not help."""
    remedies, known = backing.remedies(description), _HEALTH.get(finding.mode, "pool.filling")
    data, metadata = (used / max(1, total) for used, total in (
        (status.data_used, status.data_total), (status.metadata_used, status.metadata_total)))  # fmt: skip
    if known == "pool.metadata-full" or (known == "pool.filling" and metadata > data):
        return remedies.metadata
    return f"{remedies.data}, or remove images" if known in ("pool.data-full", "pool.filling") else ""


def _health(finding: Health, remedy: str) -> Diagnosis:
    if finding.state == OK:
        return good("pool.health", "pool", finding.message)
    known = _HEALTH.get(finding.mode, "pool.filling")
    return Diagnosis(state=finding.state, id=known, subject="pool",
                     finding=finding.message.partition(": ")[0], fix=remedy)  # fmt: skip


def _store(state: str) -> Iterator[Diagnosis]:
    path, subject = os.path.join(state, STORE), "snapshotter's store"
    if trouble := disk_troubles.by_looking(state):
        yield broken("snapshotter.disk-refuses", subject, f"the filesystem of {state} takes no writes: {trouble}")
        return
    if not os.path.exists(path):
        yield warning("snapshotter.store-missing", subject, f"{path} does not exist: the snapshotter never ran")
        return
    try:
        seen = store_seen.seen(path)
    except SnapshotterError as error:
        yield broken("snapshotter.store-damaged", subject, str(error))
        return
    yield good("snapshotter.store", subject, f"{seen.snapshots} snapshots, {seen.doomed} to be deleted")
    used = seen.following * 100 // MAX_THIN_ID
    if seen.past:
        yield broken("snapshotter.other-past", subject, seen.past)
    if seen.damaged:
        yield _rows_damaged(seen.damaged)
    if used >= _MANY_IDS:
        yield warning("snapshotter.ids-running-out", "device ids", f"{used}% of the pool's {MAX_THIN_ID} device ids "
                      "were given")  # fmt: skip
    if seen.quarantined:
        yield warning("snapshotter.quarantine", "quarantine", f"{seen.quarantined} devices of the pool belong to no "
                      "snapshot")  # fmt: skip


def _rows_damaged(keys: Sequence[str]) -> Diagnosis:
    """One line for all of them: the first by name, with the command by which containerd forgets it."""
    first, others = keys[0], len(keys) - 1
    typed = names.forgetting(first)
    fix = f"`{typed}`" if typed else "remove it in containerd"
    return warning("snapshotter.rows-damaged", "damaged rows", f"what the store says of {len(keys)} snapshots is "
                   f"damaged, and they are passed over: {first[:200]!r}{f', and {others} more' if others else ''}",
                   f"{fix}{', and the others alike' if others else ''}, then make anew what is missing (pull the "
                   "image, start the container); what it had is quarantined")  # fmt: skip


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
        yield good("images.share", _SHARE, f"{len(chains)} in {directory}")
        yield from _passed_over(share, trust, chains, pins)
    except SnapshotterError as error:
        yield broken("images.unreadable", _SHARE, str(error))


def _trusts(config: Config, trust: Trust) -> Iterator[Diagnosis]:
    """Whose images this node uses."""
    for trouble in trust.troubles():
        yield broken("images.trust-damaged", _SHARE, trouble)
    if config.number("snapshotter.images_unsigned"):
        yield warning("images.unsigned-used", _SHARE, "snapshotter.images_unsigned = 1: whoever can write to the share "
                      "decides what containers here run")  # fmt: skip
    elif trust.names():
        yield good("images.trusted", _SHARE, f"signed by {', '.join(trust.names())} are used")
    elif not config.text("snapshotter.image_roots"):
        yield warning("images.nobody-trusted", _SHARE, "only those are used that this node has used before: no public "
                      "key is named, and no list")  # fmt: skip


def _pins(config: Config) -> Mapping[str, str]:
    path = os.path.join(config.text("snapshotter.state_dir"), STORE)
    if not os.path.exists(path):
        return {}
    try:
        return store_seen.seen(path).pins
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
            one = warning("images.passed-over", f"image {chain}", f"is passed over, and its layers are pulled: "
                          f"{verdict.why}", verdict.advice)  # fmt: skip
            kind = (one.id, verdict.reason)
        elif fresh.manifest is None:
            one = warning("images.used-since-before", f"image {chain}", "is used only since this node has used it "
                          f"before: {fresh.why}", fresh.advice)  # fmt: skip
            kind = (one.id, fresh.reason)
        else:
            continue
        kinds.setdefault(kind, []).append(one)
    for (known, reason), found in sorted(kinds.items()):
        yield from found[:_NAMED]
        if len(found) > _NAMED:
            yield warning(known, _SHARE, f"{len(found) - _NAMED} more ({reason})", "`runvol images` lists them")
