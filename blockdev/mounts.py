"""Mounting and unmounting with an end to every wait, in verbs that can be repeated."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
import time
from collections.abc import Mapping, Sequence

from blockdev import mountinfo, syscalls
from blockdev.deadlines import Deadline, bounded
from blockdev.errors import DeviceBusy, Holder, MountFailed, WaitExpired
from blockdev.ioctls import is_block

_FLAGS: dict[str, tuple[int, int]] = {
    # option: (flags that it sets, flags that it clears)
    "defaults": (0, 0),
    "ro": (syscalls.MS_RDONLY, 0),
    "rw": (0, syscalls.MS_RDONLY),
    "nosuid": (syscalls.MS_NOSUID, 0),
    "suid": (0, syscalls.MS_NOSUID),
    "nodev": (syscalls.MS_NODEV, 0),
    "dev": (0, syscalls.MS_NODEV),
    "noexec": (syscalls.MS_NOEXEC, 0),
    "exec": (0, syscalls.MS_NOEXEC),
    "sync": (syscalls.MS_SYNCHRONOUS, 0),
    "async": (0, syscalls.MS_SYNCHRONOUS),
    "dirsync": (syscalls.MS_DIRSYNC, 0),
    "noatime": (syscalls.MS_NOATIME, 0),
    "atime": (0, syscalls.MS_NOATIME),
    "nodiratime": (syscalls.MS_NODIRATIME, 0),
    "diratime": (0, syscalls.MS_NODIRATIME),
    "relatime": (syscalls.MS_RELATIME, 0),
    "norelatime": (0, syscalls.MS_RELATIME),
    "strictatime": (syscalls.MS_STRICTATIME, 0),
    "lazytime": (syscalls.MS_LAZYTIME, 0),
    "nolazytime": (0, syscalls.MS_LAZYTIME),
}
# Words of fstab and of mount(8) that no kernel knows.
_IGNORED = frozenset({"_netdev", "auto", "noauto", "nofail", "user", "nouser", "users", "owner", "group"})
# What a filesystem is told on every mount of the host, whatever its superblock says: by default ext4 does what stands
# there when it meets damage, and its owner, a guest, may have written `panic`.
SAFETY: Mapping[str, Mapping[str, str | None]] = {
    "ext2": {"errors": "remount-ro"},
    "ext3": {"errors": "remount-ro"},
    "ext4": {"errors": "remount-ro"},
    "xfs": {"nouuid": None},
}
# Options that would undo it, and options that name a second device of the host's.
_UNSAFE = re.compile(r"errors=(?!remount-ro\Z).*|(journal_path|journal_dev|logdev|rtdev)=.*", re.DOTALL)
# Operations that would mount something else than was asked for.
FORBIDDEN = frozenset({"bind", "rbind", "move", "remount", "loop", "private", "rprivate", "shared", "rshared",
                       "slave", "rslave", "unbindable", "runbindable"})  # fmt: skip


def words(options: str) -> list[str]:
    """Options that stand in one word, divided by commas; those in quotes (SELinux's contexts) divide nothing."""
    return [word.group() for word in _WORD.finditer(options)] if '"' in options else options.split(",")


_WORD = re.compile(r'(?:[^,"]|"[^"]*"?)+')


def is_unsafe(option: str) -> bool:
    """Whether a volume's mount option could take the node down, or brings another device into the mount."""
    return bool(_UNSAFE.match(option))


def safety(fstype: str) -> list[str]:
    """The last words of every mount of a volume's filesystem in the host's kernel."""
    return [key if value is None else f"{key}={value}" for key, value in SAFETY.get(fstype, {}).items()]


def parse_options(options: Sequence[str]) -> tuple[int, str]:
    """Flags and data of mount(2) for a list of mount options; later words win."""
    flags, data = 0, []
    for option in options:
        if option in _FLAGS:
            on, off = _FLAGS[option]
            flags = (flags & ~off) | on
        elif option not in _IGNORED:
            data.append(option)
    return flags, ",".join(data)


def is_mount_point(path: str) -> bool:
    """Whether something is mounted on `path`; False if there is no such path. Never waits for a dead server."""
    try:
        return syscalls.statx(path).is_mount_root
    except FileNotFoundError:
        return False
    except OSError as error:
        if error.errno in (errno.ENOTCONN, errno.ESTALE, errno.EIO, errno.EHOSTDOWN, errno.ENODEV, errno.EACCES):
            return True  # a corrupted mount is a mount all the same
        raise


def is_of_device(path: str, device: str) -> bool:
    """Whether what is mounted on `path` is the filesystem of the block node `device`."""
    try:
        number = os.stat(device).st_rdev
    except FileNotFoundError:
        return False
    return syscalls.statx(path).device == (os.major(number), os.minor(number))


def same_filesystem(one: str, other: str) -> bool:
    """Whether two paths are the same directory of the same filesystem, as a bind mount and its source are."""
    first, second = syscalls.statx(one), syscalls.statx(other)
    return (first.device, first.inode) == (second.device, second.inode)


def is_read_only(path: str) -> bool:
    """Whether writes below `path` are refused by its mount or filesystem."""
    return bool(os.statvfs(path).f_flag & os.ST_RDONLY)


def mount(source: str, target: str, fstype: str, options: Sequence[str], deadline: Deadline) -> None:
    """Mount a filesystem; MountFailed with the reason."""
    flags, data = parse_options(options)
    try:
        bounded(f"mounting {source} on {target}", deadline, lambda: syscalls.mount(source, target, fstype, flags, data))
    except OSError as error:
        hint = "; see the kernel's log for what the filesystem says" if error.errno == errno.EINVAL else ""
        raise MountFailed(source, target, f"{error.strerror}{hint}") from error


def bind(source: str, target: str, *, read_only: bool, opened: int | None = None) -> None:
    """Bind `source` to `target`, without what is mounted below it; a read-only one is never writable, not even for a
    moment.

    What is mounted inside of the source later appears at a target that may be written (shared mounts), and never at one
    that may not: it would be writable there. With `opened`, a descriptor, that is what is bound, whatever lies at the
    path by now.
    """
    try:
        tree = syscalls.open_tree_clone(source if opened is None else opened)
        try:
            if read_only:
                rule = syscalls.MS_PRIVATE
                syscalls.mount_setattr(tree, syscalls.MOUNT_ATTR_RDONLY, propagation=rule, recursive=True)
            syscalls.move_mount(tree, target)
        finally:
            os.close(tree)
    except OSError as error:
        raise MountFailed(source, target, str(error.strerror)) from error


def be_unmounted(target: str, deadline: Deadline) -> None:
    """Nothing is mounted on `target` when this returns, however often something was; DeviceBusy with holders.

    Something that is busy is asked again for ten seconds: a process on its way out lets go in a moment. The bind of
    a device node is only a name, and goes although the device is open; who has the device is asked elsewhere.
    """
    deadline = Deadline.after(min(deadline.remaining(), _PATIENCE))
    while is_mount_point(target):
        flags = syscalls.UMOUNT_NOFOLLOW | (syscalls.MNT_DETACH if is_block(target) else 0)
        try:
            key = f"unmounting {target} {_mount_id(target)}"
            bounded(f"unmounting {target}", deadline, functools.partial(syscalls.umount, target, flags), key=key)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.ENOENT):
                return
            if error.errno != errno.EBUSY:
                raise MountFailed("nothing", target, f"unmounting failed: {error.strerror}") from error
            if deadline.remaining() < _LAST_LOOK:
                raise DeviceBusy(target, "a process works in it", _users(target)) from error
            time.sleep(0.05)


def _mount_id(target: str) -> int:
    """Another mount at the same place is another call, though the last one's may hang for ever. One whose filesystem
    answers nothing any more is still unmounted."""
    try:
        return syscalls.statx(target).mount_id
    except OSError:
        return 0


_LAST_LOOK = 0.3
# Several filesystems may hang on one place; so many are let go of, one after the other.
_TRIES = 20
_MOMENT, _PAUSE = 0.5, 0.02
_PATIENCE = 10.0


def _users(target: str) -> list[Holder]:
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        with contextlib.suppress(OSError):
            places = [os.readlink(f"/proc/{name}/{link}") for link in ("cwd", "root")]
            places += [os.readlink(entry.path) for entry in os.scandir(f"/proc/{name}/fd")]
            if any(place == target or place.startswith(f"{target}/") for place in places):
                with open(f"/proc/{name}/comm") as comm:
                    found.append(Holder(pid=int(name), name=comm.read().strip()))
    return found


def in_table(path: str) -> bool:
    """Whether something is mounted on `path`, by the kernel's table alone: what is mounted there may be dead."""
    return mountinfo.at(path) is not None


def be_let_go(target: str) -> None:
    """Nothing hangs on `target` when this returns, although its server may be dead: nobody is asked and nobody waits.

    Whoever works in it keeps what it has; requests that wait for the server are ended. What is still to be written
    waits for it in a thread of its own. MountFailed for what cannot be detached, such as a mount that another one on a
    directory above hides.
    """
    until, tries, hung = time.monotonic() + 2 * _TRIES * _MOMENT, 0, "it did not end"
    while mounted := [mount.mount_id for mount in mountinfo.table() if mount.target == target]:
        why = hung
        for how, flags in (("by force", syscalls.MNT_FORCE), ("detaching", syscalls.MNT_DETACH)):
            call = functools.partial(syscalls.umount, target, flags | syscalls.UMOUNT_NOFOLLOW)
            try:
                bounded(f"letting go of {target}", Deadline.after(_MOMENT), call, key=f"{how} {target} {mounted[-1]}")
            except WaitExpired:
                continue
            except OSError as error:
                why = str(error.strerror)
        if not in_table(target):
            return
        tries += 1
        if time.monotonic() > until or (why != hung and tries >= _TRIES):
            raise MountFailed("nothing", target, f"detaching failed: {why}")
        time.sleep(_PAUSE)


def be_absent(target: str, deadline: Deadline) -> None:
    """Nothing is mounted on `target` and it is gone. Only an empty directory or an empty file is removed."""
    be_unmounted(target, deadline)
    try:
        os.rmdir(target)
    except FileNotFoundError:
        return
    except NotADirectoryError:
        if os.path.islink(target) or os.path.getsize(target) > 0:
            raise MountFailed("nothing", target, "it is a file with content, which is not removed") from None
        os.unlink(target)
    except OSError as error:
        if error.errno == errno.ENOTEMPTY:
            raise MountFailed("nothing", target, "the directory is not empty and is left as it is") from error
        raise
