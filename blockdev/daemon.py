"""What every server of ours on a unix socket needs: the socket, the signals that end it, and systemd told of both."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import grpc


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


def answers(path: str) -> bool:
    """Whether somebody listens at the socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except OSError:
            return False
        return True


def listen(server: grpc.Server, path: str) -> None:
    """The server listens at the path, for root only; what lay there is gone."""
    os.makedirs(os.path.dirname(path), mode=0o750, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    before = os.umask(0o077)
    try:
        server.add_insecure_port(f"unix:{path}")
    finally:
        os.umask(before)


def notify(state: str) -> None:
    """Tell systemd, where it asked (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out, contextlib.suppress(OSError):
        out.connect(address)
        out.send(state.encode())


def watched(alive: Callable[[], bool]) -> None:
    """Ask from now on, twice in systemd's WatchdogSec=, whether the process still does its work, and say so as long as
    it does; systemd starts it anew where that is not heard. Nothing where systemd does not ask."""
    span = os.environ.get("WATCHDOG_USEC", "")
    if not span.isdecimal() or os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return
    pause = threading.Event()

    def tell() -> None:
        while True:
            if alive():
                notify("WATCHDOG=1")
            pause.wait(int(span) / 2_000_000)

    threading.Thread(target=tell, name="watchdog", daemon=True).start()
