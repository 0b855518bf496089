"""What `runvol pool init` may write on: nothing that anybody else may still need.

A device is taken only if a look over all of it finds nothing, a logical volume or a file only if this very init has
made it. That is never inferred from a record that is absent: files are created exclusively, logical volumes bear a tag,
and metadata that has a thin pool's superblock is used as it is or refused, but never formatted. All that is left out
only for what an operator has typed the name of (`--force-wipe`), and who uses that still keeps it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass

from blockdev import Deadline, blankness, exclusivity, flocks, ioctls, loops, sysfs
from blockdev.commands import run
from blockdev.errors import DeviceBusy, NotBlank
from snapshotter import backing, turns
from snapshotter.backing import Backing, Description
from snapshotter.errors import BadRequest, PoolRefused
from snapshotter.superblock import superblock

log = logging.getLogger("runvol.snapshotter")

_SMALLEST_DATA = 64 << 20
_TAG = "runvol-pool-"
_OPTIONS = {"device": "--device", "lvm": "--vg", "loop": "--loop"}


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What `runvol pool init` was asked for. One of `device`, `group` and `directory`; sizes in bytes.

    `metadata_device` goes with `device`: the pool then lies on both as they are, without a mapping in between.
    """

    name: str
    device: str = ""
    metadata_device: str = ""
    group: str = ""
    directory: str = ""
    size: int = 0
    metadata_size: int = 0
    block: int = 64 << 10
    # What may be wiped although it holds something, each by its name as it is given or would be made.
    force_wipe: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        return "device" if self.device else "lvm" if self.group else "loop"

    def described_metadata(self) -> int:
        """Bytes of metadata for a pool whose size is asked for (not that of a device)."""
        return self.metadata_size or backing.metadata_size(self.size, self.block)


def check(wish: Wish) -> None:
    """BadRequest for what can be no pool whatever it stands on."""
    backing.check_name(wish.name)
    backing.check_block(wish.block)
    if sum(map(bool, (wish.device, wish.group, wish.directory))) != 1:
        raise BadRequest("--device, --vg, --loop", "", "takes exactly one of them")
    if wish.device:
        return
    if wish.metadata_device:
        raise BadRequest("--metadata-device", wish.metadata_device, "goes with --device only")
    if wish.size < _SMALLEST_DATA:
        raise BadRequest("--size", wish.size, "a pool has at least 64 MiB")
    if wish.described_metadata() < backing.SMALLEST_METADATA:
        raise BadRequest("--metadata-size", wish.described_metadata(), "the kernel wants at least 2 MiB")


def describe(wish: Wish, deadline: Deadline) -> Description:
    """A new pool; BadRequest, NotBlank or PoolRefused for what it must not stand on. Nothing is written."""
    identity = backing.new_identity()
    if wish.device:
        return _describe_devices(wish, identity, deadline)
    metadata = wish.described_metadata()
    if wish.group:
        found = Description(name=wish.name, identity=identity, kind="lvm", group=wish.group, data=f"{wish.name}_data",
                            metadata=f"{wish.name}_meta", metadata_bytes=metadata, block=wish.block)  # fmt: skip
        _check_names(wish, [f"{wish.group}/{found.data}", f"{wish.group}/{found.metadata}"])
        for volume in _volumes(found, deadline).values():
            name = f"{wish.group}/{volume.name}"
            if name not in wish.force_wipe:
                raise _not_ours(f"the logical volume {name}", wish.name, name)
            _refuse_used_volume(name, volume)
        return found
    directory = os.path.abspath(wish.directory)
    data, tables = (os.path.join(directory, f"{wish.name}.{part}") for part in ("data", "metadata"))
    _check_names(wish, [data, tables])
    for path in (data, tables):
        if os.path.lexists(path):
            if path not in wish.force_wipe:
                raise _not_ours(path, wish.name, path)
            _refuse_used_file(path)
    return Description(name=wish.name, identity=identity, kind="loop", data=data, metadata=tables,
                       metadata_bytes=metadata, block=wish.block)  # fmt: skip


def _not_ours(what: str, pool: str, name: str = "") -> PoolRefused:
    typed = f" (`--force-wipe {name}` does)" if name else ""
    return PoolRefused(
        f"{what} exists already, and this `runvol pool init` has not made it. If it is part of a pool, restore that "
        f"pool's {backing.FILE}, or `runvol pool adopt`; if nobody needs it, remove it{typed}; or make a pool of "
        f"another name than {pool} (--pool)"
    )


def _check_names(wish: Wish, names: list[str]) -> None:
    """BadRequest for a name that is not, letter by letter, that of something this pool would stand on."""
    for name in wish.force_wipe:
        if name not in names:
            raise BadRequest("--force-wipe", name, f"takes the name of what is wiped: {' or '.join(names)}")


def _refuse_used_volume(name: str, volume: _Volume) -> None:
    """PoolRefused for one that LVM builds on, or that somebody has open."""
    if volume.attributes[:1] not in ("-", "w") or volume.attributes[5:6] == "o":
        raise PoolRefused(
            f"--force-wipe {name}: it is in use (LVM calls it {volume.attributes}): it is open, or other volumes stand "
            "on it; end that first"
        )
    for tag in volume.tags:
        if tag.startswith(_TAG):
            _refuse_served(f"--force-wipe {name}", tag.removeprefix(_TAG))


def _refuse_used_file(path: str) -> None:
    if not stat.S_ISREG(os.lstat(path).st_mode):
        raise PoolRefused(f"--force-wipe {path}: it is no regular file; remove it yourself")
    try:
        exclusivity.prove_free(path, past_known=False)
    except DeviceBusy as error:
        raise PoolRefused(f"--force-wipe {path}: {error}") from None
    if users := loops.find(path):
        raise PoolRefused(f"--force-wipe {path}: it is in use: {', '.join(users)} stands on it; remove that first")


def _refuse_served(what: str, identity: str) -> None:
    """PoolRefused where a process serves the pool of this identity, mapped or not."""
    held = turns.try_lock(turns.pool_lock(identity))
    if held is None:
        raise PoolRefused(f"{what}: another process serves the pool that it is part of; stop that first")
    flocks.release(held)


def wipe(wish: Wish, it: Description, deadline: Deadline) -> None:
    """Clear what was typed the name of, which `describe` has looked at. May be interrupted and repeated."""
    if it.kind == "lvm":
        for volume in _volumes(it, deadline).values():
            _refuse_used_volume(f"{it.group}/{volume.name}", volume)
            run("lvremove", "-q", "-f", f"{it.group}/{volume.name}", deadline=deadline)
    for name in wish.force_wipe if it.kind != "lvm" else ():
        if it.kind == "device":
            _wipe_device(name, deadline)
        elif os.path.lexists(name):
            os.unlink(name)


def _wipe_device(device: str, deadline: Deadline) -> None:
    """Of all partitions too, as what lies in one may be recognised once a table is there again."""
    log.warning("a device is wiped, as its name was typed", extra={"device": device})
    for part, number in _partitions(device).items():
        blankness.wipe(part, deadline)
        with ioctls.opened(device) as fd:
            ioctls.forget_partition(fd, number)
    blankness.wipe(device, deadline)
    if superblock(device) is not None or blankness.signature(device, deadline) is not None:
        raise NotBlank(device, "it still holds something after it was wiped")


def _partitions(device: str) -> dict[str, int]:
    """Nodes of the partitions that the kernel knows of, and their numbers."""
    place, found = sysfs.place(os.stat(device).st_rdev), {}
    for name in _listed(place):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), open(f"{place}/{name}/partition") as told:
            found[f"/dev/{name}"] = int(told.read())
    return found


def _describe_devices(wish: Wish, identity: str, deadline: Deadline) -> Description:
    """Names stay as they were given: `/dev/disk/by-id/…` is the same disk after a reboot, `/dev/sdb` may not be."""
    _check_names(wish, [wish.device, *filter(None, [wish.metadata_device])])
    size = _unused("--device", wish.device, deadline, wish.force_wipe)
    metadata = wish.metadata_size or backing.metadata_size(size, wish.block)
    if wish.metadata_device:
        if wish.metadata_size:
            raise BadRequest("--metadata-size", wish.metadata_size, "the metadata takes all of --metadata-device")
        metadata = _unused("--metadata-device", wish.metadata_device, deadline, wish.force_wipe)
        if metadata < backing.SMALLEST_METADATA:
            raise BadRequest("--metadata-device", wish.metadata_device, f"has {metadata} bytes; the kernel wants 2 MiB")
        if os.stat(wish.metadata_device).st_rdev == os.stat(wish.device).st_rdev:
            raise BadRequest("--metadata-device", wish.metadata_device, "is the device of the data")
    elif metadata < backing.SMALLEST_METADATA:
        raise BadRequest("--metadata-size", metadata, "the kernel wants at least 2 MiB")
    needed = _SMALLEST_DATA + (0 if wish.metadata_device else metadata)
    if size < needed:
        raise BadRequest("--device", wish.device, f"has {size} bytes; {needed} are needed")
    return Description(name=wish.name, identity=identity, kind="device", data=os.path.abspath(wish.device),
                       metadata=os.path.abspath(wish.metadata_device) if wish.metadata_device else "",
                       metadata_bytes=metadata, block=wish.block)  # fmt: skip


def _unused(field: str, device: str, deadline: Deadline, wiped: tuple[str, ...] = ()) -> int:
    """The size of a block device that nobody uses, and that has nothing on it unless its name is in `wiped`."""
    prove_nobodys(field, device, partitioned=device in wiped)
    if device not in wiped:
        prove_unused(device, deadline)
    elif identity := backing.read_mark(device)[1]:
        _refuse_served(f"--force-wipe {device}", identity)
    return ioctls.size_bytes(device)


def prove_nobodys(field: str, device: str, *, partitioned: bool = False) -> None:
    """BadRequest for what is no block device, PoolRefused for one that anybody uses, or that has partitions (of a
    `partitioned` one: that are used)."""
    if not ioctls.is_block(device):
        raise BadRequest(field, device, "is no block device")
    try:
        exclusivity.prove_free(device, past_known=False)
    except DeviceBusy as error:
        raise PoolRefused(f"{field}: {error}") from None
    parts = list(_partitions(device)) if partitioned else []
    _refuse_users(field, device, frozenset(map(os.path.basename, parts)))
    for part in parts:
        prove_nobodys(field, part)


def _refuse_users(field: str, device: str, own: frozenset[str] = frozenset()) -> None:
    """Mappings, RAIDs and partitions that the kernel knows of, and loop devices, which it does not count as users; but
    not the kernel's names in `own`."""
    place = sysfs.place(os.stat(device).st_rdev)
    users = [*_listed(f"{place}/holders"), *loops.find(device)]
    users += map(os.path.basename, _partitions(device))
    if foreign := set(users) - own:
        raise PoolRefused(f"{field} {device} is in use: {', '.join(sorted(foreign))} stands on it; remove that first")


def _listed(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except (FileNotFoundError, NotADirectoryError):
        return []


def prove_unused(path: str, deadline: Deadline, *, end: int | None = None) -> None:
    """NotBlank unless a look over all of the device, as far as `end`, finds nothing."""
    if superblock(path) is not None:
        raise NotBlank(path, "it holds the metadata of a thin pool")
    blankness.prove_unused(path, deadline, end=end)


def _tags(it: Description) -> tuple[str, str]:
    """Of a logical volume that an init has made: not yet zeroed, and zeroed."""
    return f"runvol-making-{it.identity}", f"{_TAG}{it.identity}"


def transaction(below: Backing, deadline: Deadline) -> int:
    """That of the pool that is described, while it is not mapped; 0 where its making did not end."""
    it = below.description
    if it.kind == "lvm" and any(_tags(it)[0] in one.tags for one in _volumes(it, deadline).values()):
        return 0
    found = superblock(below.first_of_metadata(deadline))
    return found.transaction if found is not None else 0


def difference(it: Description, wish: Wish, state_dir: str) -> str:
    """What is asked for other than an interrupted init has described, naming both; empty if nothing is."""
    for option, described, asked in _pairs(it, wish):
        if described != asked:
            return (
                f"{os.path.join(state_dir, backing.FILE)} describes pool {it.name} with {option} {described}, whose "
                f"making did not end, and this asks for {option} {asked}. Repeat `runvol pool init` with what is "
                "described, or remove the file if that pool is not wanted"
            )
    return ""


def _pairs(it: Description, wish: Wish) -> Iterator[tuple[str, object, object]]:
    yield "--pool", it.name, wish.name
    where = {"device": wish.device and os.path.abspath(wish.device), "lvm": wish.group,
             "loop": wish.directory and os.path.abspath(wish.directory)}  # fmt: skip
    place = {"device": it.data, "lvm": it.group, "loop": os.path.dirname(it.data)}[it.kind]
    if it.kind != wish.kind:
        yield "the place", f"{_OPTIONS[it.kind]} {place}", f"{_OPTIONS[wish.kind]} {where[wish.kind]}"
    yield _OPTIONS[it.kind], place, where[it.kind]
    if it.kind == "device":
        yield "--metadata-device", it.metadata, wish.metadata_device and os.path.abspath(wish.metadata_device)
        if wish.metadata_size:
            yield "--metadata-size", it.metadata_bytes, wish.metadata_size
    else:
        yield "--metadata-size", it.metadata_bytes, wish.described_metadata()
    yield "--block-size", it.block, wish.block


@dataclass(frozen=True, kw_only=True)
class _Volume:
    """A logical volume, as LVM lists it; bytes."""

    name: str
    size: int
    extent: int
    tags: frozenset[str]
    attributes: str


def _volumes(it: Description, deadline: Deadline) -> dict[str, _Volume]:
    """Those of the pool's names that exist in the group."""
    _, output = run("lvs", "--noheadings", "--nosuffix", "--units", "b", "--separator", "|", "-o",
                    "lv_name,lv_size,vg_extent_size,lv_tags,lv_attr", it.group, deadline=deadline)  # fmt: skip
    rows = (line.strip().split("|") for line in output.splitlines())
    found = (_Volume(name=row[0], size=int(row[1]), extent=int(row[2]), tags=frozenset(row[3].split(",")),
                     attributes=row[4])
             for row in rows if len(row) == 5 and row[1].isdecimal() and row[2].isdecimal())  # fmt: skip
    return {volume.name: volume for volume in found if volume.name in (it.metadata, it.data)}


def tagged(it: Description, deadline: Deadline) -> tuple[str, str]:
    """Name and identity of the pool of runvol's that these volumes were made for; empty where they were not."""
    found = {tag.removeprefix(_TAG) for one in _volumes(it, deadline).values() for tag in one.tags
             if tag.startswith(_TAG)}  # fmt: skip
    if len(found) != 1:
        return "", ""
    return it.data.removesuffix("_data") if it.data.endswith("_data") else "", found.pop()


def refuse_lvms_own(group: str, name: str, option: str, deadline: Deadline) -> None:
    """BadRequest for a logical volume that is not there, PoolRefused for one that LVM itself manages a pool by."""
    _, output = run("lvs", "-a", "--noheadings", "--separator", "|", "-o", "lv_name,lv_attr,pool_lv,segtype", group,
                    deadline=deadline)  # fmt: skip
    rows = [line.strip().split("|") for line in output.splitlines()]
    found = {row[0].strip("[]"): row for row in rows if len(row) == 4}
    if name not in found:
        raise BadRequest(option, name, f"is no logical volume of {group}")
    shown, attributes, pool, kind = found[name]
    if pool or kind.startswith("thin") or shown.startswith("[") or attributes[:1] in ("t", "T", "e", "V"):
        raise PoolRefused(
            f"{option} {group}/{name} is part of a thin pool that LVM manages, and LVM would go on changing it: two "
            f"owners destroy a pool. Make one of runvol's own beside it (`runvol pool init --vg {group} --size …`), "
            "let the images be pulled into that, and remove LVM's when nobody needs it (`lvremove`)"
        )


class Maker:
    """Brings what a described pool stands on into being, or finds that an earlier init has; see the module.

    `begun` says whether anything of this pool exists by now.
    """

    def __init__(self, below: Backing, wish: Wish, deadline: Deadline) -> None:
        self._below, self._it, self._wish, self._deadline = below, below.description, wish, deadline
        self.begun = False

    def make(self, *, fresh: bool) -> None:
        """PoolRefused or NotBlank for what this pool's making cannot have left. May be repeated, not `fresh` then."""
        if self._it.kind == "loop":
            self._make_files()
        elif self._it.kind == "lvm":
            self._make_volumes()
        elif not fresh:
            self._prove_devices()
        self.begun = True

    def _make_files(self) -> None:
        it = self._it
        os.makedirs(os.path.dirname(it.data), mode=0o700, exist_ok=True)
        if not self._created(it.metadata, it.metadata_bytes) and superblock(it.metadata) is None:
            self._prove_file(it.metadata, it.metadata_bytes, "--metadata-size")
        if not self._created(it.data, self._wish.size) and superblock(it.metadata) is None:
            self._prove_file(it.data, self._wish.size, "--size")

    def _created(self, path: str, size: int) -> bool:
        """Whether the file was not there, and is now."""
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            return False
        self.begun = True
        try:
            os.ftruncate(fd, size)
            os.fsync(fd)
        finally:
            os.close(fd)
        return True

    def _prove_file(self, path: str, size: int, option: str) -> None:
        """A file that this pool's making has left is one hole, or empty still."""
        facts = os.lstat(path)
        if not stat.S_ISREG(facts.st_mode):
            raise _not_ours(path, self._it.name)
        if facts.st_size == 0:
            os.truncate(path, size)
        elif facts.st_size != size:
            raise PoolRefused(f"{path} has {facts.st_size} bytes, and {option} asks for {size}")
        blankness.prove_blank(path, self._deadline)

    def _make_volumes(self) -> None:
        """The tag comes with the volume; what lay there before is zeroed before a second one says so."""
        it = self._it
        self._make_volume(it.metadata, it.metadata_bytes, "--metadata-size")
        self._make_volume(it.data, self._wish.size, "--size")

    def _make_volume(self, name: str, size: int, option: str) -> None:
        it, volume = self._it, f"{self._it.group}/{name}"
        making, made = _tags(it)
        found = _volumes(it, self._deadline).get(name)
        if found is None:
            run("lvcreate", "-Wn", "-Zn", "-an", "--addtag", making, "-n", name, "-L", f"{size}b", it.group,
                deadline=self._deadline)  # fmt: skip
        elif making not in found.tags:
            self._prove_volume(found, size, option)
            return
        self.begun = True
        if name == it.metadata:
            backing.format_metadata(self._below.first_of_metadata(self._deadline))
        run("lvchange", "--deltag", making, "--addtag", made, volume, deadline=self._deadline)

    def _prove_volume(self, found: _Volume, size: int, option: str) -> None:
        it = self._it
        if superblock(self._below.first_of_metadata(self._deadline)) is not None:
            # The pool was loaded once, over both.
            return
        if _tags(it)[1] not in found.tags:
            raise _not_ours(f"the logical volume {it.group}/{found.name}", it.name)
        if not size <= found.size < size + found.extent:
            raise PoolRefused(f"{it.group}/{found.name} has {found.size} bytes, and {option} asks for {size}")

    def _prove_devices(self) -> None:
        """Of an earlier init: the mark at the end of a device of data, and what the kernel has formatted."""
        it = self._it
        for field, device in (("--device", it.data), ("--metadata-device", it.metadata)):
            if device:
                named = device in map(os.path.abspath, self._wish.force_wipe)
                parts = map(os.path.basename, _partitions(device) if named else ())
                _refuse_users(field, device, self._below.parts() | frozenset(parts))
        if it.metadata and not it.data_bytes:
            size = ioctls.size_bytes(it.data)
            marked = self._below.is_marked(it.data, size)
            self._prove_device(it.data, end=size - backing.MARK if marked else None, whole=not marked)
        first = it.metadata or it.data
        if superblock(first) is None:
            self._prove_device(first)

    def _prove_device(self, device: str, *, end: int | None = None, whole: bool = True) -> None:
        """Blank, or wiped once more if its name was typed. Its own mark stays."""
        if device not in map(os.path.abspath, self._wish.force_wipe):
            prove_unused(device, self._deadline, end=end)
        elif whole and (superblock(device) is not None or blankness.signature(device, self._deadline) is not None):
            prove_nobodys("--force-wipe", device, partitioned=True)
            _wipe_device(device, self._deadline)
