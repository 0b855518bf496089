"""Waiting for what comes soon."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def until(found: Callable[[], T], seconds: float = 10.0) -> T:
    """What `found` says once that is true; it fails where it does not become true in this time."""
    end = time.monotonic() + seconds
    while not (answer := found()):
        assert time.monotonic() < end
        time.sleep(0.01)
    return answer
