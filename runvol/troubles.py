"""What a command ends with: a status, and one sentence for each error that is expected.

`runvol`, the service that starts without the command line's library, and the FlexVolume driver tell errors in these
words. The table of the statuses is in docs/cli.md.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import threading
from collections.abc import Iterator

from blockdev.errors import of_system

# Fine; something is wrong, or it failed; the command line or a setting is wrong; it could not be looked at.
FINE, FOUND, USAGE, NOT_SEEN = 0, 1, 2, 3

_RIGHTS = (errno.EACCES, errno.EPERM)
# Seconds in which a list is made, or never.
LOOKING = 60.0
# The base classes of the rooms' errors; only rooms that are loaded can have raised one.
_ERRORS = {
    "blockdev.errors": "BlockdevError",
    "volumes.errors": "VolumeError",
    "guestmount.errors": "GuestmountError",
    "snapshotter.errors": "SnapshotterError",
    "runvol.config": "ConfigError",
}
# Those that say of what was typed or set that it cannot be meant.
_OF_USAGE = {
    "runvol.config": "ConfigError",
    "volumes.errors": "InvalidParameter",
    "snapshotter.errors": "BadRequest",
}


class NotSeen(Exception):
    """What a command was to tell could not be looked at; the sentence says why."""


@contextlib.contextmanager
def ending(seconds: float) -> Iterator[None]:
    """The process ends, with NOT_SEEN, if the block does not in so many seconds: what a dead server or disk keeps in
    the kernel nobody else ends. For what changes nothing; 0 for however long it takes."""
    if not seconds:
        yield
        return
    watch = threading.Timer(seconds, _end, (seconds,))
    watch.daemon = True
    watch.start()
    try:
        yield
    finally:
        watch.cancel()


def _end(seconds: float) -> None:
    said = f"Error: this did not end within {seconds:.0f} s: a disk or a server does not answer; see `runvol doctor`\n"
    with contextlib.suppress(OSError):
        os.write(2, said.encode())
    os._exit(NOT_SEEN)


@contextlib.contextmanager
def looking(within: float = 0.0) -> Iterator[None]:
    """NotSeen instead of what the rooms raise: nothing is known to be wrong, and nothing to be well. `within`: as in
    `ending`."""
    try:
        with ending(within):
            yield
    except Exception as error:
        said = sentence(error)
        if said is None or isinstance(error, NotSeen) or status(error) == USAGE:
            raise
        raise NotSeen(said) from error


def sentence(error: BaseException) -> str | None:
    """What a person reads of an error; None for one that nobody expects, whose traceback is to be seen."""
    if isinstance(error, OSError):
        return _of_system(error)
    return str(error) if isinstance(error, (NotSeen, *_classes(_ERRORS))) else None


def status(error: BaseException) -> int:
    """The status of a command that ends with this error."""
    if isinstance(error, NotSeen):
        return NOT_SEEN
    return USAGE if isinstance(error, _classes(_OF_USAGE)) else FOUND


def _classes(named: dict[str, str]) -> tuple[type[BaseException], ...]:
    return tuple(getattr(sys.modules[module], name) for module, name in named.items() if module in sys.modules)


def _of_system(error: OSError) -> str:
    """Whoever is not root is told to be."""
    said = of_system(error)
    return f"{said}; run runvol as root" if error.errno in _RIGHTS and os.geteuid() != 0 else said
