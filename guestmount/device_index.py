"""Which volume's claim names a loop device: a small file for each, named like the device, beside the claims.

Somebody may unbind a loop device that a hand-off, or a bound node, speaks of, and its number is anybody's then. Whoever
is given that number asks here whether another volume's pods would open it.
"""

from __future__ import annotations

import contextlib
import os

from blockdev import durable

_LOOP = "/dev/loop"


class DeviceIndex:
    """`records`: the directory of this boot's records."""

    def __init__(self, records: str) -> None:
        self._directory, self._temporary = os.path.join(records, "devices"), os.path.join(records, "tmp")

    def volume_of(self, device: str) -> str:
        """The volume that was last noted for the device, which may have let go of it since; empty for none."""
        try:
            return durable.read(self._place(device), 256).decode("ascii")
        except (OSError, UnicodeDecodeError):
            return ""

    def forget(self, volume: str, device: str) -> None:
        """The volume's claim does not name the device any more."""
        if device.startswith(_LOOP) and self.volume_of(device) == volume:
            with contextlib.suppress(OSError):
                os.unlink(self._place(device))

    def note(self, volume: str, device: str) -> None:
        """The volume's claim is about to name the device; nothing for what is no loop device. OSError.

        What a killed process was writing has such a name as what it writes of the claim: who removes that one sweeps
        both.
        """
        if not device.startswith(_LOOP):
            return
        place, content = self._place(device), volume.encode("ascii")
        beside = os.path.join(self._temporary, f"{volume}.")
        try:
            durable.replace(place, content, beside=beside, synced=False)
        except FileNotFoundError:
            for needed in (self._directory, self._temporary):
                os.makedirs(needed, mode=0o700, exist_ok=True)
            durable.replace(place, content, beside=beside, synced=False)

    def _place(self, device: str) -> str:
        return os.path.join(self._directory, os.path.basename(device))
