"""Images on shared storage: a chain of layers as one read-only filesystem, kept once for all nodes.

`<directory>/<hex of the chain id>/` holds `image`, `hashes` (dm-verity's tree) and `manifest.json`; it appears whole,
by a rename. A node maps it through dm-verity, so that a wrong block is never read, and containers are thin devices of
the local pool with that as their external origin. Shared storage may hang: whatever touches it has a limit, and while
one look at it hangs, others are refused at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import msgspec

from blockdev import Deadline, WaitExpired, durable, ioctls, loops, sparse, superblocks
from blockdev.deadlines import bounded
from blockdev.devicemapper import Mapper, MapperError, node
from blockdev.dm_targets import SECTOR, Verity
from snapshotter import bases, verity
from snapshotter.errors import BadRequest, NotFound, SnapshotterError, Unavailable
from snapshotter.model import LABEL_REF, Kind, Snapshot, State
from snapshotter.store import Store

_CHAIN = re.compile(r"sha256:[0-9a-f]{64}\Z")
_MANIFEST = "manifest.json"
# How long shared storage may take to answer, in seconds.
PATIENCE = 3.0
T = TypeVar("T")


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`manifest.json`. `size` is in bytes; `root` and `salt` are dm-verity's, in hexadecimal."""

    chain: str
    fstype: str
    size: int
    root: str
    salt: str
    made: str


class Share:
    """The directory. Every method may raise Unavailable, within PATIENCE."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self._hanging: threading.Thread | None = None
        self._lock = threading.Lock()

    def place(self, chain: str) -> str:
        return os.path.join(self.directory, chain.removeprefix("sha256:"))

    def ask(self, what: str, work: Callable[[], T], deadline: Deadline) -> T:
        """Run `work`, which touches the share. Only one such thread may ever hang."""
        with self._lock:
            if self._hanging is not None and self._hanging.is_alive():
                raise Unavailable(f"the shared images in {self.directory} do not answer (since {self._hanging.name})")
            self._hanging = None
        thread: list[threading.Thread] = []

        def noted() -> T:
            thread.append(threading.current_thread())
            return work()

        try:
            return bounded(what, Deadline.after(min(PATIENCE, deadline.remaining())), noted)
        except WaitExpired as error:
            with self._lock:
                self._hanging = thread[0] if thread else None
                if thread:
                    thread[0].name = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            raise Unavailable(f"the shared images in {self.directory} do not answer: {error}") from None
        except OSError as error:
            raise Unavailable(f"the shared images in {self.directory}: {error}") from None

    def manifest(self, chain: str, deadline: Deadline) -> Manifest | None:
        """What the share says of this chain; None if it has no such image."""
        if not _CHAIN.match(chain):
            return None
        path = os.path.join(self.place(chain), _MANIFEST)

        def read() -> bytes | None:
            try:
                with open(path, "rb") as opened:
                    return opened.read(65536)
            except FileNotFoundError:
                return None

        raw = self.ask(f"reading {path}", read, deadline)
        return None if raw is None else _decoded(path, chain, raw)

    def chains(self) -> list[str]:
        """The images that are whole."""
        names = os.listdir(self.directory)
        return sorted(f"sha256:{name}" for name in names if _CHAIN.match(f"sha256:{name}"))

    def make(
        self, chain: str, device: str, fstype: str, *, progress: Callable[[str, int], None] | None = None
    ) -> Manifest:
        """Copy the filesystem on `device` into the share, with its hash tree; one that exists is left as it is."""
        if not _CHAIN.match(chain):
            raise BadRequest("chain id", chain, "is sha256: and 64 hexadecimal digits")
        if os.path.exists(self.place(chain)):
            found = self.manifest(chain, Deadline.after(PATIENCE))
            assert_whole(found, chain)
            return found  # type: ignore[return-value]
        size = ioctls.size_bytes(device)
        beside = os.path.join(self.directory, f".{chain[7:]}.{secrets.token_hex(4)}")
        os.makedirs(beside, mode=0o755)
        try:
            image = os.path.join(beside, "image")
            with open(image, "wb") as opened:
                opened.truncate(size)
            sparse.copy_written(device, image, lambda done: progress and progress("copying", done))
            salt = secrets.token_bytes(32)
            hashes = os.path.join(beside, "hashes")
            root = verity.build(image, hashes, salt, lambda done: progress and progress("hashing", done))
            made = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            manifest = Manifest(chain=chain, fstype=fstype, size=size, root=root, salt=salt.hex(), made=made)
            durable.write(os.path.join(beside, _MANIFEST), msgspec.json.encode(manifest))
            os.chmod(os.path.join(beside, _MANIFEST), 0o644)
            durable.sync_directory(beside)
            with contextlib.suppress(OSError):
                # Somebody else may have been faster; both are the same image.
                os.rename(beside, self.place(chain))
            durable.sync_directory(self.directory)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        found = self.manifest(chain, Deadline.after(PATIENCE))
        assert_whole(found, chain)
        return found  # type: ignore[return-value]

    def check(self, chain: str, progress: Callable[[str, int], None] | None = None) -> str:
        """Read everything; what is wrong, or nothing."""
        manifest = self.manifest(chain, Deadline.after(PATIENCE))
        if manifest is None:
            raise NotFound(chain, "image")
        image = os.path.join(self.place(chain), "image")
        if os.path.getsize(image) != manifest.size:
            return f"{image} has {os.path.getsize(image)} bytes instead of {manifest.size}"
        root = verity.root_of(
            image, bytes.fromhex(manifest.salt), lambda done: progress and progress("reading", done)
        )  # fmt: skip
        return "" if root == manifest.root else f"{image} is not what it was when the image was made"

    def remove(self, chain: str) -> None:
        """It is gone for new containers at once; nodes that have it mapped keep their files until they let go."""
        if not os.path.exists(self.place(chain)):
            raise NotFound(chain, "image")
        beside = os.path.join(self.directory, f".{chain[7:]}.{secrets.token_hex(4)}.removed")
        os.rename(self.place(chain), beside)
        shutil.rmtree(beside)


def assert_whole(found: Manifest | None, chain: str) -> None:
    if found is None:
        raise SnapshotterError(f"the image of {chain} is there without its manifest; remove its directory")


def _decoded(path: str, chain: str, raw: bytes) -> Manifest:
    try:
        manifest = msgspec.json.decode(raw, type=Manifest)
        bytes.fromhex(manifest.root), bytes.fromhex(manifest.salt)
    except (msgspec.MsgspecError, ValueError) as error:
        raise SnapshotterError(f"{path}: {error}; remove this image and make it again") from None
    if manifest.chain != chain or len(manifest.root) != 64 or manifest.size % SECTOR or manifest.size <= 0:
        raise SnapshotterError(f"{path} does not describe {chain}; remove this image and make it again")
    bases.check(manifest.fstype, manifest.size)
    return manifest


class Images:
    """What one node does with a share: answer for its chains, map them for containers, let go of them."""

    def __init__(self, mapper: Mapper, store: Store, share: Share) -> None:
        self._mapper, self._store, self.share = mapper, store, share
        self._lock = threading.Lock()

    def claim(self, parent: str, labels: Mapping[str, str], deadline: Deadline, /) -> bool:
        """Whether the chain that is about to be extracted is there already: only if the share has that very chain.

        It is registered as committed then, with the reference that containerd looks for.
        """
        chain = labels.get(LABEL_REF, "")
        if not chain:
            return False
        try:
            manifest = self.share.manifest(chain, deadline)
        except Unavailable:
            # The layers can be pulled as ever.
            return False
        if manifest is None:
            return False
        self._pin(manifest)
        name = f"runvol-image/{chain}/{hashlib.sha256(parent.encode()).hexdigest()[:16]}"
        now = time.time_ns()
        with self._store.transaction():
            if parent:
                above = self._store.find(parent)
                if above is None or above.kind is not Kind.COMMITTED:
                    raise NotFound(parent, "parent")
            if self._store.find(name) is None:
                self._store.insert(
                    Snapshot(key=name, parent=parent, kind=Kind.COMMITTED, state=State.READY, device=0,
                             size=manifest.size, fstype=manifest.fstype, created=now, updated=now, image=chain,
                             labels=dict(labels))
                )  # fmt: skip
        return True

    def _pin(self, manifest: Manifest) -> None:
        """What a chain's content is was decided when this node first used it; SnapshotterError if it changed since."""
        name, value = f"image {manifest.chain}", json.dumps([manifest.root, manifest.salt, manifest.size])
        known = self._store.read_fact(name)
        if known is None:
            with self._store.transaction():
                self._store.set_fact(name, value)
        elif known != value:
            raise SnapshotterError(
                f"the shared image of {manifest.chain} is not the one that this node has used before; somebody "
                "replaced it. Restore it, or remove every snapshot of it on this node first"
            )

    def _unpin(self) -> None:
        """Chains that no snapshot of this node stands on may be replaced on the share."""
        free = [name for name in self._store.facts("image ") if not self._store.with_image(name.removeprefix("image "))]
        if free:
            with self._store.transaction():
                self._store.forget_facts(free)

    def name(self, chain: str) -> str:
        return f"runvol-image-{chain[7:39]}"

    def origin(self, chain: str, deadline: Deadline, /) -> str:
        """A read-only device that reads verified blocks; mapped now if it is not yet. Its filesystem can be read.

        dm-verity takes aligned reads of 4096 bytes only, and a mount begins with smaller ones, which a thin device
        hands down as they are. So a loop device lies between, and all containers share its cache.
        """
        with self._lock:
            path = node(self.name(chain))
            if self._mapper.find(self.name(chain)) is None:
                self._map(chain, deadline)
            found = self.share.ask(f"reading image {chain}", lambda: _superblock(path), deadline)
            if found is None:
                raise SnapshotterError(f"the image of {chain} holds no filesystem; `runvol images check {chain}`")
            between = loops.find(path)
            return between[0] if between else loops.cached(path, deadline=deadline)

    def _map(self, chain: str, deadline: Deadline) -> None:
        manifest = self.share.manifest(chain, deadline)
        if manifest is None:
            raise Unavailable(f"the shared image of {chain} is not in {self.share.directory} any more")
        self._pin(manifest)
        place = self.share.place(chain)
        files = [os.path.join(place, part) for part in ("image", "hashes")]

        def attach() -> tuple[str, str]:
            if os.path.getsize(files[0]) != manifest.size:
                raise SnapshotterError(f"{files[0]} has not the {manifest.size} bytes that its manifest promises")
            return _attached(files[0], deadline), _attached(files[1], deadline)

        image, hashes = self.share.ask(f"attaching image {chain}", attach, deadline)
        name = self.name(chain)
        table = Verity(length=manifest.size // SECTOR, data=image, hashes=hashes,
                       data_blocks=manifest.size // verity.BLOCK, hash_start=0, root=manifest.root,
                       salt=manifest.salt)  # fmt: skip
        self._mapper.establish(name, [table], uuid=f"RUNVOL-IMAGE-{chain[7:]}", read_only=True)

    def release_unused(self) -> list[str]:
        """Unmap images that no snapshot needs; their chains."""
        gone = []
        self._unpin()
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


def _attached(path: str, deadline: Deadline) -> str:
    found = loops.find(path)
    return found[0] if found else loops.attach(path, deadline=deadline, read_only=True)


def _detach(number: str) -> None:
    """Let a loop device go, known by its number, whose file may have been removed."""
    with contextlib.suppress(OSError):
        device = f"/dev/{os.path.basename(os.path.realpath(f'/sys/dev/block/{number}'))}"
        loops.clear(device)


def _superblock(path: str) -> object:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        # Past the cache: what was read before says nothing about the share as it is now.
        os.posix_fadvise(fd, 0, 65536, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
    return superblocks.read(path)
