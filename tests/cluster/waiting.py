"""Waiting for something with a limit, and with words for when it does not come."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from tests.cluster.machines import Broken, Program, tail

T = TypeVar("T")


def wait(words: str, check: Callable[[], T], seconds: float = 60.0, *, needs: Sequence[Program] = (),
         why: Callable[[], str] = str) -> T:  # fmt: skip
    """What `check` returns once that is true. `words` is what is waited for.

    It fails at once when one of `needs` has ended, and else after `seconds`, with what `why` says, the last error of
    `check`, and the ends of the logs of `needs`.
    """
    end = time.monotonic() + seconds
    error = ""
    while True:
        try:
            if found := check():
                return found
        except Broken as problem:
            error = f"\n{problem}"
        ended = [program.name for program in needs if not program.running]
        if ended or time.monotonic() > end:
            reason = f"{', '.join(ended)} ended" if ended else f"not after {seconds:g} s"
            logs = "".join(f"\n{tail(program.log)}" for program in needs)
            raise Broken(f"waited for: {words}; {reason}{error}\n{why()}{logs}")
        time.sleep(0.1)
