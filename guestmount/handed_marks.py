"""Which volumes have a hand-off: a file for each in the run directory, beside the records and apart from them.

A record may be lost, or be an older one of itself, while its hand-off stands open to a guest. Before a volume gets its
first owner that is asked here, since a look at all hand-offs takes too long where there are many.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable

from blockdev import durable

# Is there once every hand-off that stood has its mark.
_ALL = ".all"


class HandedMarks:
    """`run_dir` may be emptied at any moment; then each volume may have one."""

    def __init__(self, run_dir: str) -> None:
        self._directory = os.path.join(run_dir, "handed")

    def note(self, volume: str) -> None:
        """A hand-off is about to be delivered. OSError."""
        path = os.path.join(self._directory, volume)
        if os.path.exists(path):
            return
        try:
            durable.write(path, b"", synced=False)
        except FileNotFoundError:
            os.makedirs(self._directory, mode=0o700, exist_ok=True)
            self.note(volume)
        except FileExistsError:
            return

    def forget(self, volume: str) -> None:
        """None stands any more."""
        with contextlib.suppress(OSError):
            os.unlink(os.path.join(self._directory, volume))

    def may_be(self, volume: str) -> bool:
        """Whether one may stand, though no record says so."""
        if not os.path.exists(os.path.join(self._directory, _ALL)):
            return True
        return os.path.lexists(os.path.join(self._directory, volume))

    def complete(self, volumes: Iterable[str]) -> None:
        """These are all that have one; for a start, before anything is served."""
        for volume in volumes:
            self.note(volume)
        self.note(_ALL)
