"""Answers of an API server that are kept on the disk, for when it is silent."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import msgspec

from blockdev import durable

log = logging.getLogger("runvol.answers")

_UID = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,127}\Z")
_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?\Z")
# Answers that are kept, by what they are of, and seconds that one of a pod which is no more may stay.
_MOST, _STAYS = {"pod": 5000, "class": 200, "claim": 2000}, 24 * 3600.0
# Bytes of one, and of all of a kind: who makes pods decides how large what is known of them is.
_LARGEST, _ALL = 1 << 20, 64 << 20
# Seconds, or answers, after which is looked at what may go.
_TIDY, _MANY = 3600.0, 500

T = TypeVar("T")


class _Answer(msgspec.Struct, Generic[T], frozen=True):
    """A file that got another's name is no answer. `cluster`: what tells clusters apart; empty for a pod, whose UID no
    other pod anywhere has."""

    of: str
    what: T
    cluster: str = ""


class Kept:
    """Answers on the disk, one file each. Writing happens behind: nobody waits for a disk to be told what is known."""

    def __init__(self, directory: str, *, gone: Callable[[str], bool | None] | None = None) -> None:
        """`gone`: whether the pod of a UID is no more, None for not known; without it nothing is tidied."""
        self._directory, self._gone = directory, gone
        self._written: dict[str, object] = {}
        self._waiting: queue.SimpleQueue[tuple[str, _Answer[Any] | None]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._writer: threading.Thread | None = None

    def put(self, kind: str, name: str, what: object, *, cluster: str = "") -> None:
        """Kept from some moment on, unless it is already."""
        file, answer = _file(kind, name), _Answer(of=name, what=what, cluster=cluster)
        if not file or self._written.get(file) == answer:
            return
        with self._lock:
            if len(self._written) > 3 * _MOST["pod"]:
                self._written.clear()
            self._written[file] = answer
            if not self._writes(file):
                del self._written[file]
                return
        self._waiting.put((file, answer))

    def drop(self, kind: str, name: str) -> None:
        """Kept no longer, from some moment on."""
        file = _file(kind, name)
        if not file or not self.has(kind, name):
            return
        with self._lock:
            self._written.pop(file, None)
            if not self._writes(file):
                return
        self._waiting.put((file, None))

    def _writes(self, file: str) -> bool:
        """Whether somebody writes."""
        if self._writer is None:
            self._writer = threading.Thread(target=self._write, name="answers", daemon=True)
            try:
                self._writer.start()
            except RuntimeError as error:  # no thread is to be had
                self._writer = None
                log.warning("an answer is not kept", extra={"of": file, "why": str(error)})
        return self._writer is not None

    def has(self, kind: str, name: str) -> bool:
        """Whether something is kept, or will be in a moment, as far as it can be."""
        file = _file(kind, name)
        return bool(file) and (file in self._written or os.path.lexists(os.path.join(self._directory, file)))

    def get(self, kind: str, name: str, form: type[T], *, cluster: str = "") -> T | None:
        """None where nothing is kept, or cannot be read, or is another cluster's. An empty `cluster` is not known."""
        file = _file(kind, name)
        if not file:
            return None
        try:
            content = durable.read(os.path.join(self._directory, file))
            found: _Answer[T] = msgspec.json.decode(content, type=_Answer[form])  # type: ignore[valid-type]
        except FileNotFoundError:
            return None
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            log.warning("an answer that was kept cannot be read", extra={"of": file, "why": str(error)})
            return None
        if found.of != name or (cluster and found.cluster and cluster != found.cluster):
            log.warning("an answer that was kept is of something else", extra={"of": file})
            return None
        return found.what

    def tidy(self) -> None:
        """What is kept of pods that are no more goes after a day, and of everything the oldest of too many or too much,
        but nothing of a pod that is there."""
        now = time.time()
        for kind, most in _MOST.items():
            found = sorted(self._files(kind))
            left = sum(size for _, _, size in found)
            for place, (changed, file, size) in enumerate(found):
                name = file.removeprefix(f"{kind}-").removesuffix(".json")
                gone = self._gone(name) if kind == "pod" and self._gone is not None else None
                old = gone is True and not 0 <= now - changed < _STAYS
                if old or (gone is not False and (len(found) - place > most or left > _ALL)):
                    left -= size
                    self._written.pop(file, None)
                    with contextlib.suppress(OSError):
                        os.unlink(os.path.join(self._directory, file))

    def _files(self, kind: str) -> Iterator[tuple[float, str, int]]:
        with contextlib.suppress(FileNotFoundError), os.scandir(self._directory) as entries:
            for entry in entries:
                if entry.name.startswith(f"{kind}-") and entry.name.endswith(".json"):
                    with contextlib.suppress(FileNotFoundError):
                        facts = entry.stat(follow_symlinks=False)
                        yield facts.st_mtime, entry.name, facts.st_size

    def _write(self) -> None:
        again, count, size = 0.0, 0, 0
        while True:
            try:
                with contextlib.suppress(queue.Empty):
                    size += self._now(*self._waiting.get(timeout=_TIDY))
                    count += 1
                if self._gone is not None and (time.monotonic() > again or count > _MANY or size > _ALL):
                    again, count, size = time.monotonic() + _TIDY, 0, 0
                    self.tidy()
            except Exception as error:  # no memory, no descriptor: of this moment, and what waits is many more
                log.warning("an answer is not kept, or not tidied", extra={"why": f"{type(error).__name__}: {error}"})

    def _now(self, file: str, answer: _Answer[Any] | None) -> int:
        """How many bytes were written."""
        path = os.path.join(self._directory, file)
        try:
            content = msgspec.json.encode(answer) if answer is not None else b""
            if len(content) > _LARGEST:  # of which nothing would be read; it stays in `_written`, to be said once
                log.warning("an answer is too large to be kept", extra={"of": file, "bytes": len(content)})
            if not 0 < len(content) <= _LARGEST:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
                return 0
            os.makedirs(self._directory, mode=0o700, exist_ok=True)
            durable.replace(path, content, beside=os.path.join(self._directory, f".{file}."))
        except (OSError, ValueError) as error:
            self._written.pop(file, None)
            log.warning("an answer is not kept", extra={"of": file, "why": str(error)})
            return 0
        return len(content)


def _file(kind: str, name: str) -> str:
    """Empty for what no pod's UID, and no object's name, can be."""
    return f"{kind}-{name}.json" if (_UID if kind == "pod" else _NAME).match(name) else ""
