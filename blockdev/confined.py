"""Programs that can write to one directory and to nothing else, whatever somebody swaps in it while they work.

A program that goes by names follows a link that was put in a directory's place a moment ago. Here it leads into a
read-only view of the root's own filesystem, at most: the program has a mount namespace of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys

from blockdev import one_directory

# The status of a program that could not be confined, and was not run.
FAILED = one_directory.FAILED


def command(program: str, directory: int, *arguments: str) -> list[str]:
    """The argument list that runs the program, an absolute path, in the directory; whoever runs it passes on that
    descriptor. Inside, there is no /proc but /proc/self/fd, and the directory may have no path.

    It dies with the thread that has started it. Where it cannot be confined it is not run: the status is FAILED then,
    and the reason stands on its standard error.
    """
    name = os.path.basename(program)
    return [sys.executable, "-I", "-S", one_directory.__file__, str(os.getpid()), str(directory),
            os.path.realpath(program), name, *arguments]  # fmt: skip


def doubt(directory: str) -> str:
    """Why this node cannot confine a program to a directory, which is tried; empty where it can."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        done = subprocess.run(
            command("/bin/true", fd), pass_fds=[fd], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    finally:
        os.close(fd)
    return done.stderr.strip()[-500:] if done.returncode else ""
