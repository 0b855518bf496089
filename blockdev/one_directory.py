"""A process that turns into a program which can write to one directory and to nothing else; see `confined`.

It is run by its path and imports next to nothing: `PARENT DIRECTORY PROGRAM ARGUMENT...`, the arguments from the
program's own name on. The copies of the host's mounts, which come with a mount namespace, are there for half a dozen
system calls: a filesystem that is unmounted on the host stays alive as long as a copy of its mount does.
"""

import ctypes
import errno
import os
import stat
import sys

# Status of one that could not be confined, and was not run.
FAILED = 125

_OPEN_TREE, _MOVE_MOUNT, _MOUNT_SETATTR = 428, 429, 442
_OPEN_TREE_CLONE, _MOVE_MOUNT_F_EMPTY_PATH, _AT_FDCWD, _AT_EMPTY_PATH = 1, 4, -100, 0x1000
_RDONLY, _NOSUID, _NODEV, _NOEXEC = 1, 2, 4, 8  # the same for mount(2) and for mount_setattr(2)
_MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE, _MS_SLAVE = 32, 4096, 16384, 1 << 18, 1 << 19
_CLONE_NEWNS, _MNT_DETACH, _ST_NOSYMFOLLOW = 0x20000, 2, 0x2000
_PR_SET_PDEATHSIG, _SIGKILL, _SIGPIPE, _SIGXFSZ = 1, 9, 13, 25

# Where programs and their libraries are, should these be mounts.
_PLACES = ("/bin", "/lib", "/lib64", "/sbin", "/usr", "/usr/bin", "/usr/lib", "/usr/lib64", "/usr/sbin")
# Directories above a directory that are looked at.
_DEEPEST = 1024

_libc = ctypes.CDLL(None, use_errno=True)


class _MountAttr(ctypes.Structure):
    _fields_ = [("set", ctypes.c_uint64), ("clear", ctypes.c_uint64),
                ("propagation", ctypes.c_uint64), ("userns_fd", ctypes.c_uint64)]  # fmt: skip


def main() -> int:
    parent, directory, program, *arguments = sys.argv[1:]
    _libc.prctl(_PR_SET_PDEATHSIG, _SIGKILL)
    if os.getppid() != int(parent):
        return FAILED
    try:
        _confine(int(directory), program)
        for ignored in (_SIGPIPE, _SIGXFSZ):  # by Python
            _libc.signal(ignored, None)
        os.execve(program, arguments, os.environ)  # noqa: S606
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        os.write(2, os.fsencode(f"it cannot be confined to its directory, and is not run: {where}{error.strerror}\n"))
    return FAILED


def _confine(directory: int, program: str) -> None:
    """The process is in the directory, and its root is the host's without what is mounted there, read-only. OSError."""
    os.set_inheritable(directory, False)
    place = _place(directory)
    root = _clone(_AT_FDCWD, "/", _RDONLY | _NOSUID | _NODEV)
    # glibc changes modes through /proc/self/fd; more of proc than that would lead to other processes' roots.
    files = _clone(_AT_FDCWD, "/proc/self/fd", _RDONLY | _NOSUID | _NODEV | _NOEXEC)
    parts = [(part, _clone(_AT_FDCWD, part, _RDONLY | _NOSUID | _NODEV)) for part in _hidden(root, program)]
    _checked("unshare", _libc.unshare(_CLONE_NEWNS))
    # What the host unmounts meanwhile is unmounted here, too; nothing that is done here is done there.
    _mount("none", "/", None, _MS_REC | _MS_SLAVE)
    _hang(root, "/")
    os.fchdir(root)
    _checked("pivot_root", _libc.pivot_root(b".", b"."))
    _checked("umount2 of the host's root", _libc.umount2(b".", _MNT_DETACH))
    for part, tree in parts:
        _hang(tree, part)
    _mount("none", "/proc", "tmpfs", _NOSUID | _NODEV | _NOEXEC, "size=64k,mode=755")
    os.makedirs("/proc/self/fd")
    _hang(files, "/proc/self/fd")
    _mount("none", "/proc", None, _MS_REMOUNT | _MS_BIND | _RDONLY | _NOSUID | _NODEV | _NOEXEC)
    os.fchdir(place)


def _place(directory: int) -> int:
    """A mount of the directory alone, which hangs nowhere: `..` ends there.

    Of a mount that hangs nowhere itself, a kernel before 6.15 makes none. Then that mount will do, where it lets nobody
    follow a link: no path within leads out of it, and those that do not begin in the directory need a link.
    """
    try:
        return _clone(directory, "", _NOSUID | _NODEV | _NOEXEC)
    except OSError as error:
        if error.errno == errno.EINVAL and _hangs_nowhere(directory):
            if os.fstatvfs(directory).f_flag & _ST_NOSYMFOLLOW:
                return directory
            raise OSError(errno.EINVAL, "this kernel mounts no part of its mount, where links are followed") from None
        raise


def _hangs_nowhere(directory: int) -> bool:
    """Whether all that is above the directory lies on the same mount, which is not that of the root."""
    mount = _mount_id(directory)
    root = os.open("/", os.O_PATH)
    if mount == _mount_id(root):
        return False
    here = directory
    for _ in range(_DEEPEST):
        above = os.open("..", os.O_PATH | os.O_DIRECTORY, dir_fd=here)
        if _mount_id(above) != mount:
            return False
        if os.path.samestat(os.fstat(above), os.fstat(here)):
            return True
        if here != directory:
            os.close(here)
        here = above
    return False


def _mount_id(fd: int) -> bytes:
    with open(f"/proc/self/fdinfo/{fd}", "rb") as lines:
        return next(line for line in lines if line.startswith(b"mnt_id:"))


def _hidden(root: int, program: str) -> list[str]:
    """Places where programs are that the root's own filesystem does not have as they are, those above others first."""
    above = [program[:at] for at, letter in enumerate(program) if letter == "/" and at]
    return [place for place in sorted({*_PLACES, *above}) if _is_hidden(root, place)]


def _is_hidden(root: int, place: str) -> bool:
    try:
        seen = os.lstat(place)
    except FileNotFoundError:
        return False
    if not stat.S_ISDIR(seen.st_mode):
        return False
    try:
        return not os.path.samestat(seen, os.stat(place[1:], dir_fd=root, follow_symlinks=False))
    except (FileNotFoundError, NotADirectoryError):
        return True


def _clone(at: int, path: str, attributes: int) -> int:
    """A mount of what is there, without mounts below it, which hangs nowhere, and which nothing propagates to."""
    flags = _OPEN_TREE_CLONE | os.O_CLOEXEC | (0 if path else _AT_EMPTY_PATH)
    tree = _checked(f"open_tree of {path or 'the directory'}", _libc.syscall(_OPEN_TREE, at, os.fsencode(path), flags))
    wanted = _MountAttr(set=attributes, propagation=_MS_PRIVATE)
    size = ctypes.c_size_t(ctypes.sizeof(wanted))
    done = _libc.syscall(_MOUNT_SETATTR, tree, b"", _AT_EMPTY_PATH, ctypes.byref(wanted), size)
    _checked(f"mount_setattr of {path or 'the directory'}", done)
    return tree


def _hang(tree: int, place: str) -> None:
    at = ctypes.c_int(_AT_FDCWD)
    done = _libc.syscall(_MOVE_MOUNT, tree, b"", at, os.fsencode(place), _MOVE_MOUNT_F_EMPTY_PATH)
    _checked(f"move_mount to {place}", done)


def _mount(source: str, target: str, fstype: str | None, flags: int, data: str = "") -> None:
    kind = None if fstype is None else os.fsencode(fstype)
    done = _libc.mount(os.fsencode(source), os.fsencode(target), kind, ctypes.c_ulong(flags), os.fsencode(data))
    _checked(f"mount on {target}", done)


def _checked(what: str, result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)
    return result


if __name__ == "__main__":
    sys.exit(main())
