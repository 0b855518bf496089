"""One flush to the disk for all who wait for one.

A flush may take milliseconds, and everybody who needs one holds a caller meanwhile. So a commit is written without
waiting, and whoever has to know that it is on the disk waits for the next flush that begins after it; the first of
those does it for all.
"""

from __future__ import annotations

import errno
import os
import threading


class Flushes:
    """The flushes of one file that is only appended to, or written in place. For several threads.

    The file is opened once. After a flush that failed nobody knows which of its pages are on the disk, and the kernel
    may hold them for written: they are all written again before the next one counts, while `writers` are kept out.
    """

    def __init__(self, path: str, writers: threading.Lock) -> None:
        self.path, self._writers = path, writers
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._turn = threading.Condition()
        self._written = self._flushed = 0
        self._flushing = False
        self._failed: tuple[int, OSError] | None = None
        self._unsure = False
        self.count = 0

    def written(self) -> int:
        """Something was written; its number, for `wait`. Calls are in the order of the writing."""
        with self._turn:
            self._written += 1
            return self._written

    def wait(self, number: int) -> None:
        """Return once all up to `number` is on the disk; OSError where it could not be brought there."""
        with self._turn:
            while self._flushing and self._flushed < number:
                self._turn.wait()
            if self._flushed >= number:
                return
            if self._failed is not None and self._failed[0] >= number:
                raise OSError(self._failed[1].errno, self._failed[1].strerror)
            self._flushing, upto = True, self._written
        failed: OSError | None = None
        try:
            self._flush()
        except OSError as error:
            failed = error
        finally:
            with self._turn:
                self._flushing = False
                if failed is None:
                    self._flushed = upto
                else:
                    self._failed = upto, failed
                self._turn.notify_all()
        if failed is not None:
            raise failed

    def _flush(self) -> None:
        self.count += 1
        try:
            if self._unsure:
                self._write_again()
            os.fdatasync(self._fd)
        except OSError:
            self._unsure = True
            raise
        self._unsure = False

    def _write_again(self) -> None:
        """What the kernel holds for written although it is not, it writes once more."""
        at = 0
        with self._writers:
            while content := os.pread(self._fd, 1 << 20, at):
                if os.pwrite(self._fd, content, at) != len(content):
                    raise OSError(errno.EIO, "it was written in part")
                at += len(content)

    def close(self) -> None:
        """May be repeated."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
