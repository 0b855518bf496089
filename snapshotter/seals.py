"""dm-verity on committed layers, for operators who ask for it (`snapshotter.verity`).

A layer is hashed behind its Commit, once. `<state>/seals/<device>` holds the tree, a fact of the store its root. A View
that is made after that reads verified blocks, through three devices: the thin one, dm-verity on it, and a loop device
that turns the small reads of a mount into those that dm-verity takes. What a container writes to stands on the thin
device itself and is not verified. A tree takes 0.8 % of the layer's size, holes included.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import threading
import time
from collections.abc import Callable

from blockdev import Deadline, durable, loops, sysfs
from blockdev.devicemapper import Mapper, MapperError, node
from blockdev.dm_targets import SECTOR, Verity
from blockdev.errors import BlockdevError
from snapshotter import verity
from snapshotter.background import Background
from snapshotter.errors import SnapshotterError
from snapshotter.model import Kind, Snapshot
from snapshotter.pool import DeviceMissing, Pool
from snapshotter.store import Store
from snapshotter.workers import aside

log = logging.getLogger("runvol.snapshotter")
_NEW = ".new"
# Seconds until a layer that was still open is looked at again.
_PAUSE = 0.5
# Of the fact with a layer's root, before the device; and of the directory that has the trees.
FACT, TREES = "seal ", "seals"


class Seals:
    """The trees of one pool's layers, and the devices that read through them. `rest` lets calls pass, while one is made
    after each step."""

    def __init__(
        self, mapper: Mapper, store: Store, pool: Pool, directory: str, rest: Callable[[], object] = lambda: None
    ) -> None:
        self._rest = rest
        self._mapper, self._store, self._pool, self._directory = mapper, store, pool, directory
        os.makedirs(directory, mode=0o700, exist_ok=True)
        # The device that is being hashed; whoever unmaps devices behind the calls takes turns with who maps it.
        self._making = 0
        self._turn = threading.Lock()

    def make(self, layer: Snapshot) -> bool:
        """Hash a committed layer; False while somebody still has it open, who might write to it.

        A layer whose device is gone is left alone, and so is one on a shared image, which has a tree of its own.
        """
        if not layer.device or layer.image or self.of(layer.device) is not None:
            return True
        with self._turn:
            self._making = layer.device
        try:
            return self._pool.deactivate(layer.device) and self._make(layer)
        finally:
            self._making = 0

    def _make(self, layer: Snapshot) -> bool:
        path, salt = self._path(layer.device), os.urandom(32)
        try:
            self._pool.activate(layer.device, layer.size, read_only=True)
        except DeviceMissing:
            return True
        root = verity.build(self._pool.path(layer.device), path + _NEW, salt, self._rested)
        os.rename(path + _NEW, path)
        durable.sync_directory(self._directory)
        with self._store.transaction():
            row = self._store.find(layer.key)
            if row is None or row.device != layer.device:
                os.unlink(path)  # it was removed meanwhile
                return True
            self._store.set_fact(f"{FACT}{layer.device}", json.dumps([root, salt.hex()]))
        return True

    def _rested(self, _done: int) -> None:
        self._rest()

    def of(self, device: int) -> tuple[str, str] | None:
        """Root and salt of a sealed layer, in hexadecimal."""
        found = self._store.read_fact(f"{FACT}{device}")
        return None if found is None else tuple(json.loads(found))

    def open(self, view: Snapshot, layer: int, deadline: Deadline) -> str:
        """The node that reads verified blocks of a View of the sealed device `layer`; made now if it is not there.

        SnapshotterError if the tree is gone. The View's thin device must be mapped.
        """
        seal = self.of(layer)
        if seal is None:
            return self._pool.path(view.device)
        name = self._name(view.device)
        if (found := self._mapper.find(name)) is not None and not found.active:
            self._mapper.remove(name)  # a killed process had made it without a table
            found = None
        if found is not None and (between := loops.whole(node(name), through_cache=True)):
            return between
        with aside():
            if found is None:
                self._map(view, layer, seal, deadline)
            return loops.whole(node(name), through_cache=True) or loops.cached(node(name), deadline=deadline)

    def _map(self, view: Snapshot, layer: int, seal: tuple[str, str], deadline: Deadline) -> None:
        path, name = self._path(layer), self._name(view.device)
        if not os.path.exists(path):
            raise SnapshotterError(f"the seal {path} of the layer under {view.key!r} is gone; pull its image again")
        table = Verity(
            length=view.size // SECTOR, data=self._pool.path(view.device),
            hashes=loops.whole(path) or loops.attach(path, deadline=deadline, read_only=True),
            data_blocks=view.size // verity.BLOCK, hash_start=0, root=seal[0], salt=seal[1],
        )  # fmt: skip
        uuid = f"RUNVOL-SEAL-{self._pool.identity}-{view.device}"
        self._mapper.establish(name, [table], uuid=uuid, read_only=True)

    def unmap(self, device: int) -> bool:
        """Whether the thin device is unmapped, with what stood on it; False for one that is being hashed just now."""
        with self._turn:
            return device != self._making and self.release(device) and self._pool.deactivate(device)

    def release(self, device: int) -> bool:
        """Nothing of ours stands on this thin device any more; False while somebody has it open."""
        name = self._name(device)
        if self._mapper.find(name) is None:
            return True
        if not all(loops.clear(one) for one in loops.find(node(name))):
            return False
        below = self._mapper.dependencies(name)
        try:
            self._mapper.remove(name)
        except MapperError:
            return False
        thin = self._mapper.find(self._pool.device_name(device))
        for number in below:
            if thin is None or number != thin.number:
                # Other Views of the layer may read the same tree; the last one lets it go.
                with contextlib.suppress(OSError):
                    loops.clear(f"/dev/{sysfs.name(number)}")
        return True

    def forget(self, device: int) -> None:
        """The layer is gone."""
        fact = f"{FACT}{device}"
        if self._store.read_fact(fact) is not None:
            with self._store.transaction(durable=False):
                self._store.forget_facts([fact])
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path(device))

    def sweep(self) -> list[str]:
        """Remove trees without a fact and facts without a layer, which a killed process left; their names."""
        known, devices = set(self._store.facts(FACT)), self._store.devices()
        gone = []
        for name in os.listdir(self._directory):
            if not name.isdecimal() or f"{FACT}{name}" not in known or int(name) not in devices:
                os.unlink(os.path.join(self._directory, name))
                gone.append(name)
        numbers = {fact: fact.removeprefix(FACT) for fact in known}
        stale = [fact for fact, one in numbers.items() if not one.isdecimal() or int(one) not in devices]
        if stale:
            with self._store.transaction():
                self._store.forget_facts(stale)
        return gone

    def _path(self, device: int) -> str:
        return os.path.join(self._directory, str(device))

    def _name(self, device: int) -> str:
        return f"{self._pool.device_name(device)}-seal"


class Sealer:
    """A thread that seals what was committed, one layer after the other. `after` is told of devices it had mapped."""

    def __init__(
        self, seals: Seals, store: Store, after: Callable[[int], None], background: Background | None = None
    ) -> None:
        self._background = background or Background()
        self._seals, self._store, self._after = seals, store, after
        self._keys: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="sealer", daemon=True)

    def start(self) -> None:
        """Layers that were committed and not sealed come first. May be repeated if it failed."""
        if self._thread.ident is None:
            self._thread.start()
            self._background.started(self._thread)
        for page in self._store.pages():
            for row in page:
                self.tell(row.key)

    def tell(self, key: str) -> None:
        self._keys.put(key)

    def stop(self) -> None:
        """The layer under way is left half-hashed; the next start begins it anew."""
        self._keys.put(None)

    def _run(self) -> None:
        while (key := self._keys.get()) is not None:
            done = True
            with self._background.survived("sealing layers"):
                done = self.seal(key)
            if not done:
                time.sleep(_PAUSE)
                self._keys.put(key)

    def seal(self, key: str) -> bool:
        """Seal one layer now; False if it has to be tried again.

        What cannot be sealed is logged, and read without verification as before.
        """
        row = self._store.sound(key)
        if row is None or row.kind is not Kind.COMMITTED or not row.device or self._seals.of(row.device):
            return True
        try:
            return self._seals.make(row)
        except (SnapshotterError, BlockdevError, OSError) as error:
            log.warning("a layer is not sealed", extra={"key": key, "why": str(error)})
            return True
        finally:
            self._after(row.device)
