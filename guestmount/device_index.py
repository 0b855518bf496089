"""Which volume's claim names a loop device: a small file for each, named like the device, beside the claims.

Somebody may unbind a loop device that a hand-off, or a bound node, speaks of, and its number is anybody's then. Whoever
is given that number asks here whether another volume's pods would open it.
"""

from __future__ import annotations

import contextlib
import os

_LOOP = "/dev/loop"


class DeviceIndex:
    """`records`: the directory of this boot's records."""

    def __init__(self, records: str) -> None:
        self._directory = os.path.join(records, "devices")

    def volume_of(self, device: str) -> str:
        """The volume that was last noted for the device, which may have let go of it since; empty for none."""
        try:
            with open(self._place(device), encoding="ascii") as file:
                return file.read(256)
        except (OSError, UnicodeDecodeError):
            return ""

    def moved(self, volume: str, old: str, new: str) -> None:
        """The volume's claim names `new` from now on, and named `old`. What cannot be written is found by `fill`."""
        if old == new:
            return
        with contextlib.suppress(OSError):
            if old.startswith(_LOOP) and self.volume_of(old) == volume:
                os.unlink(self._place(old))
        self.fill(volume, new)

    def fill(self, volume: str, device: str) -> None:
        """There is an entry for the device, whosever it is; nothing for what is no loop device."""
        if not device.startswith(_LOOP):
            return
        with contextlib.suppress(OSError):
            os.makedirs(self._directory, mode=0o700, exist_ok=True)
            with open(self._place(device), "w", encoding="ascii") as file:
                file.write(volume)

    def _place(self, device: str) -> str:
        return os.path.join(self._directory, os.path.basename(device))
