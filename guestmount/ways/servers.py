"""Mounts of servers, which may be dead: what they say of themselves, at the cost of a few seconds a server."""

from __future__ import annotations

import errno
import os
import threading
import time

from blockdev import Deadline, nfs
from blockdev.deadlines import bounded
from blockdev.errors import WaitExpired
from guestmount.claims import Claim
from guestmount.errors import Refused
from guestmount.ways.base import Problem, Usage, of_mount

# Seconds that a look waits for a server, and for which it then counts as silent for all looks at its other mounts. One
# whose caller had fewer says nothing of the server. Between two tries where an earlier look has not come back.
_PATIENCE, _REMEMBERED, _STEP = 3.0, 10.0, 0.05
# Seconds for which a mount that has answered needs no other look, and how many are kept in mind.
_MOMENT, _MOST_SEEN = 0.5, 1000


class _Silence:
    """The servers of a process that did not answer lately."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._until: dict[str, float] = {}
        # When each mount was last seen to answer.
        self._seen: dict[str, float] = {}

    def see(self, path: str) -> None:
        with self._lock:
            now = time.monotonic()
            if len(self._seen) > _MOST_SEEN:
                self._seen = {one: at for one, at in self._seen.items() if now - at < _MOMENT}
            self._seen[path] = now

    def was_seen(self, path: str) -> bool:
        """A moment ago: whoever measures asks for what is wrong as well."""
        with self._lock:
            return time.monotonic() - self._seen.get(path, -_MOMENT) < _MOMENT

    def check(self, server: str) -> None:
        with self._lock:
            if time.monotonic() < self._until.get(server, 0.0):
                raise nfs.ServerSilent(server, "a mount of it hangs")

    def note(self, server: str) -> None:
        with self._lock:
            now = time.monotonic()
            self._until = {one: until for one, until in self._until.items() if until > now}
            self._until[server] = now + _REMEMBERED


_silence = _Silence()


def usage(claim: Claim, path: str, deadline: Deadline) -> Usage:
    """Of the mount at `path`. ServerSilent; WaitExpired for a caller who cannot wait for so long that the server is
    known to be silent; Refused for a directory that its server has no more."""
    if claim.nfs is None:
        return of_mount(path, deadline)
    return _asked(claim, path, claim.nfs.server, min(_PATIENCE, deadline.remaining()))


def _asked(claim: Claim, path: str, server: str, patience: float) -> Usage:
    try:
        measured = _measured(path, server, Deadline.after(patience))
    except WaitExpired as error:
        if patience < _PATIENCE:
            raise
        _silence.note(server)
        raise nfs.ServerSilent(server, f"the mount at {path} hangs") from error
    except OSError as error:
        if error.errno != errno.ESTALE:
            raise
        raise Refused(stale(claim)) from None
    _silence.see(path)
    return measured


def _measured(path: str, server: str, deadline: Deadline) -> Usage:
    """WaitExpired at the deadline, not before: an earlier look that has not come back yet may have had a moment only,
    and is waited for as the own one would be."""
    while True:
        _silence.check(server)
        try:
            return of_mount(path, deadline)
        except WaitExpired:
            if not deadline.remaining():
                raise
            time.sleep(min(_STEP, deadline.remaining()))


def problems(claim: Claim, path: str) -> list[Problem]:
    """What is wrong with the mount at `path`, as far as its server tells."""
    if claim.nfs is None or _silence.was_seen(path):
        return []
    try:
        _asked(claim, path, claim.nfs.server, _PATIENCE)
    except nfs.ServerSilent as error:
        return [Problem(reason="ServerSilent", message=str(error), unreachable=True)]
    except Refused as error:
        return [Problem(reason="Stale", message=str(error), lost=True)]
    except OSError as error:
        return [Problem(reason="NotLookedAt", message=f"{path}: {os.strerror(error.errno or 0)}", unreachable=True)]
    return []


def is_stale(path: str, deadline: Deadline) -> bool:
    """Whether the server has no more what is mounted at `path`; False where it does not answer."""
    try:
        bounded(f"looking at {path}", Deadline.after(min(_PATIENCE, deadline.remaining())), lambda: os.statvfs(path))
    except WaitExpired:
        return False
    except OSError as error:
        return error.errno == errno.ESTALE
    return False


def stale(claim: Claim) -> str:
    """What to do about one that others have, in words."""
    return (
        f"volume {claim.volume}: its server has no more what {claim.source} was when it was mounted (the directory was "
        "removed or restored there); end all pods that have it, and it is mounted anew"
    )
