"""Stable pages: a token is the place after which the next page begins, whatever came and went meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import grpc

from csi.errors import CallError
from guestmount import BadRequest

T = TypeVar("T")


def page(max_entries: int, token: str, some: Callable[[int, int], Sequence[tuple[int, T]]]) -> tuple[list[T], str]:
    """One page and the token of the next; `some(after, limit)` gives entries with their places, -1 for no limit."""
    if max_entries < 0:
        raise BadRequest("max_entries", max_entries, "must not be negative")
    if token and not (token.isascii() and token.isdigit() and len(token) < 19):
        raise CallError(grpc.StatusCode.ABORTED, f"starting_token = {token[:80]!r} was not given by this driver")
    found = list(some(int(token or 0), max_entries + 1 if max_entries else -1))
    more = bool(max_entries) and len(found) > max_entries
    shown = found[:max_entries] if more else found
    return [one for _place, one in shown], str(shown[-1][0]) if more else ""
