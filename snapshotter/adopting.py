"""`runvol pool adopt`: a thin pool that is there already becomes the one that is described and served.

Either it is one of runvol's own whose state was lost: its keeper, its mark, the tag of its volumes, the mapped pool, or
the store beside tell whose it is, and it comes back under its own identity, untouched, so that `runvol pool
repair-store` can take the store from it. Or it is somebody else's: all its devices are quarantined, which means never
mapped, deleted or given, and what is written is the keeper, the pool's stamp, and a mark where devices need one.
"""

from __future__ import annotations

import os
import stat
import time
from dataclasses import dataclass
from typing import Literal

import msgspec

from blockdev import Deadline, exclusivity, ioctls, loops
from blockdev.devicemapper import Mapper
from blockdev.errors import DeviceBusy
from snapshotter import assembly, backing, existing, making, stamps, strangers, turns
from snapshotter.alone import Alone
from snapshotter.backing import Backing, Description
from snapshotter.errors import BadRequest, PoolRefused
from snapshotter.existing import Look
from snapshotter.keeper import Keeper
from snapshotter.pool import KEEPER, Pool
from snapshotter.stamps import Stamp
from snapshotter.store import STORE, Store
from snapshotter.superblock import Superblock

_GRAIN = 4 << 20


@dataclass(frozen=True, kw_only=True)
class Claim:
    """Where the pool is said to be: on one device or two, on the logical volumes `data` and `metadata` of `group`, or
    in the files `data` and `metadata`. Without `name` it has the one that it tells of itself, or `runvol`.

    `metadata_size`, in bytes, is asked for only where one device is split and nothing in it tells where.
    """

    name: str = ""
    device: str = ""
    metadata_device: str = ""
    group: str = ""
    data: str = ""
    metadata: str = ""
    metadata_size: int = 0

    @property
    def kind(self) -> Literal["loop", "device", "lvm"]:
        return "device" if self.device else "lvm" if self.group else "loop"


@dataclass(frozen=True, kw_only=True)
class Adopted:
    """`own`: it was runvol's already, and its store may be taken from it. `quarantined`: how many devices are."""

    name: str
    own: bool
    quarantined: int = 0


def adopt(mapper: Mapper, state_dir: str, claim: Claim, deadline: Deadline) -> Adopted:
    """PoolRefused where no sound thin pool is, where anybody uses it, or where the state has a pool; BadRequest for
    what cannot be meant. Interrupted, the same call goes on."""
    _check(claim)
    with turns.whole(state_dir):
        existing.clear(mapper)
        described = backing.load(state_dir)
        if described is not None and not assembly.is_adopted_half(state_dir, described):
            raise assembly.already(state_dir, described)
        found = _Found(mapper, state_dir, claim, deadline)
        try:
            if described is not None:
                found.go_on_with(described)
            else:
                found.describe()
            with turns.only_pool(found.it.identity):
                return found.adopt()
        finally:
            found.let_go()


def _check(claim: Claim) -> None:
    if claim.name:
        backing.check_name(claim.name)
    files = claim.kind == "loop" and bool(claim.data or claim.metadata)
    if sum(map(bool, (claim.device, claim.group, files))) != 1:
        raise BadRequest("--device, --vg, --data-file", "", "takes exactly one of them")
    if claim.kind != "device" and not (claim.data and claim.metadata):
        options = "--data, --metadata" if claim.group else "--data-file, --metadata-file"
        raise BadRequest(options, f"{claim.data}, {claim.metadata}", "both are needed")
    if claim.metadata_device and not claim.device:
        raise BadRequest("--metadata-device", claim.metadata_device, "goes with --device only")
    if claim.metadata_size and (claim.metadata_device or not claim.device):
        raise BadRequest("--metadata-size", claim.metadata_size, "goes with --device alone, which is split there")


class _Found:
    """The pool, as far as it is known; `it` is its description in the end."""

    def __init__(self, mapper: Mapper, state_dir: str, claim: Claim, deadline: Deadline) -> None:
        self._mapper, self._state_dir, self._claim, self._deadline = mapper, state_dir, claim, deadline
        self.it = Description(name=claim.name or "runvol", identity="", kind=claim.kind, group=claim.group,
                              data=_path(claim, data=True), metadata=_path(claim, data=False), metadata_bytes=0,
                              block=0)  # fmt: skip
        self._own, self._mapped, self._look = False, False, Look(ids=frozenset())
        self._bound: list[tuple[str, str]] = []

    def let_go(self) -> None:
        """Loop devices that were bound to look at files go again, unless the pool is mapped over them."""
        if self._bound and self._mapper.find(self.it.name) is None:
            for device, path in self._bound:
                loops.detach(device, path, self._deadline)

    # -- what it is -----------------------------------------------------------------------------------------------

    def describe(self) -> None:
        metadata, data = self._nodes()
        mapped = self._mapped = self._is_mapped(metadata, data)
        if not mapped:
            self._prove_nobodys(metadata, data)
        one = existing.superblock(metadata)
        split = self.it.kind == "device" and not self.it.metadata
        at = (self._claim.metadata_size or one.metadata_bytes) if split else 0
        if not mapped:
            self._look = existing.look(self._mapper, metadata, data, at, self._deadline)
            self._recognise(data, one)
        self.it = msgspec.structs.replace(
            self.it, block=one.block, metadata_bytes=at or ioctls.size_bytes(metadata),
            identity=self.it.identity or backing.new_identity(),
        )  # fmt: skip
        backing.check_name(self.it.name)
        self._prove_place(data, at, one)
        if self.it.kind == "device" and not split:
            self._find_mark(data, one)

    def go_on_with(self, described: Description) -> None:
        """An adoption that did not end, of the very same."""
        asked = (self.it.kind, self.it.group, self.it.data, self.it.metadata, self._claim.name or described.name)
        if asked != (described.kind, described.group, described.data, described.metadata, described.name):
            raise PoolRefused(
                f"{os.path.join(self._state_dir, backing.FILE)} describes pool {described.name} on {described.data}, "
                "whose adoption did not end; repeat that, or remove the file if the pool is not wanted"
            )
        self.it = described
        # One without a live table goes: it was to become the pool.
        assembly.find_mapped(self._mapper, described)
        metadata, data = self._nodes()
        if not self._is_mapped(metadata, data):
            self._prove_nobodys(metadata, data)
            split = described.kind == "device" and not described.metadata
            at = described.metadata_bytes if split else 0
            self._look = existing.look(self._mapper, metadata, data, at, self._deadline)
        elif self.it.identity != described.identity:
            raise PoolRefused(f"{described.data} is part of a mapped pool that is not the one described here")
        self._own = False

    def _nodes(self) -> tuple[str, str]:
        it = self.it
        if it.kind == "device":
            for field, device in (("--device", it.data), ("--metadata-device", it.metadata)):
                if device and not ioctls.is_block(device):
                    raise BadRequest(field, device, "is no block device")
            return it.metadata or it.data, it.data
        if it.kind == "lvm":
            for option, name in (("--data", it.data), ("--metadata", it.metadata)):
                making.refuse_lvms_own(it.group, name, option, self._deadline)
            return Backing(self._mapper, self._state_dir, it).attach(self._deadline)
        return self._file("--metadata-file", it.metadata), self._file("--data-file", it.data)

    def _file(self, option: str, path: str) -> str:
        try:
            regular = stat.S_ISREG(os.lstat(path).st_mode)
        except FileNotFoundError:
            raise BadRequest(option, path, "does not exist") from None
        if not regular:
            raise BadRequest(option, path, "is no regular file")
        found = loops.whole(path, writable=True)
        if found is not None:
            return found
        try:
            exclusivity.prove_free(path, past_known=False)
        except DeviceBusy as error:
            raise PoolRefused(f"{option}: {error}") from None
        device = loops.attach(path, deadline=self._deadline)
        self._bound.append((device, path))
        return device

    def _is_mapped(self, metadata: str, data: str) -> bool:
        """Whether the pool is mapped, as one of runvol's: the kernel then knows name and identity."""
        numbers = {f"{os.major(one)}:{os.minor(one)}" for one in (os.stat(path).st_rdev for path in (metadata, data))}
        if self.it.kind == "device" and not self.it.metadata:
            parts = [name for name, _ in existing.held_by(self._mapper, numbers, "RUNVOL-PART-")]
            numbers = {one.number for one in map(self._mapper.find, parts) if one is not None}
        found = [(name, identity) for name, identity in existing.held_by(self._mapper, numbers, assembly.UUID)
                 if set(self._mapper.dependencies(name)) == numbers]  # fmt: skip
        if not found:
            return False
        ((name, identity),) = found
        self._take(name, identity)
        return True

    def _take(self, name: str, identity: str) -> None:
        if name and self._claim.name not in ("", name):
            raise BadRequest("--pool", self._claim.name, f"this pool is {name}, and has to keep its name")
        self._own = True
        self.it = msgspec.structs.replace(self.it, name=name or self.it.name, identity=identity)

    def _prove_nobodys(self, metadata: str, data: str) -> None:
        fields = {"device": ("--metadata-device", "--device"), "lvm": ("--metadata", "--data"),
                  "loop": ("--metadata-file", "--data-file")}[self.it.kind]  # fmt: skip
        for field, device in zip(fields, (metadata, data), strict=True):
            making.prove_nobodys("--device" if metadata == data else field, device)
        if metadata != data and os.stat(metadata).st_rdev == os.stat(data).st_rdev:
            raise BadRequest(fields[0], metadata, "is the device of the data")

    def _recognise(self, data: str, one: Superblock) -> None:
        """Whose it is: of its keeper, its mark and its tags, those that are there say the same."""
        told = {"its keeper": backing.pool_of(self._look.page)}
        if self.it.kind == "device" and self.it.metadata:
            told["the mark on its data device"] = backing.read_mark(data)
        if self.it.kind == "lvm":
            told["the tag of its volumes"] = making.tagged(self.it, self._deadline)
        told["the store beside"] = "", self._known_to_the_store(one)
        said = {what: found for what, found in told.items() if found[1]}
        if len({identity for _, identity in said.values()}) > 1:
            each = ", ".join(identity for _, identity in said.values())
            raise PoolRefused(
                f"{' and '.join(said)} tell of different pools ({each}): these are not data and metadata of one"
            )
        if self._look.page and not told["its keeper"][1]:
            raise PoolRefused(
                f"device {KEEPER} of the pool is somebody else's, and that id is what runvol holds its pools by; "
                "whoever made it has to remove it"
            )
        if KEEPER in self._look.ids and not said:
            raise PoolRefused(f"the pool has a device {KEEPER}, and that id is what runvol holds its pools by; whoever "
                              "made it has to remove it")  # fmt: skip
        for name, identity in said.values():
            self._take(name, identity)
        self._prove_one_pool(one)

    def _prove_one_pool(self, one: Superblock) -> None:
        """Metadata tell no identity, but the copies of the store in the data were made in the epoch of their stamp."""
        now, then = stamps.parse(one.transaction), [stamps.parse(stamp) for stamp in self._look.stamps]
        if then and now is not None and now.epoch not in {stamp.epoch for stamp in then if stamp is not None}:
            raise PoolRefused(
                f"the data are those of pool {self.it.identity}, and the metadata are not (their stamp is of another "
                f"epoch): these are not data and metadata of one pool. If they are, restore its {backing.FILE}"
            )

    def _known_to_the_store(self, one: Superblock) -> str:
        """The identity of the pool that the store in the state directory was last used with, if that is this one."""
        path = os.path.join(self._state_dir, STORE)
        if not os.path.exists(path):
            return ""
        store = Store(path)
        try:
            told = {store.read_fact("generation"), store.read_fact("generation_next")}
            return (store.read_fact("pool") or "") if str(one.transaction) in told and one.transaction else ""
        finally:
            store.close()

    def _prove_place(self, data: str, at: int, one: Superblock) -> None:
        """The data are as long as the metadata say and, on a device that is split, begin where they are thought to."""
        has = ioctls.size_bytes(data) - at
        if has < one.data_bytes:
            raise PoolRefused(f"{data} has {has} bytes for data, and the pool {one.data_bytes}: it is another pool's")
        sure = self._own or self._claim.metadata_size or at % _GRAIN == 0
        if at and not (sure and (self._own or has // one.block == one.data_blocks)):
            raise BadRequest("--metadata-size", self._claim.metadata_size,
                             f"nothing tells at which byte of {data} the data of the pool begin")  # fmt: skip

    def _find_mark(self, data: str, one: Superblock) -> None:
        """What tells this device of data from others: a page at its end, or the keeper's where that is the pool's."""
        size = ioctls.size_bytes(data)
        if self._own and backing.read_mark(data)[1] == self.it.identity:
            self.it = msgspec.structs.replace(self.it, data_bytes=size)
        elif self._own and (block := self._keeper_block()) >= 0:
            self.it = msgspec.structs.replace(self.it, keeper_at=block * one.block)
        elif self._own:
            raise PoolRefused(
                f"the mark at the end of {data} is not there any more, so nothing tells it from other devices: restore "
                f"{backing.FILE}"
            )

    def _keeper_block(self) -> int:
        if not self._mapped:
            return self._look.keeper_block
        pool = Pool(self._mapper, self.it.name, self.it.identity, self.it.metadata)
        block = pool.keeper_block(self._deadline)
        return -1 if block is None else block

    # -- taking it ------------------------------------------------------------------------------------------------

    def adopt(self) -> Adopted:
        below = Backing(self._mapper, self._state_dir, self.it)
        if self._own:
            backing.save(self._state_dir, self.it)
            assembly.end_adoption(below)
            return Adopted(name=self.it.name, own=True)
        store = self._empty_store()
        try:
            return self._adopt_foreign(below, store)
        finally:
            store.close()

    def _empty_store(self) -> Store:
        store = Store(os.path.join(self._state_dir, STORE))
        known = store.read_fact("pool")
        if store.count() or known not in (None, self.it.identity):
            store.close()
            raise PoolRefused(
                f"the store {store.path} is that of another pool ({known or 'unknown'}), and this one is somebody "
                "else's: move the store away, or name its own pool"
            )
        return store

    def _adopt_foreign(self, below: Backing, store: Store) -> Adopted:
        assembly.find_mapped(self._mapper, self.it)
        below.refuse_taken_names()
        assembly.begin_adoption(self._state_dir, self.it)
        pool = self._mapped_pool(below)
        keeper = Keeper(pool)
        store.closing.append(keeper.close)
        keeper.open()
        self._mark_by_keeper(below, pool)
        store.guard(time.time_ns())
        store.lineage.found()
        strangers.compare(store, pool, self._deadline)
        Alone(store=store, pool=pool, keeper=keeper, stamp=Stamp(store, pool)).agree()
        assembly.end_adoption(below)
        return Adopted(name=self.it.name, own=False, quarantined=len(store.quarantined()))

    def _mapped_pool(self, below: Backing) -> Pool:
        it = self.it
        alone = it.kind == "device" and bool(it.metadata)
        metadata, data = (it.metadata, it.data) if alone else below.attach(self._deadline)
        if assembly.find_mapped(self._mapper, it) is None:
            if alone and not it.data_bytes and self._has_room_for_a_mark():
                below.mark(exclusive=True)
            assembly.map_pool(self._mapper, below, metadata, data)
        return Pool(self._mapper, it.name, it.identity, metadata)

    def _has_room_for_a_mark(self) -> bool:
        one = existing.superblock(self.it.metadata)
        return ioctls.size_bytes(self.it.data) - one.data_bytes >= backing.MARK

    def _mark_by_keeper(self, below: Backing, pool: Pool) -> None:
        it = below.description
        if it.kind != "device" or not it.metadata or it.data_bytes or it.keeper_at:
            return
        block = pool.keeper_block(self._deadline)
        if block is None:
            raise PoolRefused(f"the keeper of pool {it.name} has no block of its own")
        below.description = msgspec.structs.replace(it, keeper_at=block * it.block)
        backing.save(self._state_dir, below.description)


def _path(claim: Claim, *, data: bool) -> str:
    if claim.kind == "lvm":
        return claim.data if data else claim.metadata
    path = (claim.device or claim.data) if data else (claim.metadata_device or claim.metadata)
    return os.path.abspath(path) if path else ""


__all__ = ["Adopted", "Claim", "adopt"]
