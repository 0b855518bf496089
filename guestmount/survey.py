"""What there is on this node, looked at behind the calls for whoever watches it: volumes, how full they are, hand-offs.

A look costs a disk's and a server's time, and some servers are dead: so it is taken at an interval, each volume's with
an end of its own, and what is asked for meanwhile is the last one, with when it was taken. Nothing is opened for
writing.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from blockdev import Deadline, WaitExpired, disk_stats, holders, ioctls, nfs, sysfs
from blockdev.deadlines import bounded
from blockdev.disk_stats import DiskStats
from blockdev.holders import Io
from guestmount import usage, ways
from guestmount.claims import HOST, Claim, Target
from guestmount.errors import TROUBLE
from guestmount.known_pods import KnownPods
from guestmount.node import Node
from guestmount.ways import Usage
from volumes import VolumeError, VolumeKind, VolumeNotFound
from volumes.backend import Backend

log = logging.getLogger("runvol.survey")

# Seconds: for one volume, for a backend's list, between two looks that were asked for; of a stop.
_ONE, _LIST, _LEAST, _STOP = 3.0, 10.0, 0.2, 1.0
# Where nobody has the volume mounted, as a label.
NOBODY = "none"


@dataclass(frozen=True, kw_only=True)
class User:
    """One target: the pod, and its claim as the API server has told."""

    namespace: str
    pod: str
    persistent_volume_claim: str
    pod_uid: str = ""
    claim_uid: str = ""
    target: str = ""


@dataclass(frozen=True, kw_only=True)
class _Device:
    """A block device that carries a volume: where sysfs has it, on what it stands, and what it had done before."""

    place: str
    stands_on: str
    before: DiskStats


@dataclass(frozen=True, kw_only=True)
class Surveyed:
    """One volume that is staged or published. `owner`: the kernel that has it mounted. `usage` was true at `measured`
    (seconds since 1970); `trouble` says why it is no newer. `vmm`: the process of a guest that has its file open."""

    volume: str
    backend: str
    owner: str
    handler: str
    users: tuple[User, ...] = ()
    usage: Usage | None = None
    measured: float = 0.0
    trouble: str = ""
    device: _Device | None = None
    vmm: int = 0
    source: str = ""
    # Of files, on a filesystem that others use as well.
    files: bool = False

    @property
    def user(self) -> User:
        """Whose volume it is; of one that several pods have, what they have in common."""
        first = self.users[0] if self.users else User(namespace="", pod="", persistent_volume_claim="")
        return first if len(self.users) < 2 else dataclasses.replace(first, pod="")

    def io(self) -> DiskStats | None:
        """What its device has done since it was first seen; None where no device is its own."""
        device = self.device
        if device is None or sysfs.stands_on(device.place) != device.stands_on:
            return None
        now = disk_stats.read(device.place)
        return None if now is None else now.since(device.before)

    def vmm_io(self) -> Io | None:
        """What the guest's process has done, for all of its disks together."""
        return holders.io_of(self.vmm) if self.vmm else None


@dataclass(frozen=True, kw_only=True)
class Store:
    """One backend of this node: its volumes, what they may hold in all, and what can still be promised (bytes)."""

    volumes: int
    promised: int
    available: int


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One look. `handoffs` by dialect and state; `at`, and how long it took, in seconds."""

    volumes: tuple[Surveyed, ...] = ()
    left_out: int = 0
    damaged: int = 0
    # Targets whose hand-off is missing or damaged.
    lost: frozenset[str] = frozenset()
    handoffs: Mapping[tuple[str, str], int] = field(default_factory=dict)
    stores: Mapping[str, Store] = field(default_factory=dict)
    at: float = 0.0
    seconds: float = 0.0


class Survey:
    """Looks every `interval` seconds, and soon after it is asked to; `most` volumes are looked at one by one."""

    def __init__(
        self, node: Node, *, interval: float, most: int, listeners: Sequence[Callable[[Seen], None]] = ()
    ) -> None:
        """`listeners` are told of each look, in the thread that took it."""
        self._node, self.interval, self._most, self._listeners = node, interval, most, listeners
        # A copy that remembers for itself what it has read.
        self._claims = node.claims.patient(0.0)
        self._wanted, self._stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="survey", daemon=True)
        self.seen = Seen()
        self.failures = 0

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._wanted.set()
        self._thread.join(_STOP)

    def want(self) -> None:
        """Something has changed; the next look comes at once. Waits for nothing."""
        self._wanted.set()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self.look()
            except Exception:
                self.failures += 1
                log.exception("a look at the node's volumes failed; it is tried again")
            self._stop.wait(_LEAST)
            self._wanted.wait(max(0.0, self.interval - _LEAST))
            self._wanted.clear()

    def look(self) -> None:
        """`seen` is what there is now."""
        began = time.monotonic()
        claims, damaged = self._claims.known()
        before = {one.volume: one for one in self.seen.volumes}
        # Who was measured longest ago comes first: a slow server of some takes nothing from the others for ever.
        measured = {volume: one.measured for volume, one in before.items()}
        claims.sort(key=lambda claim: (measured.get(claim.volume, 0.0), claim.volume))
        surveyed = [self._one(claim, before.get(claim.volume)) for claim in claims[: self._most]]
        surveyed = self._measured(surveyed, {claim.volume: claim for claim in claims})
        surveyed = _with_processes(surveyed)
        handoffs, lost = self._handoffs(claims)
        self.seen = Seen(
            volumes=tuple(sorted(surveyed, key=lambda one: one.volume)),
            left_out=max(0, len(claims) - self._most),
            damaged=len(damaged),
            lost=lost,
            handoffs=handoffs,
            stores=self._stores(),
            at=time.time(),
            seconds=time.monotonic() - began,
        )
        for listener in self._listeners:
            listener(self.seen)

    def _one(self, claim: Claim, before: Surveyed | None) -> Surveyed:
        """As the claim says it; nothing is asked of a disk."""
        known = self._node.detector.pods
        heard = known if isinstance(known, KnownPods) else None
        owner, handler = _owner(claim)
        return Surveyed(
            volume=claim.volume,
            backend=self._backend(claim.volume),
            owner=owner,
            handler=handler,
            users=tuple(user_of(path, claim.targets[path], heard) for path in sorted(claim.targets)),
            usage=before.usage if before is not None else None,
            measured=before.measured if before is not None else 0.0,
            device=_device(claim, before),
            vmm=before.vmm if before is not None else 0,
            files=claim.kind is VolumeKind.FILES,
            source=claim.source if claim.kind is VolumeKind.BLOCK and owner not in (HOST, NOBODY) else "",
        )

    def _backend(self, volume_id: str) -> str:
        try:
            return self._node.catalog.of(volume_id).name
        except (VolumeError, VolumeNotFound):
            return "unknown"

    def _measured(self, found: Sequence[Surveyed], claims: Mapping[str, Claim]) -> list[Surveyed]:
        """With how full they are, as far as that is found out in the time of one interval."""
        until = Deadline.after(max(self.interval, 2 * _ONE))
        silent: set[str] = set()
        made = []
        for one in found:
            claim = claims[one.volume]
            server = claim.nfs.server if claim.nfs is not None else ""
            if server in silent:
                made.append(dataclasses.replace(one, trouble=f"the server {server} does not answer"))
                continue
            if not claim.targets or not until.remaining():
                made.append(one)
                continue
            try:
                made.append(dataclasses.replace(one, usage=_usage(claim), measured=time.time(), trouble=""))
            except (*TROUBLE, WaitExpired) as error:
                silent |= {server} - {""} if isinstance(error, WaitExpired | nfs.ServerSilent) else set()
                made.append(dataclasses.replace(one, trouble=str(error)))
            except Exception as error:  # of what a guest has written; the other volumes are still to come
                log.exception("a volume was not measured", extra={"volume": one.volume})
                made.append(dataclasses.replace(one, trouble=f"{type(error).__name__}: {error}"))
        return made

    def _handoffs(self, claims: Sequence[Claim]) -> tuple[Counter[tuple[str, str]], frozenset[str]]:
        """By dialect and state; and the targets whose hand-off is not what the claim says."""
        own = {path for claim in claims for path in claim.targets}
        found: Counter[tuple[str, str]] = Counter()
        damaged: set[str] = set()
        missing = {
            path: (claim.targets[path].dialect or (claim.owner.dialect if claim.owner else ""))
            for claim in claims for path in claim.targets if ways.way_at(claim, path).hands_over
        }  # fmt: skip
        for dialect in self._node.dialects:
            for one in dialect.delivered():
                missing.pop(one.target, None)
                damaged |= {one.target} & own if one.problem else set()
                found[one.dialect, _state(one.problem, one.closed, one.target in own)] += 1
        for dialect_name in missing.values():
            found[dialect_name, "missing"] += 1
        return found, frozenset(damaged | missing.keys())

    def _stores(self) -> dict[str, Store]:
        """Of the backends whose volumes lie on this node; the others' would ask servers."""
        found = {}
        for backend in self._node.catalog.backends:
            if backend.multi_node:
                continue
            try:
                found[backend.name] = _store(backend)
            except (*TROUBLE, WaitExpired) as error:
                log.debug("a backend was not looked at", extra={"backend": backend.name, "why": str(error)})
            except Exception:  # the other backends are still to come
                log.exception("a backend was not looked at", extra={"backend": backend.name})
        return found


def _store(backend: Backend) -> Store:
    def look() -> Store:
        listed = backend.list()
        promised = sum(volume.capacity_bytes for _place, volume in listed)
        return Store(volumes=len(listed), promised=promised, available=backend.available_bytes())

    return bounded(f"listing the volumes of {backend.name}", Deadline.after(_LIST), look)


def _usage(claim: Claim) -> Usage:
    path = min(claim.targets)
    return bounded(
        f"measuring volume {claim.volume}", Deadline.after(_ONE),
        lambda: usage.measure(claim, path, Deadline.after(_ONE)),
    )  # fmt: skip


def _owner(claim: Claim) -> tuple[str, str]:
    """The kernel that has the volume mounted, and the runtime handler of its pods."""
    handler = next((claim.targets[path].handler for path in sorted(claim.targets) if claim.targets[path].handler), "")
    if claim.owner is not None:
        return claim.owner.kind, claim.owner.handler or handler
    if not claim.targets:
        return NOBODY, ""
    return ("sandbox" if ways.in_guests(claim) else HOST), handler


def user_of(path: str, target: Target, known: KnownPods | None, patience: float = 0.0) -> User:
    """Who has a target; the claim as far as the API server has told, who may be asked for so many seconds."""
    volume = next(iter(path.rpartition("/volumes/")[2].split("/")[1:2]), "")  # kubernetes.io~DRIVER/NAME/mount
    _namespace, claimed, uid = known.claim_heard_of(volume, patience) if known is not None and volume else ("", "", "")
    return User(
        namespace=target.pod_namespace, pod=target.pod_name, persistent_volume_claim=claimed, pod_uid=target.pod_uid,
        claim_uid=uid, target=path,
    )  # fmt: skip


def _state(problem: str, closed: bool, ours: bool) -> str:
    if not ours:
        return "unclaimed"
    return "damaged" if problem else ("closed" if closed else "open")


def _device(claim: Claim, before: Surveyed | None) -> _Device | None:
    """The block device that is this volume's alone: a loop device on its file, or the volume itself."""
    if claim.kind is not VolumeKind.BLOCK or not claim.targets:
        return None
    try:
        place = bounded(f"looking for the device of volume {claim.volume}", Deadline.after(_ONE), lambda: _place(claim))
    except (*TROUBLE, WaitExpired):
        return None
    on, now = sysfs.stands_on(place), disk_stats.read(place)
    if now is None or (claim.device not in ("", claim.source) and not on):
        return None
    if (
        before is not None
        and before.device is not None
        and (before.device.place, before.device.stands_on) == (place, on)
    ):
        return before.device
    return _Device(place=place, stands_on=on, before=now)


def _place(claim: Claim) -> str:
    """Where sysfs has the device; empty for none. A file may lie on a server that is dead. OSError."""
    device = claim.device or (claim.source if ioctls.is_block(claim.source) else "")
    return disk_stats.directory(device) if device else ""


def _with_processes(found: Sequence[Surveyed]) -> list[Surveyed]:
    """With the guests' processes that have a volume's file open; those that are known are only looked at again."""
    held = {one.volume: one for one in found if one.source and one.device is None}

    def look() -> tuple[dict[str, int], dict[str, int]]:
        kept = {volume: one.vmm for volume, one in held.items() if one.vmm and holders.has_open(one.vmm, one.source)}
        return kept, holders.openers(one.source for volume, one in held.items() if volume not in kept)

    try:
        kept, opened = bounded("looking who has volumes open", Deadline.after(_LIST), look)
    except (*TROUBLE, WaitExpired) as error:
        log.debug("not looked who has volumes open", extra={"why": str(error)})
        kept, opened = {}, {}
    return [
        dataclasses.replace(one, vmm=kept.get(one.volume, opened.get(one.source, 0) if one.volume in held else 0))
        for one in found
    ]
