"""Mapped devices that nobody has open for long are unmapped; Mounts maps them again.

For each snapshot that it makes and each table that it loads the kernel walks through all thin devices that were mapped
since the pool was assembled, and is slower still while they are mapped. A node with thousands of containers that have
ended would pay for them with every new one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

from blockdev import Deadline
from snapshotter.errors import TookTooLong


class Idle:
    """When each mapped device was last handed to a caller. Times are seconds of the monotonic clock.

    `after` seconds without a caller and without anybody who has it open make a device idle; 0 is never. Handing one
    out takes no lock: who does, first says so and then looks whether it is being unmapped; who unmaps, first says so
    and then looks whether it was handed out.
    """

    def __init__(self, after: float) -> None:
        self.after = after
        # In the order of the times, as what is handed out goes to the end.
        self._handed: dict[int, float] = {}
        self._leaving = 0
        self._turn = threading.Lock()

    def handed(self, device: int, at: float) -> None:
        """A caller is about to be given the device."""
        if self.after:
            self._handed[device] = max(at, self._handed.pop(device, at))

    def found(self, devices: Iterable[int], now: float) -> None:
        """Devices that were mapped before this process began."""
        if self.after:
            for device in devices:
                self._handed.setdefault(device, now)

    def leaving(self, device: int) -> bool:
        """Whether the device is being unmapped just now."""
        return self._leaving == device

    def keep(self, device: int, deadline: Deadline) -> None:
        """The device is about to be mapped for a caller: it is handed out, and is not being unmapped when this returns.

        TookTooLong at the deadline.
        """
        self.handed(device, deadline.began)
        while self.leaving(device):
            if not self._turn.acquire(timeout=deadline.remaining()):
                raise TookTooLong(f"device {device} is being unmapped and did not go within {deadline.given:.0f} s")
            self._turn.release()
            # Who has unmapped it has forgotten it.
            self.handed(device, deadline.began)

    def forget(self, device: int) -> None:
        """The device is not mapped any more."""
        self._handed.pop(device, None)

    def due(self, now: float, most: int) -> list[int]:
        """At most so many devices that were not handed out for long, the longest first."""
        found: list[int] = []
        for device, at in list(self._handed.items()):
            if at > now - self.after or len(found) == most:
                break
            found.append(device)
        return found

    def leave(self, device: int, now: float, unmap: Callable[[int], bool]) -> bool:
        """Unmap one that is due, unless it was handed out meanwhile; whether it is unmapped. For one thread only."""
        with self._turn:
            self._leaving = device
            try:
                at = self._handed.get(device)
                if at is None or at > now - self.after:
                    return False
                if unmap(device):
                    self.forget(device)
                    return True
                # Somebody has it open: it is looked at again when it might be idle once more.
                self.handed(device, now)
                return False
            finally:
                self._leaving = 0
