"""Files and names that are on the disk when the call returns."""

from __future__ import annotations

import os


def sync_directory(path: str) -> None:
    """What was created, renamed or removed in the directory stays so after a power cut."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write(path: str, content: bytes) -> None:
    """Write a file of mode 0600 beside the place where it will be renamed to."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, content)
        os.fsync(fd)
    finally:
        os.close(fd)
