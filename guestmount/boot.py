"""Where a node's records of this boot lie: in the state directory, so that an emptied `/run` loses nothing.

What another boot wrote speaks of mounts, devices and guests that are gone with it, and is forgotten; so nothing here is
owed a flush to the disk.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil

from blockdev import durable, flocks

log = logging.getLogger("runvol.boot")

_ID = "/proc/sys/kernel/random/boot_id"
_BOOTS = "boots"
# What releases that kept their records in the run directory have there, and where their locks are.
_BEFORE = (("claims", "locks"), ("flexvolume/targets", ""))
_PATIENCE = 5.0


def directory(state_dir: str) -> str:
    """`<state_dir>/boots/<boot id>`; nothing is made."""
    with open(_ID, encoding="ascii") as file:
        return os.path.join(state_dir, _BOOTS, file.read().strip())


def forget_others(state_dir: str) -> list[str]:
    """Remove the records of other boots; what was done, in words."""
    place, own = os.path.join(state_dir, _BOOTS), os.path.basename(directory(state_dir))
    with contextlib.suppress(FileNotFoundError):
        others = [name for name in os.listdir(place) if name != own]
        for name in others:
            path = os.path.join(place, name)
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    os.unlink(path)
        if others:
            return [f"forgot the records of {len(others)} boot{'s' if len(others) > 1 else ''} that ended"]
    return []


def take_over(run_dir: str, records: str) -> None:
    """What an older release keeps in the run directory of this same boot lies among the records from now on."""
    for kind, locks in _BEFORE:
        old, new = os.path.join(run_dir, kind), os.path.join(records, kind)
        names: list[str] = []
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            names = os.listdir(old)
        for name in names:
            lock = None
            if locks:
                os.makedirs(os.path.join(run_dir, locks), mode=0o700, exist_ok=True)
                lock = flocks.take(os.path.join(run_dir, locks, name.removesuffix(".json")), _PATIENCE)
                if lock is None:
                    log.warning("a record stays with an older release, which is at work on it", extra={"record": name})
                    continue
            try:
                _move(os.path.join(old, name), os.path.join(new, name))
            finally:
                if lock is not None:
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(os.path.join(run_dir, locks, name.removesuffix(".json")))
                    flocks.release(lock)


def _move(old: str, new: str) -> None:
    try:
        content = durable.read(old)
    except OSError as error:
        if error.errno not in (errno.ENOENT, *durable.NO_RECORD):
            raise
        return
    os.makedirs(os.path.dirname(new), mode=0o700, exist_ok=True)
    # After a downgrade and an upgrade in one boot the older release's is the later one.
    if not os.path.exists(new) or os.stat(new).st_mtime_ns < os.stat(old).st_mtime_ns:
        durable.replace(new, content, synced=False)
    os.unlink(old)
