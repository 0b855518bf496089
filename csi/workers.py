"""Threads for calls, kept apart: a probe, a look and a pod's start never wait for what others have used up."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
from google.protobuf.message import Message

from csi.errors import CallError

_LONGEST = 128
# Seconds in which all threads have to be there.
_START = 30.0


class _Pool(ThreadPoolExecutor):
    """All its threads are there from the start: gRPC's only listener submits, and would end with one that cannot."""

    def __init__(self, name: str, count: int) -> None:
        super().__init__(max_workers=count, thread_name_prefix=f"csi {name}")
        together = threading.Barrier(count + 1)
        for _ in range(count):
            self.submit(together.wait)
        together.wait(_START)

    def _adjust_thread_count(self) -> None:
        """RuntimeError while they are started; never after."""
        if len(self._threads) < self._max_workers:
            super()._adjust_thread_count()


class Workers:
    """So many threads. What may hang of one cause takes three quarters of them at most, and nobody who has some already
    takes one of the last quarter."""

    def __init__(self, name: str, count: int) -> None:
        self.name, self.count = name, count
        self.pool = _Pool(name, count)
        self._most = max(1, count * 3 // 4)
        self._lock = threading.Lock()
        self._working: Counter[str] = Counter()

    @contextlib.contextmanager
    def admitted(self, request: object) -> Iterator[None]:
        """CallError for a call beside which too many of its family work already."""
        family = family_of(request)
        with self._lock:
            if family and self._working[family] and self._working.total() >= self._most:
                raise CallError(
                    grpc.StatusCode.UNAVAILABLE,
                    f"too many calls are under way, some for volumes of {family}; try again when they have ended",
                )
            self._working[family] += 1
        try:
            yield
        finally:
            with self._lock:
                self._working[family] -= 1
                if not self._working[family]:
                    del self._working[family]

    @property
    def busy(self) -> int:
        """Threads that have a call."""
        with self._lock:
            return self._working.total()

    @property
    def queued(self) -> int:
        """Calls that wait for a thread."""
        return self.pool._work_queue.qsize()

    def close(self) -> None:
        """Idle threads end; those that work, or hang, end with the process."""
        self.pool.shutdown(wait=False, cancel_futures=True)


def family_of(request: object) -> str:
    """What the ids of one store begin with, an NFS export among them; empty for a call about none."""
    if not isinstance(request, Message):
        return ""
    known = request.DESCRIPTOR.fields_by_name
    for field in ("volume_id", "source_volume_id", "snapshot_id", "group_snapshot_id", "source_volume_ids"):
        if field in known and getattr(request, field):
            value = getattr(request, field)
            one = value if isinstance(value, str) else str(value[0])
            return one[:_LONGEST].rpartition("-")[0] or one[:_LONGEST]
    if "parameters" in known and "name" in known:  # of a creation: what its class says where
        parameters = dict(request.parameters)  # type: ignore[attr-defined]
        if parameters.get("server"):
            return f"{parameters['server']}:{parameters.get('path', '')}"[:_LONGEST]
    return ""
