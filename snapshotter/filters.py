"""containerd's filter language, as its List call takes it.

A filter is a list of selectors, separated by commas, that must all hold; several filters are alternatives. A selector
is a field path (`kind`, `labels."containerd.io/snapshot.ref"`), alone (is it there?) or with `==`, `!=` or `~=` (a
regular expression) and a value. Path elements and values may be quoted in Go's way.
"""

from __future__ import annotations

import codecs
import contextlib
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from snapshotter.errors import BadRequest, TookTooLong
from snapshotter.model import Snapshot
from snapshotter.patterns import NoPattern, Pattern

Matcher = Callable[[Snapshot], bool]
_QUOTED = re.compile(r'"(?:[^"\\\n]|\\.)*"|`[^`]*`')
_FIELD = re.compile(r"[A-Za-z0-9_]+")
_OPERATOR = re.compile(r"==|!=|~=")
_VALUE = re.compile(r"[^\s,\"`]+")
_SPACE = re.compile(r"\s*")
# Filters of one List, and characters of one.
_MOST, _LONGEST = 100, 16 << 10
# Steps of all expressions of one List together.
_STEPS = 4000
# Seconds of the processor's that the regular expressions of one List may take, and for which one waits for another's.
_WORK, _TURN = 5.0, 20.0


class Work:
    """How long regular expressions may keep the processor for one List, and one List at a time: Python runs one thread
    only, and what is asked beside would have the smallest part of many. TookTooLong."""

    def __init__(self, turn: threading.Lock | None = None, seconds: float = _WORK) -> None:
        self._turn, self._left, self._until = turn or threading.Lock(), seconds, 0.0
        # Of all expressions.
        self.steps = 0

    @contextlib.contextmanager
    def done(self) -> Iterator[None]:
        """What is done inside counts, of this thread."""
        if not self._turn.acquire(timeout=_TURN):
            raise TookTooLong(f"other Lists search with regular expressions, and did not end within {_TURN:.0f} s")
        try:
            began = time.thread_time()
            self._until = began + self._left
            yield
            self._left -= time.thread_time() - began
        finally:
            self._turn.release()

    def tick(self) -> None:
        if time.thread_time() > self._until:
            raise TookTooLong(f"the regular expressions of a List took more than {_WORK:.0f} s; ask with simpler ones")


def parse(filters: Sequence[str], work: Work | None = None) -> Matcher:
    """A test for snapshots; without filters everything passes. BadRequest for what cannot be parsed."""
    if len(filters) > _MOST:
        raise BadRequest("filters", f"{len(filters)} filters", f"takes {_MOST} at the most")
    work = work or Work()
    parsers = [_Parser(text, work) for text in filters]
    chosen = [parser.selectors() for parser in parsers]
    if not chosen:
        return lambda _: True

    def passes(snapshot: Snapshot) -> bool:
        return any(all(selector(snapshot) for selector in selectors) for selectors in chosen)

    def worked(snapshot: Snapshot) -> bool:
        with work.done():
            return passes(snapshot)

    return worked if any(parser.searches for parser in parsers) else passes


class _Parser:
    def __init__(self, text: str, work: Work) -> None:
        self._text, self._at, self._work = text, 0, work
        if len(text) > _LONGEST:
            raise BadRequest("filters", f"{text[:80]}…", f"a filter has {_LONGEST} characters at the most")
        # Whether it has a regular expression.
        self.searches = False

    def _fail(self, why: str) -> BadRequest:
        return BadRequest("filters", self._text, f"{why} at position {self._at}")

    def _take(self, pattern: re.Pattern[str]) -> str | None:
        found = pattern.match(self._text, self._at)
        if found is None:
            return None
        self._at = found.end()
        return found.group()

    def selectors(self) -> list[Matcher]:
        found: list[Matcher] = []
        self._take(_SPACE)
        if self._at == len(self._text):
            return found
        while True:
            found.append(self._selector())
            self._take(_SPACE)
            if self._at == len(self._text):
                return found
            if self._text[self._at] != ",":
                raise self._fail("a comma was expected")
            self._at += 1

    def _selector(self) -> Matcher:
        path = self._path()
        self._take(_SPACE)
        operator = self._take(_OPERATOR)
        if operator is None:
            return lambda snapshot: _field(snapshot, path)[1]
        self._take(_SPACE)
        value = self._value(operator)
        if operator == "==":
            return lambda snapshot: _field(snapshot, path) == (value, True)
        if operator == "!=":
            return lambda snapshot: _field(snapshot, path)[0] != value
        try:
            pattern = Pattern(value)
        except NoPattern as error:
            raise self._fail(f"{value!r} is no regular expression ({error})") from None

        def matches(snapshot: Snapshot) -> bool:
            return pattern.search(_field(snapshot, path)[0], self._work.tick)

        self.searches = True
        self._work.steps += pattern.steps
        if self._work.steps > _STEPS:
            raise self._fail("all regular expressions together are too long, their repeats counted,")
        return matches

    def _path(self) -> list[str]:
        self._take(_SPACE)
        path = [self._element()]
        while self._text[self._at : self._at + 1] == ".":
            self._at += 1
            path.append(self._element())
        return path

    def _element(self) -> str:
        quoted = self._take(_QUOTED)
        if quoted is not None:
            return self._unquoted(quoted)
        plain = self._take(_FIELD)
        if plain is None:
            raise self._fail("a field was expected")
        return plain

    def _value(self, operator: str) -> str:
        if operator == "~=" and self._text[self._at : self._at + 1] in ("/", "|"):
            end = self._text.find(self._text[self._at], self._at + 1)
            if end > 0:
                value, self._at = self._text[self._at + 1 : end], end + 1
                return value
        quoted = self._take(_QUOTED)
        if quoted is not None:
            return self._unquoted(quoted)
        plain = self._take(_VALUE)
        if plain is None:
            raise self._fail("a value was expected")
        return plain

    def _unquoted(self, text: str) -> str:
        if text[0] == "`":
            return text[1:-1]
        try:
            inner = codecs.escape_decode(text[1:-1].encode())[0]
            return bytes(inner).decode()
        except (ValueError, UnicodeDecodeError):
            raise self._fail(f"{text} is not quoted as Go does it") from None


def _field(snapshot: Snapshot, path: Sequence[str]) -> tuple[str, bool]:
    """The field's text, and whether it is there."""
    if path == ["name"]:
        return snapshot.key, True
    if path == ["parent"]:
        return snapshot.parent, True
    if path == ["kind"]:
        return snapshot.kind.name.lower(), True
    if path[0] == "labels" and len(path) > 1:
        name = ".".join(path[1:])
        return snapshot.labels.get(name, ""), name in snapshot.labels
    return "", False
