"""The node plugin does a FlexVolume call, asked over a socket: no imports, no stores to open, one process that knows.

One JSON document each way, ended by closing the sending side. What cannot be answered here is done by the caller
alone, so nothing depends on this.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Sequence

from blockdev import Deadline, daemon, log_context
from flexvolume.calls import Driver, Status
from guestmount import Node

log = logging.getLogger("runvol.flexvolume")

SOCKET = "flexvolume.sock"
_OF_POD = re.compile(r"/pods/([^/]+)/")
VERSION = 1
_LARGEST = 1 << 20
_AT_ONCE = 64
_PATIENCE = 5.0
# Seconds after an accept that failed: it fails at once again as long as its cause lasts.
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.05, 1.0


class Service:
    """Listens on `<run_dir>/flexvolume.sock` from `start` to `stop`; only the user that runs it is answered."""

    def __init__(self, node: Node, run_dir: str, records: str) -> None:
        self._node, self._directory = node, os.path.join(records, "flexvolume")
        self._path = os.path.join(run_dir, SOCKET)
        self._free = threading.Semaphore(_AT_ONCE)
        self._stopping = threading.Event()

    def start(self) -> None:
        os.makedirs(os.path.dirname(self._path), mode=0o700, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        before = os.umask(0o177)
        try:
            self._listener.bind(self._path)
        finally:
            os.umask(before)
        self._listener.listen(_AT_ONCE)
        threading.Thread(target=self._accept, name="flexvolume", daemon=True).start()

    def stop(self) -> None:
        """No further call; those under way end with the process, and their callers go on alone."""
        self._stopping.set()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        """Until `stop`: the kernel goes on taking connections in, so a listener that gave up would let callers wait."""
        pause = 0.0
        while not self._stopping.wait(pause):
            try:
                self._take_one()
            except Exception as error:
                # EMFILE, ECONNABORTED, no thread, no memory: of this moment or of this caller.
                if self._stopping.is_set():
                    return
                if not pause:
                    log.warning(
                        "a call could not be taken; trying again", extra={"why": f"{type(error).__name__}: {error}"}
                    )
                pause = min(max(2 * pause, _SHORTEST_PAUSE), _LONGEST_PAUSE)
            else:
                if pause:
                    log.info("calls are taken again")
                pause = 0.0

    def _take_one(self) -> None:
        connection, _ = self._listener.accept()
        with contextlib.ExitStack() as unless_served:
            unless_served.callback(connection.close)
            if daemon.peer(connection)[1] != os.geteuid() or not self._free.acquire(blocking=False):
                return
            unless_served.callback(self._free.release)
            threading.Thread(target=self._serve, args=[connection], name="flexvolume call", daemon=True).start()
            unless_served.pop_all()

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection:
                connection.settimeout(_PATIENCE)
                request = _request(_all_of(connection))
                if request is not None:
                    connection.sendall(self._answer(*request).encode())
        except (OSError, ValueError) as error:
            log.warning("a call was not answered", extra={"why": str(error)})
        except Exception:
            # Its caller reads nothing, and does the call alone.
            log.exception("a call was not answered")
        finally:
            self._free.release()

    def _answer(self, words: Sequence[str], name: str, seconds: float) -> str:
        started = time.monotonic()
        target = words[1] if words[0] in ("mount", "unmount") and len(words) > 1 else ""
        pod = _OF_POD.search(target)
        with log_context.about(request_id=log_context.request_id(), rpc=words[0], pod_uid=pod[1] if pod else ""):
            reply = Driver(self._node, directory=self._directory, name=name).answer(words, Deadline.after(seconds))
            level = logging.INFO if reply.status is Status.SUCCESS else logging.WARNING
            took = round((time.monotonic() - started) * 1000, 1)
            log.log(level, "call done", extra={"call": words[0][:40], "target": target[:4096], "ms": took,
                                               "status": reply.status.value, "reason": reply.message})  # fmt: skip
        return json.dumps(reply.document())


def _all_of(connection: socket.socket) -> bytes:
    data = b""
    while part := connection.recv(1 << 16):
        data += part
        if len(data) > _LARGEST:
            raise ValueError(f"a request of more than {_LARGEST} bytes")
    return data


def _request(data: bytes) -> tuple[list[str], str, float] | None:
    """Words, the driver's name and the seconds that the call may take; None for a version that is not ours."""
    found = json.loads(data)
    if not isinstance(found, dict) or found.get("version") != VERSION:
        return None
    words, name, seconds = found.get("words"), found.get("name"), found.get("seconds")
    if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
        return None
    if not isinstance(name, str) or not isinstance(seconds, int | float):
        return None
    return words, name, max(1.0, min(float(seconds), 3600.0))
