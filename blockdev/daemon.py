"""What every server of ours on a unix socket needs: the socket, the signals that end it, and systemd told of both."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import random
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from blockdev import durable

if TYPE_CHECKING:
    import grpc

log = logging.getLogger("runvol.daemon")

# Bytes of a unix socket's path (unix(7), less the zero at its end).
LONGEST_PATH = 107
_SUFFIX = ".sock"
# Bytes of a lock's file, one for each of those that hang; `struct flock`.
_PLACES, _FLOCK = 8, "hhqqi"
# Tries to hold a file besides the last, and seconds between them.
_TRIES, _MOMENT = 2, 0.02
# Seconds between two looks whether the process does its work.
_EVERY = 10.0


def signals() -> socket.socket:
    """Readable once SIGTERM or SIGINT has come.

    The kernel may hand a signal to any thread; Python's handlers run in the main one, which a wait on a lock would
    never wake for them. The wake-up descriptor is written by the C handler, in whichever thread it runs.
    """
    told, tell = socket.socketpair()
    tell.setblocking(False)
    signal.set_wakeup_fd(tell.detach())
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    return told


def socket_path(endpoint: str) -> str:
    """The path in `unix:///run/runvol/csi.sock`. ValueError, with what is wrong in words, for anything else."""
    path = endpoint.removeprefix("unix://")
    if not endpoint.startswith("unix:///") or not path.endswith(_SUFFIX):
        raise ValueError(f"must be unix:///<absolute path>{_SUFFIX}")
    if len(os.fsencode(path)) > LONGEST_PATH:
        raise ValueError(f"a unix socket's path has at most {LONGEST_PATH} bytes")
    return path


def answers(path: str) -> bool:
    """Whether a process has the socket, and will answer or hangs. Never waits for it, and is seen by nobody.

    unix(7): of a socket that a process has bound, the kernel says that it is of another type (EPROTOTYPE), and that it
    refuses (ECONNREFUSED) where none has. A connection would take a place in a queue that a process that hangs never
    empties, and be waited for once that is full.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(path)
        except OSError as error:
            return error.errno == errno.EPROTOTYPE
        return False


def is_taken(path: str) -> bool:
    """Whether a process that is not about to end has the socket: one that was killed while it hangs in the kernel keeps
    it, and answers nobody any more."""
    if not answers(path):
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(path)
        except OSError as error:
            return error.errno not in (errno.ENOENT, errno.ECONNREFUSED)
        pid, _uid = peer(probe)
        return not _is_killed(pid)


def peer(connection: socket.socket) -> tuple[int, int]:
    """The process at the other end of a unix socket, and its user (unix(7), SO_PEERCRED)."""
    pid, uid, _gid = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(pid), int(uid)


def listen(server: grpc.Server, path: str) -> None:
    """The server listens at the path, for root only; what lay there is gone. OSError."""
    os.makedirs(os.path.dirname(path), mode=0o750, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    before = os.umask(0o077)
    try:
        server.add_insecure_port(f"unix:{path}")
    except RuntimeError:
        raise _why_not(path) from None
    finally:
        os.umask(before)


def _why_not(path: str) -> OSError:
    """What the kernel says to who listens there; gRPC tells it to nobody."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.bind(path)
        except OSError as error:
            return OSError(error.errno, error.strerror, path)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    return OSError(errno.EADDRNOTAVAIL, "cannot be listened on", path)


def notify(state: str) -> None:
    """Tell systemd, where it asked (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
        out.connect(address)
        out.send(state.encode())


def sign_of(run_dir: str) -> str:
    """The file whose time of change says when a process was last seen to do its work."""
    return os.path.join(run_dir, "alive")


class Held(Exception):
    """Another process has it; `pid`, 0 where that is not to be seen from here."""

    def __init__(self, path: str, pid: int) -> None:
        self.path, self.pid = path, pid
        super().__init__(f"process {pid or '?'} holds {path}")


def hold(path: str) -> int:
    """A descriptor that keeps the file from other processes until it is closed, or this process ends; children that
    outlive it do not hold it (fcntl(2)'s record locks). Held, OSError.

    A process that was killed while it hangs in the kernel keeps its lock, and does nothing any more: then the next
    byte of the file is locked, by whoever finds all other bytes without a process that lives. The file is open for
    reading only, so that its filesystem can be made read-only."""
    for _ in range(_TRIES):
        with contextlib.suppress(Held):
            return _held(path)
        time.sleep(random.uniform(_MOMENT, 3 * _MOMENT))  # noqa: S311  (two that begin at once see each other)
    return _held(path)


def _held(path: str) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        ours = next((place for place in range(_PLACES) if _locked(fd, place)), None)
        for place in range(_PLACES):
            pid = _holder(fd, place) if place != ours else None
            if pid is not None and (ours is None or not _is_killed(pid)):
                raise Held(path, pid)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _locked(fd: int, place: int) -> bool:
    """Whether this process alone has the byte. Its lock is a reader's, since a writer's needs a file that is open for
    writing, and readers do not exclude each other: so it is looked afterwards who else has one."""
    try:
        fcntl.lockf(fd, fcntl.LOCK_SH | fcntl.LOCK_NB, 1, place)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        return False
    if _holder(fd, place) is None:
        return True
    fcntl.lockf(fd, fcntl.LOCK_UN, 1, place)
    return False


def _holder(fd: int, place: int) -> int | None:
    """The process that has this byte, 0 where it is not to be seen from here; None for nobody else."""
    asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, place, 1, 0)
    kind, _whence, _start, _length, pid = struct.unpack(_FLOCK, fcntl.fcntl(fd, fcntl.F_GETLK, asked))
    return None if kind == fcntl.F_UNLCK else int(pid)


def _is_killed(pid: int) -> bool:
    """Whether none of its threads comes back from the kernel (proc(5))."""
    try:
        tasks = os.listdir(f"/proc/{pid}/task") if pid > 0 else []
        return bool(tasks) and all(_has_ended(f"/proc/{pid}/task/{task}/status") for task in tasks)
    except OSError:
        return False


def _has_ended(status: str) -> bool:
    try:
        with open(status) as file:
            said = dict(line.split(":", 1) for line in file if ":" in line)
    except (FileNotFoundError, ProcessLookupError):
        return True
    return said["State"].split()[0] in "ZX" or bool(int(said["SigPnd"], 16) & 1 << (signal.SIGKILL - 1))


def told_process(run_dir: str) -> str:
    """The file that says which process serves: its pid, and when it began, in clock ticks since the boot (proc(5)).
    Whoever is elsewhere reaches it by that, in its mount namespace."""
    return os.path.join(run_dir, "plugin")


def tell_process(run_dir: str) -> None:
    """Write that file for this process."""
    with open("/proc/self/stat") as file:
        began = file.read().rpartition(")")[2].split()[19]
    durable.replace(told_process(run_dir), f"{os.getpid()} {began}\n".encode(), beside=f"{run_dir}/.plugin.")


def watched(alive: Callable[[], bool], sign: str) -> None:
    """Ask from now on whether the process still does its work, and say so as long as it does: by the time of the file
    `sign`, which a probe looks at, and to systemd, where it asks, twice in its WatchdogSec=. Both start it anew where
    that is not heard. A file takes no connections, so nobody keeps others from it."""
    span, most = os.environ.get("WATCHDOG_USEC", ""), _EVERY
    if span.isdecimal() and os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid()):
        most = min(most, int(span) / 2_000_000)

    def tell() -> None:
        trouble, pause = "", threading.Event()
        while True:
            try:
                if alive():
                    notify("WATCHDOG=1")
                    _touch(sign)
                now = ""
            except Exception as error:  # no descriptor, no thread, no memory: of this moment
                now = f"{type(error).__name__}: {error}"
                if now != trouble:
                    log.warning("whether the process does its work could not be told", extra={"why": now})
            trouble = now
            pause.wait(most)

    threading.Thread(target=tell, name="watchdog", daemon=True).start()


def _touch(path: str) -> None:
    try:
        os.utime(path, follow_symlinks=False)
    except FileNotFoundError:
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
