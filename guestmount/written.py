"""Bytes that somebody else has written: a guest's kernel, or a pod with the raw device.

A filesystem driver believes what it reads, and a mount by the host's kernel lets whoever wrote it choose what that is.
So it is noted with a volume, durably, that a foreign kernel may have written it (unknown counts as yes, copies inherit
it), and before the host really mounts such a filesystem a program checks it whole, in user space, under limits, behind
the call.
"""

from __future__ import annotations

import enum
import logging
import os
from dataclasses import dataclass, field

from blockdev import Deadline, filesystems
from guestmount.claims import Claim
from guestmount.errors import Refused
from guestmount.held import Held
from volumes import Catalog, VolumeUnfinished
from volumes.backend import DeviceBackend
from volumes.jobs import PATIENCE, Jobs, Progress
from volumes.model import Past

log = logging.getLogger("runvol.written")

_SPARE = 1.0


class Trust(enum.StrEnum):
    """What the host does with a filesystem that a guest has had (`node.guest_filesystems`)."""

    CHECKED = enum.auto()
    TRUSTED = enum.auto()
    NEVER = enum.auto()


@dataclass(frozen=True, kw_only=True)
class Written:
    """Who has written a volume, and what that means for the host."""

    catalog: Catalog
    trust: Trust = Trust.CHECKED
    # Seconds that a call waits for a check; in a process that ends with its call, the check ends with it.
    patience: float = PATIENCE
    _checks: Jobs = field(default_factory=lambda: Jobs(running=2, waiting=8))

    def _backend(self, claim: Claim) -> DeviceBackend | None:
        backend = self.catalog.of(claim.volume)
        return backend if isinstance(backend, DeviceBackend) else None

    def past(self, claim: Claim) -> Past:
        backend = self._backend(claim)
        return backend.past(claim.volume) if backend is not None else Past()

    def by_others(self, claim: Claim) -> Claim:
        """A foreign kernel, or a pod itself, is about to get the bytes: noted with the volume before it can write one,
        and in the claim, once that is written."""
        if claim.handed_out:
            return claim
        backend = self._backend(claim)
        if backend is not None:
            backend.note(claim.volume, foreign_written=True)
        return claim.but(handed_out=True)

    def has_group(self, claim: Claim, group: str) -> bool:
        """Whether the volume's files were last given to this group."""
        return self.past(claim).mount_group == group

    def given(self, claim: Claim, group: str) -> None:
        backend = self._backend(claim)
        if backend is not None and not self.has_group(claim, group):
            backend.note(claim.volume, mount_group=group)

    def is_mountable(self, claim: Claim) -> bool:
        """Whether the host may mount it as it is, or once it was checked."""
        return self.trust is not Trust.NEVER or not self.past(claim).foreign_written

    def is_checking(self, claim: Claim) -> bool:
        """Whether a check of this process has the volume open."""
        return self._checks.progress(claim.volume) is not None

    def be_safe(self, claim: Claim, what: str, deadline: Deadline) -> None:
        """The host may mount the volume's filesystem. Refused, naming `what` would need it, where it never may;
        VolumeUnfinished while it is still being checked: that goes on, and the next call waits for it;
        FilesystemDamaged. For callers that have proved that nobody else has the volume."""
        if self.trust is Trust.TRUSTED or not self.past(claim).foreign_written:
            return
        if self.trust is Trust.NEVER:
            raise Refused(
                f"{what} would have the host mount volume {claim.volume}, whose filesystem a guest may have written, "
                "and node.guest_filesystems = never forbids that; use it in sandboxes only, or copy its files to "
                "another volume"
            )
        check = _Check(claim, self._backend(claim))
        try:
            what = f"the check of volume {claim.volume}, which a guest has had"
            patience = max(0.0, min(self.patience, deadline.remaining() - _SPARE))
            self._checks.finished(claim.volume, what, check, patience)
        finally:
            check.abandon()


class _Check:
    """The work. From its making, under the volume's lock, to its end the device is open, so in use for all."""

    def __init__(self, claim: Claim, backend: DeviceBackend | None) -> None:
        self._claim, self._backend = claim, backend
        self._held = Held(os.open(claim.source, os.O_RDONLY | os.O_CLOEXEC))

    def abandon(self) -> None:
        self._held.abandon()

    def __call__(self, _progress: Progress) -> None:
        claim = self._claim
        if not self._held.begin():
            raise VolumeUnfinished(f"volume {claim.volume} was not checked; ask again")
        try:
            filesystems.verify(claim.source, claim.use.fstype)
            if self._backend is not None:
                self._backend.note(claim.volume, foreign_written=False)
        finally:
            self._held.close()
        log.info("a filesystem that a guest has had was checked", extra={"volume": claim.volume})
