"""A process that tries whether the mount of a directory can be had with other users and groups; see `idmapped`.

It is run by its path and imports next to nothing: `FD`, a descriptor of the directory. It ends with the errno of
mount_setattr(2), or with 255 where that could not be tried.
"""

import contextlib
import ctypes
import os
import signal
import sys

_OPEN_TREE, _MOUNT_SETATTR = 428, 442
_OPEN_TREE_CLONE, _AT_EMPTY_PATH, _MOUNT_ATTR_IDMAP = 1, 0x1000, 0x100000
_CLONE_NEWUSER, _PR_SET_PDEATHSIG = 0x10000000, 1
_NOT_TRIED = 255


class _MountAttr(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "userns")]


def main() -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    parent, directory = map(int, sys.argv[1:])
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    tree = libc.syscall(_OPEN_TREE, directory, b"", _OPEN_TREE_CLONE | _AT_EMPTY_PATH)
    if os.getppid() != parent or tree < 0:
        return _NOT_TRIED
    here, there = os.pipe()
    other = os.fork()
    if other == 0:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        os.write(there, b"x" if _has_users(libc) else b"-")
        signal.pause()
    try:
        if os.read(here, 1) != b"x":
            return _NOT_TRIED
        users = os.open(f"/proc/{other}/ns/user", os.O_RDONLY)
        wanted = _MountAttr(set=_MOUNT_ATTR_IDMAP, userns=users)
        done = libc.syscall(_MOUNT_SETATTR, tree, b"", _AT_EMPTY_PATH, ctypes.byref(wanted), ctypes.sizeof(wanted))
        return ctypes.get_errno() if done < 0 else 0
    except OSError:
        return _NOT_TRIED
    finally:
        with contextlib.suppress(OSError):
            os.kill(other, signal.SIGKILL)
            os.waitpid(other, 0)


def _has_users(libc: ctypes.CDLL) -> bool:
    """This process has a user namespace of its own now, with its own user and group in it: an empty one maps nothing,
    and others' would take CAP_SETUID."""
    try:
        if libc.unshare(_CLONE_NEWUSER) < 0:
            return False
        for file, content in (("setgroups", "deny"), ("uid_map", "0 0 1"), ("gid_map", "0 0 1")):
            with open(f"/proc/self/{file}", "w") as mapping:
                mapping.write(content)
    except OSError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
