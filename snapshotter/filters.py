"""containerd's filter language, as its List call takes it.

A filter is a list of selectors, separated by commas, that must all hold; several filters are alternatives. A selector
is a field path (`kind`, `labels."containerd.io/snapshot.ref"`), alone (is it there?) or with `==`, `!=` or `~=` (a
regular expression) and a value. Path elements and values may be quoted in Go's way.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Sequence

from snapshotter.errors import BadRequest
from snapshotter.model import Snapshot
from snapshotter.patterns import NoPattern, Pattern

Matcher = Callable[[Snapshot], bool]
_QUOTED = re.compile(r'"(?:[^"\\\n]|\\.)*"|`[^`]*`')
_FIELD = re.compile(r"[A-Za-z0-9_]+")
_OPERATOR = re.compile(r"==|!=|~=")
_VALUE = re.compile(r"[^\s,\"`]+")
_SPACE = re.compile(r"\s*")


def parse(filters: Sequence[str]) -> Matcher:
    """A test for snapshots; without filters everything passes. BadRequest for what cannot be parsed."""
    chosen = [_Parser(text).selectors() for text in filters]
    if not chosen:
        return lambda _: True
    return lambda snapshot: any(all(selector(snapshot) for selector in selectors) for selectors in chosen)


class _Parser:
    def __init__(self, text: str) -> None:
        self._text, self._at = text, 0

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
            return pattern.search(_field(snapshot, path)[0])

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
