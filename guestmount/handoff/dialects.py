"""All the formats that this release writes, as one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from guestmount.errors import Refused
from guestmount.handoff.base import Delivered, Dialect


class Dialects:
    """Iterates over the dialects. What it takes back is taken back in each, whatever is configured now."""

    def __init__(self, dialects: Sequence[Dialect]) -> None:
        self._dialects = tuple(dialects)

    def __iter__(self) -> Iterator[Dialect]:
        return iter(self._dialects)

    def of(self, name: str, handler: str) -> Dialect:
        """The dialect that the runtime handler speaks; Refused where this release does not write it."""
        for dialect in self._dialects:
            if dialect.name == name:
                return dialect
        known = ", ".join(dialect.name for dialect in self._dialects)
        raise Refused(
            f"the runtime handler {handler!r} speaks the hand-off dialect {name!r}, which this "
            f"release does not write (it writes {known}); run the pod with another RuntimeClass"
        )

    def withdraw(self, target: str) -> None:
        """No hand-off speaks of the target."""
        for dialect in self._dialects:
            dialect.withdraw(target)

    def at(self, target: str) -> Delivered | None:
        """What lies there for this target, in whatever dialect."""
        return next((found for one in self._dialects if (found := one.at(target)) is not None), None)

    def delivered(self) -> dict[str, Delivered]:
        """What lies there now, by target."""
        return {one.target: one for dialect in self._dialects for one in dialect.delivered()}
