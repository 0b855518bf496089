"""An image that several containerd namespaces of a node have is stored once.

containerd keeps namespaces apart and unpacks an image in each. A layer whose chain another namespace has committed is
answered from there: a snapshot of its device, which costs a few blocks of metadata, is registered as committed with the
reference that containerd looks for. Each has a row and a device of its own, so neither notices when the other goes.

The chain id is the name under which a client of containerd has committed the layer, and every such client is root on
this node: with sharing, what one namespace's client calls by a chain id is what the others get.
"""

from __future__ import annotations

import hashlib
import queue
import re
import threading
import time
from collections.abc import Mapping

from blockdev import Deadline
from snapshotter.copies import Copies
from snapshotter.model import LABEL_PARENT_CHAIN, LABEL_REF, Kind, Snapshot, State, chain_of
from snapshotter.pool import DeviceMissing
from snapshotter.store import Store

_CHAIN = re.compile(r"sha256:[0-9a-f]{64}\Z")


class Layers:
    """The layers of this node by their chain ids. Safe to use from several threads."""

    def __init__(self, store: Store, copies: Copies) -> None:
        self._store, self._copies = store, copies
        self._lock = threading.Lock()
        self._keys: dict[str, dict[str, None]] | None = None
        self._new: queue.SimpleQueue[str] = queue.SimpleQueue()

    def claim(
        self, key: str, parent: str, labels: Mapping[str, str], fstype: str, size: int, deadline: Deadline
    ) -> bool:
        """Whether the layer that is about to be unpacked is there: the same chain on the same chain, in a filesystem of
        this type and size. It is registered as committed then. May be repeated, and interrupted.
        """
        chain = labels.get(LABEL_REF, "")
        if not _CHAIN.match(chain):
            return False
        found = self._find(chain, parent, labels, fstype, size)
        if found is None:
            return False
        place = hashlib.sha256(parent.encode()).hexdigest()[:16]
        name = f"runvol-layer/{key.split('/', 1)[0]}/{chain}/{place}"
        if self._store.get(name) is not None:
            return True
        try:
            return self._register(name, found, parent, labels, deadline)
        except DeviceMissing:
            # It was removed meanwhile: the layer is unpacked as ever.
            return False

    def _register(
        self, name: str, found: Snapshot, parent: str, labels: Mapping[str, str], deadline: Deadline
    ) -> bool:  # fmt: skip
        now = time.time_ns()
        counted = self._store.counted(found.device)
        with self._copies.made(found.device, deadline) as device, self._store.transaction():
            again, above = self._store.find(found.key), self._store.find(parent) if parent else None
            if again is None or again.device != found.device or (parent and above is None):
                return False
            if self._store.find(name) is None:
                self._store.adopt(device)
                self._store.insert(
                    Snapshot(key=name, parent=parent, kind=Kind.COMMITTED, state=State.READY, device=device,
                             size=found.size, fstype=found.fstype, created=now, updated=now, labels=dict(labels))
                )  # fmt: skip
                if counted is not None and counted.final:
                    self._store.set_counted(device, counted)
        self.committed(name)
        return True

    def _find(self, chain: str, parent: str, labels: Mapping[str, str], fstype: str, size: int) -> Snapshot | None:
        below = self._chain(parent)
        if parent and not below:
            return None
        if labels.get(LABEL_PARENT_CHAIN, below) != below:
            return None
        for key in self._named(chain):
            row = self._store.sound(key)
            if row is None or row.kind is not Kind.COMMITTED or chain_of(row) != chain:
                self._forget(chain, key)
            elif (row.fstype, row.size, self._chain(row.parent)) == (fstype, size, below) and self._is_sound(row):
                return row
        return None

    def _is_sound(self, row: Snapshot) -> bool:
        """Whether nobody else's data can be on its device, and all of its own is."""
        return bool(row.device) and not row.image and row.state is State.READY and not (
            row.device in self._store.shared or self._store.is_foreign(row.device))  # fmt: skip

    def _chain(self, key: str) -> str:
        """Of a committed layer; empty for none, or for what was not unpacked from an image."""
        row = self._store.get(key) if key else None
        return chain_of(row) if row is not None and row.kind is Kind.COMMITTED else ""

    def committed(self, key: str) -> None:
        """There is one more committed snapshot."""
        if self._keys is not None:
            self._new.put(key)

    def _forget(self, chain: str, key: str) -> None:
        with self._lock:
            if self._keys is not None:
                self._keys.get(chain, {}).pop(key, None)

    def _named(self, chain: str) -> list[str]:
        with self._lock:
            if self._keys is None:
                self._keys = {}
                for page in self._store.pages():
                    self._add(page)
            while not self._new.empty():
                row = self._store.sound(self._new.get())
                self._add([] if row is None else [row])
            return list(self._keys.get(chain, {}))

    def _add(self, rows: list[Snapshot]) -> None:
        for row in rows:
            if self._keys is not None and row.kind is Kind.COMMITTED and (chain := chain_of(row)):
                self._keys.setdefault(chain, {})[row.key] = None
