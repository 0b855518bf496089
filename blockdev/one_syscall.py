"""A process that makes one system call which may never return, and ends with its errno; see `isolated`.

It is run by its path and imports next to nothing: `create FD` or `mount SOURCE TARGET TYPE FLAGS DATA`.
"""

import ctypes
import os
import sys

_FSCONFIG, _CMD_CREATE = 431, 6
_PR_SET_PDEATHSIG, _SIGKILL = 1, 9


def main() -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    parent, call, *words = sys.argv[1:]
    libc.prctl(_PR_SET_PDEATHSIG, _SIGKILL)
    if os.getppid() != int(parent):
        return 0
    if call == "create":
        result = libc.syscall(_FSCONFIG, int(words[0]), _CMD_CREATE, None, None, 0)
    else:
        source, target, fstype, flags, data = words
        result = libc.mount(os.fsencode(source), os.fsencode(target), os.fsencode(fstype),
                            ctypes.c_ulong(int(flags)), os.fsencode(data))  # fmt: skip
    return ctypes.get_errno() if result < 0 else 0


if __name__ == "__main__":
    sys.exit(main())
