"""What a line of the log is about, without each line saying so: the call that it belongs to, its volume, its pod.

Who begins a call says it once; what is logged until its end has it, in threads that are begun for it as well.
"""

from __future__ import annotations

import contextlib
import contextvars
import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import TypeVar

T = TypeVar("T")
_facts: contextvars.ContextVar[Mapping[str, object]] = contextvars.ContextVar("facts", default=MappingProxyType({}))
# Tells this process's calls from those of the ones before it, in a log that has all of them.
_process, _numbers = os.urandom(3).hex(), itertools.count(1)
_LONGEST = 200


def request_id() -> str:
    """One that no other call on this node is likely to have."""
    return f"{_process}-{next(_numbers)}"


@contextlib.contextmanager
def about(**said: str) -> Iterator[None]:
    """Lines until the end of the block have these words; empty ones are left out, and long ones cut."""
    more = {key: value[:_LONGEST] for key, value in said.items() if value}
    token = _facts.set({**_facts.get(), **more})
    try:
        yield
    finally:
        _facts.reset(token)


def facts() -> Mapping[str, object]:
    """What a line that is written now is about."""
    return _facts.get()


def inherited(call: Callable[[], T]) -> Callable[[], T]:
    """The same, whose lines are about what this thread's are, in whatever thread it runs."""
    context = contextvars.copy_context()
    return lambda: context.run(call)
