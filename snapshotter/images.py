"""Images on shared storage: a chain of layers as one read-only filesystem, kept once for all nodes.

A node maps an image through dm-verity, so that a wrong block is never read, and containers are thin devices of the
local pool with that as their external origin. Which root hash is the right one, the operator's keys say (`trust`), and
from then on what this node remembers. Nothing is ever written to the share (`shares`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Mapping
from typing import NamedTuple

from blockdev import Deadline, loops, superblocks, sysfs
from blockdev.devicemapper import Mapper, MapperError, node
from blockdev.dm_targets import SECTOR, Verity
from snapshotter import verity
from snapshotter.errors import NotFound, SnapshotterError, Unavailable, WrongState
from snapshotter.manifests import CHAIN, Manifest
from snapshotter.model import LABEL_REF, Kind, Snapshot, State
from snapshotter.shares import PATIENCE, Parts, Share
from snapshotter.store import Store
from snapshotter.trust import REPLACED, Trust, Verdict, pin_of

log = logging.getLogger("runvol.snapshotter")
# Of the fact that a chain is pinned by, before the chain.
PIN = "image "
# Chains of which it is remembered that a line was logged.
_MOST_SAID = 10_000


class _Wanted(NamedTuple):
    """As a pin has it: dm-verity's root and salt, in hexadecimal, and the size in bytes."""

    root: str
    salt: str
    size: int


class Images:
    """What one node does with a share: answer for its chains, map them for containers, let go of them."""

    def __init__(self, mapper: Mapper, store: Store, share: Share, trust: Trust | None = None) -> None:
        self._mapper, self._store, self.share, self.trust = mapper, store, share, trust or Trust()
        self._lock = threading.Lock()
        self._counting = threading.Lock()
        self._passed_over: dict[str, int] = {}
        self._said: dict[str, str] = {}

    def claim(self, parent: str, labels: Mapping[str, str], deadline: Deadline, /) -> bool:
        """Whether the chain that is about to be extracted is there already: only if the share has that very chain, and
        it is trusted.

        It is registered as committed then, with the reference that containerd looks for. Otherwise its layers are
        pulled as ever, whatever lies on the share.
        """
        chain = labels.get(LABEL_REF, "")
        if not CHAIN.match(chain):
            return False
        try:
            said = self.share.said(chain, deadline)
        except Unavailable:
            return False
        if said is None:
            return False
        verdict = self.trust.judge(said, self._pin(chain))
        if verdict.manifest is not None:
            verdict = self._register(verdict, parent, labels)
        if verdict.manifest is None:
            self._pass_over(chain, verdict)
        return verdict.manifest is not None

    def _register(self, verdict: Verdict, parent: str, labels: Mapping[str, str]) -> Verdict:
        manifest = verdict.manifest
        assert manifest is not None  # noqa: S101
        chain, now = manifest.chain, time.time_ns()
        name = f"runvol-image/{chain}/{hashlib.sha256(parent.encode()).hexdigest()[:16]}"
        with self._store.transaction():
            if parent:
                above = self._store.find(parent)
                if above is None or above.kind is not Kind.COMMITTED:
                    raise NotFound(parent, "parent")
            # What a chain's content is was decided when this node first used it, which another call may just have done.
            pin = self._store.fact(f"{PIN}{chain}")
            if pin is not None and pin != pin_of(manifest):
                return Verdict(reason=REPLACED, why="another image of this chain has come into use here meanwhile")
            if pin is None:
                self._store.set_fact(f"{PIN}{chain}", pin_of(manifest))
            if self._store.find(name) is None:
                self._store.insert(
                    Snapshot(key=name, parent=parent, kind=Kind.COMMITTED, state=State.READY, device=0,
                             size=manifest.size, fstype=manifest.fstype, created=now, updated=now, image=chain,
                             labels=dict(labels))
                )  # fmt: skip
        return verdict

    def _pass_over(self, chain: str, verdict: Verdict) -> None:
        """Count it; the first time, and when the reason is another, say so."""
        with self._counting:
            self._passed_over[verdict.reason] = self._passed_over.get(verdict.reason, 0) + 1
            new = self._said.get(chain) != verdict.reason
            if new and len(self._said) >= _MOST_SAID:
                self._said.clear()
            self._said[chain] = verdict.reason
        if new:
            log.warning("a shared image is passed over, and its layers are pulled",
                        extra={"chain": chain, "why": verdict.why, "advice": verdict.advice,
                               "troubles": self.trust.troubles()})  # fmt: skip

    def passed_over(self) -> dict[str, int]:
        """How often an image was not used, by reason, since the start."""
        with self._counting:
            return dict(self._passed_over)

    def _pin(self, chain: str) -> str | None:
        return self._store.read_fact(f"{PIN}{chain}")

    def name(self, chain: str) -> str:
        return f"runvol-image-{chain[7:39]}"

    def origin(self, chain: str, deadline: Deadline, /) -> str:
        """A read-only device that reads verified blocks; mapped now if it is not yet. Its filesystem can be read.

        dm-verity takes aligned reads of 4096 bytes only, and a mount begins with smaller ones, which a thin device
        hands down as they are. So a loop device lies between, and all containers share its cache.
        """
        with self._lock:
            path = node(self.name(chain))
            if not self._is_mapped(chain, deadline):
                self._map(chain, deadline)
            found = self.share.ask(f"reading image {chain}", lambda: _superblock(path), deadline)
            if found is None:
                raise SnapshotterError(f"the image of {chain} holds no filesystem; `runvol images check {chain}`")
            return loops.whole(path, through_cache=True) or loops.cached(path, deadline=deadline)

    def _is_mapped(self, chain: str, deadline: Deadline) -> bool:
        """Whether it is; what a killed process has left without a table goes."""
        name = self.name(chain)
        found = self._mapper.find(name)
        if found is None:
            return False
        if found.uuid != _uuid(chain):
            raise SnapshotterError(
                f"a mapped device {name} exists that is not the image of {chain} (UUID {found.uuid or 'empty'}); "
                "remove it"
            )
        if not found.active:
            self._mapper.remove(name)
            return False
        if self._wanted(chain, deadline).root not in self._mapper.lines(name, table=True)[0][1].split():
            raise SnapshotterError(
                f"the image of {chain} that is mapped here has another root than the one to be used; it goes once no "
                "container needs it"
            )
        return True

    def _wanted(self, chain: str, deadline: Deadline) -> _Wanted:
        """What is mapped for the chain: what this node has decided on, whatever the share says by now."""
        pin = self._pin(chain)
        if pin is not None:
            return _Wanted(*json.loads(pin))
        found = self._judged(chain, deadline).manifest
        assert found is not None  # noqa: S101
        return _Wanted(found.root, found.salt, found.size)

    def _judged(self, chain: str, deadline: Deadline) -> Verdict:
        """Unavailable if the share has no image of the chain, SnapshotterError if it has another, or one that is not
        trusted and was not used here before."""
        said, pin = self.share.said(chain, deadline), self._pin(chain)
        if said is None:
            raise Unavailable(f"the shared image of {chain} is not in {self.share.directory} any more")
        verdict = self.trust.judge(said, pin)
        if verdict.manifest is None and (pin is None or verdict.reason == REPLACED):
            raise SnapshotterError(f"the shared image of {chain} is not used: {verdict.why}; {verdict.advice}")
        return verdict

    def _map(self, chain: str, deadline: Deadline) -> None:
        self._judged(chain, deadline)
        it = self._wanted(chain, deadline)

        def attach() -> tuple[str, str]:
            try:
                with self.share.parts(chain) as parts:
                    return _attached(self.share.place(chain), it.size, parts, deadline)
            except FileNotFoundError as error:
                raise Unavailable(f"the shared image of {chain} is not whole: {error}") from None

        image, hashes = self.share.ask(f"attaching image {chain}", attach, deadline)
        table = Verity(length=it.size // SECTOR, data=image, hashes=hashes, data_blocks=it.size // verity.BLOCK,
                       hash_start=0, root=it.root, salt=it.salt)  # fmt: skip
        try:
            self._mapper.establish(self.name(chain), [table], uuid=_uuid(chain), read_only=True)
        except MapperError as error:
            for device in (image, hashes):
                with contextlib.suppress(OSError):
                    loops.clear(device)
            raise SnapshotterError(f"the image of {chain} cannot be mapped: {error}") from None

    def release_unused(self) -> list[str]:
        """Unmap images that no snapshot needs; their names."""
        gone = []
        names = {self.name(chain) for chain in self._store.images()}
        with self._lock:
            for entry in self._mapper.devices():
                if not entry.name.startswith("runvol-image-") or entry.name in names:
                    continue
                if not all(loops.clear(device) for device in loops.find(node(entry.name))):
                    continue
                below = self._mapper.dependencies(entry.name)
                try:
                    self._mapper.remove(entry.name)
                except MapperError:
                    continue
                for number in below:
                    _detach(number)
                gone.append(entry.name)
        return gone


def pins(store: Store) -> dict[str, str]:
    """Chains whose content this node has decided on, with that."""
    found = ((name.removeprefix(PIN), store.read_fact(name)) for name in store.facts(PIN))
    return {chain: pin for chain, pin in found if pin is not None}


def forget(store: Store, chain: str) -> None:
    """The node may use another image for the chain from now on. WrongState while a snapshot stands on it, NotFound."""
    with store.transaction():
        if store.fact(f"{PIN}{chain}") is None:
            raise NotFound(chain, "image in use on this node")
        users = store.with_image(chain)
        if users:
            raise WrongState(
                f"the image of {chain} cannot be forgotten: {len(users)} snapshots of this node stand on it, such as "
                f"{users[0].key!r}; remove them first"
            )
        store.forget_facts([f"{PIN}{chain}"])


def _uuid(chain: str) -> str:
    return f"RUNVOL-IMAGE-{chain[7:]}"


def _attached(place: str, size: int, parts: Parts, deadline: Deadline) -> tuple[str, str]:
    """Loop devices on the image and its tree: on what is open, whatever is in the share by now."""
    if lacking := parts.lacks(size):
        raise SnapshotterError(f"{place}/{lacking}; remove this image and make it again")
    return _loop(parts.image, deadline), _loop(parts.hashes, deadline)


def _loop(path: str, deadline: Deadline) -> str:
    return loops.whole(path) or loops.attach(path, deadline=deadline, read_only=True)


def _detach(number: str) -> None:
    """Let a loop device go, known by its number, whose file may have been removed."""
    with contextlib.suppress(OSError):
        loops.clear(f"/dev/{sysfs.name(number)}")


def _superblock(path: str) -> object:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        # Past the cache: what was read before says nothing about the share as it is now.
        os.posix_fadvise(fd, 0, 65536, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
    return superblocks.read(path)


__all__ = ["PATIENCE", "Images", "Manifest", "Share", "forget", "pins"]
