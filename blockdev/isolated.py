"""Mounting what may never answer, in a process of its own: it is killed when its time is over, and takes no thread of
this one with it. One that the kernel does not let go even then is left to it, and only that process is lost."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence

from blockdev.deadlines import Deadline
from blockdev.errors import WaitExpired

_PROGRAM = os.path.join(os.path.dirname(__file__), "one_syscall.py")
_DIES_WITHIN = 1.0


def create(context: int, what: str, deadline: Deadline) -> None:
    """fsconfig(2)'s command that makes a filesystem context's superblock. OSError, or WaitExpired naming `what`."""
    run(_PROGRAM, "create", str(context), what=what, deadline=deadline, keep=[context])


def mount(source: str, target: str, fstype: str, flags: int, data: str, *, what: str, deadline: Deadline) -> None:
    """mount(2). OSError, or WaitExpired naming `what`; the mount may still have come about in that very moment."""
    run(_PROGRAM, "mount", source, target, fstype, str(flags), data, what=what, deadline=deadline)


def run(program: str, *words: str, what: str, deadline: Deadline, keep: Sequence[int] = ()) -> None:
    """A program of this room, with this process's id before its words; what it ends with is an errno. OSError, or
    WaitExpired naming `what`. `keep`: descriptors that it needs."""
    import subprocess

    deadline.check(what)
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", program, str(os.getpid()), *words], pass_fds=keep, stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        status = process.wait(deadline.remaining())
    except subprocess.TimeoutExpired:
        process.kill()
        try:
            process.wait(_DIES_WITHIN)
        except subprocess.TimeoutExpired:
            # Uninterruptible; whoever waits for it must not be anybody that is needed.
            threading.Thread(target=process.wait, name=what, daemon=True).start()
        raise WaitExpired(what, deadline.given) from None
    if status < 0:
        raise OSError(4, f"the process that was to do it was killed by signal {-status}")
    if status:
        raise OSError(status, os.strerror(status))
