"""Mounts that hang nowhere: no path, no other process sees them, gone with the descriptor.

Made with the mount API of Linux 5.2 (fsopen, fsconfig, fsmount, move_mount). A process that is killed
leaves nothing, and what is hung at a path by move_mount appears there whole.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

from blockdev import exclusivity, isolated, loops, mounts, syscalls
from blockdev.deadlines import Deadline, bounded
from blockdev.errors import FilesystemUnknown, MountFailed
from blockdev.ioctls import is_block

# What waits for no device and no server; a thread for each mount would cost more than the mount.
_IN_MEMORY = frozenset({"tmpfs"})
# Of mounts that only runvol sees: nobody means to run anything there, and nothing goes through a link.
PRIVATE = (
    syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NODEV | syscalls.MOUNT_ATTR_NOEXEC
    | syscalls.MOUNT_ATTR_NOSYMFOLLOW
)  # fmt: skip


@contextmanager
def filesystem(
    fstype: str, options: Mapping[str, str | None], *, attributes: int = 0, deadline: Deadline, remote: bool = False
) -> Iterator[int]:
    """A detached mount as a descriptor of its root; MountFailed with the kernel's own words.

    One that is `remote` may hang for ever, and is made by a process of its own. A kernel before 5.14 follows links all
    the same.
    """
    try:
        context = syscalls.fsopen(fstype)
    except OSError as error:
        raise FilesystemUnknown(options.get("source") or fstype, fstype, str(error.strerror)) from error
    try:
        try:
            for key, value in options.items():
                syscalls.fsconfig_set(context, key, value)
            what = f"mounting {options.get('source') or fstype}"
            if remote:
                isolated.create(context, what, deadline)
            elif fstype in _IN_MEMORY:
                syscalls.fsconfig_create(context)
            else:
                bounded(what, deadline, lambda: syscalls.fsconfig_create(context))
            root = _mounted(context, attributes)
        except OSError as error:
            said = syscalls.fs_messages(context)
            raise MountFailed(options.get("source") or fstype, "nowhere", said or str(error.strerror)) from error
    finally:
        os.close(context)
    try:
        yield root
    finally:
        os.close(root)


def _mounted(context: int, attributes: int) -> int:
    try:
        return syscalls.fsmount(context, attributes)
    except OSError as error:
        if error.errno != errno.EINVAL or not attributes & syscalls.MOUNT_ATTR_NOSYMFOLLOW:
            raise
        return syscalls.fsmount(context, attributes & ~syscalls.MOUNT_ATTR_NOSYMFOLLOW)


@contextmanager
def private_mount(path: str, fstype: str, *, deadline: Deadline, held: bool = False) -> Iterator[int]:
    """The filesystem on a file or block node, writable, as a descriptor; flushed and gone at the end.

    A file gets a loop device that clears itself, also if this process is killed. Closing the descriptors ends the mount
    only once no child that another call has just forked holds copies of them, so the end is waited for. `held`: the
    caller has the file open meanwhile.
    """
    with ExitStack() as stack:
        stack.callback(_wait_until_gone, path, deadline, held=held)
        source = path
        if not is_block(path):
            source, keeper = loops.open_private(path, deadline=deadline)
            stack.callback(os.close, keeper)
        options: dict[str, str | None] = {"source": source, **mounts.SAFETY.get(fstype, {})}
        root = stack.enter_context(filesystem(fstype, options, attributes=PRIVATE, deadline=deadline))
        yield root
        fd = os.open(".", os.O_RDONLY | os.O_CLOEXEC, dir_fd=root)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def would_be_replayed(path: str, fstype: str, *, deadline: Deadline) -> bool:
    """Whether the kernel has something to write before it mounts the filesystem in this file.

    It is asked to on a device that cannot be written, and refuses. For callers that have the file open. MountFailed
    for anything else.
    """
    with ExitStack() as stack:
        stack.callback(_wait_until_gone, path, deadline, held=True)
        source, keeper = loops.open_private(path, deadline=deadline, read_only=True)
        stack.callback(os.close, keeper)
        options: dict[str, str | None] = {"source": source, "ro": None}
        try:
            stack.enter_context(filesystem(fstype, options, attributes=PRIVATE, deadline=deadline))
        except MountFailed as error:
            if isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EROFS:
                return True
            raise
        return False


def _wait_until_gone(path: str, deadline: Deadline, *, held: bool) -> None:
    def gone() -> bool:
        return not loops.find(path) if held and not is_block(path) else exclusivity.is_free(path, past_known=True)

    deadline.poll(f"unmounting {path}", gone, every=0.002)
