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


class Workers:
    """So many threads. Three quarters of them, at most, work for volumes that may hang of one cause."""

    def __init__(self, name: str, count: int) -> None:
        self.pool = ThreadPoolExecutor(max_workers=count, thread_name_prefix=f"csi {name}")
        self._most = max(1, count * 3 // 4)
        self._lock = threading.Lock()
        self._working: Counter[str] = Counter()

    @contextlib.contextmanager
    def admitted(self, request: object) -> Iterator[None]:
        """CallError for a call beside which too many of its family work already."""
        family = family_of(request)
        with self._lock:
            if family and self._working[family] >= self._most:
                raise CallError(
                    grpc.StatusCode.UNAVAILABLE,
                    f"{self._most} calls for volumes {family}-… are under way; try again when some have ended",
                )
            self._working[family] += 1
        try:
            yield
        finally:
            with self._lock:
                self._working[family] -= 1
                if not self._working[family]:
                    del self._working[family]

    def close(self) -> None:
        """Idle threads end; those that work, or hang, end with the process."""
        self.pool.shutdown(wait=False, cancel_futures=True)


def family_of(request: object) -> str:
    """What the ids of one store begin with, an NFS export among them; empty for a call about none."""
    if not isinstance(request, Message):
        return ""
    known = request.DESCRIPTOR.fields_by_name
    for field in ("volume_id", "source_volume_id", "snapshot_id"):
        if field in known and getattr(request, field):
            return str(getattr(request, field))[:_LONGEST].rpartition("-")[0]
    return ""
