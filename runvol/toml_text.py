"""TOML as text: a few values put into a file that a person keeps, whose comments and order stay, and a whole document.

What was put in is read again and compared, so a file of a form that this does not foresee is never half changed. Not by
tomlkit: it puts new tables between those that are there, and with line ends of its own, while k3s's template takes only
what follows its part, and lines of a person's file are to stay as they are.
"""

from __future__ import annotations

import copy
import datetime
import math
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Path = tuple[str, ...]
_BARE = re.compile(r"[A-Za-z0-9_-]+\Z")
_OTHER_FORM = "the file has these tables in another form than under headings of their own"
# What TOML has a letter for.
_ESCAPES = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\t": "\\t", "\n": "\\n", "\f": "\\f", "\r": "\\r"}


class NoPlace(Exception):
    """The text has no plain place for it: a dotted or inline table, or a table that something else is."""


@dataclass(frozen=True, kw_only=True)
class Put:
    """One value under one name; tables on the way are made."""

    path: Path
    value: Any


@dataclass(frozen=True, kw_only=True)
class Append:
    """One more table in an array of tables."""

    path: Path
    table: Mapping[str, Any]


Change = Put | Append


def name(path: Path) -> str:
    """As it stands between brackets."""
    return ".".join(one if _BARE.match(one) else _string(one) for one in path)


def parsed(text: str) -> dict[str, Any]:
    """The document."""
    return tomllib.loads(text)


def has(document: Mapping[str, Any], path: Path) -> bool:
    """Whether something has this name."""
    found: Any = document
    for one in path:
        if not isinstance(found, dict) or one not in found:
            return False
        found = found[one]
    return True


def applied(document: Mapping[str, Any], changes: Sequence[Change]) -> dict[str, Any]:
    """The document that has them. NoPlace where a table would have to be what something else is."""
    made: dict[str, Any] = copy.deepcopy(dict(document))
    for change in changes:
        table: Any = made
        for one in change.path[:-1]:
            table = table.setdefault(one, {})
            if not isinstance(table, dict):
                raise NoPlace(f"{name(change.path)}: {one} is no table")
        if isinstance(change, Put):
            table[change.path[-1]] = copy.deepcopy(change.value)
        else:
            array = table.setdefault(change.path[-1], [])
            if not isinstance(array, list):
                raise NoPlace(f"{name(change.path)} is no array")
            array.append(dict(change.table))
    return made


def edited(text: str, changes: Sequence[Change]) -> str:
    """The text with the values in it and all else as it was. NoPlace if they have no place in it."""
    wanted = applied(tomllib.loads(text), changes)
    line_end = "\r\n" if "\r\n" in text else "\n"
    lines = text.replace("\r\n", "\n").split("\n")
    for change in changes:
        if isinstance(change, Put):
            _put(lines, change)
        else:
            _at_the_end(lines, f"[[{name(change.path)}]]", change.table)
    made = line_end.join(lines)
    try:
        found = tomllib.loads(made)
    except tomllib.TOMLDecodeError as error:
        raise NoPlace(_OTHER_FORM) from error
    if found != wanted:
        raise NoPlace(_OTHER_FORM)
    return made


def _put(lines: list[str], change: Put) -> None:
    key, value = change.path[-1], written_value(change.value)
    heads = list(_heads(lines))
    for number, (at, path, array) in enumerate(heads):
        if path != change.path[:-1] or array:
            continue
        end = heads[number + 1][0] if number + 1 < len(heads) else len(lines)
        for line in range(at + 1, end):
            if found := _one_line(lines[line], key):
                lines[line] = f"{found[0]}{value}{found[1]}"
                return
        inner = next((one for one in lines[at + 1 : end] if one.strip() and not one.lstrip().startswith("#")), None)
        indent = _indent(lines[at]) + "  " if inner is None else _indent(inner)
        lines.insert(at + 1, f"{indent}{name((key,))} = {value}")
        return
    _at_the_end(lines, f"[{name(change.path[:-1])}]", {key: change.value})


def _indent(line: str) -> str:
    return line[: len(line) - len(line.lstrip())]


def _at_the_end(lines: list[str], head: str, table: Mapping[str, Any]) -> None:
    while lines and not lines[-1].strip():
        lines.pop()
    lines += ["", head] if lines else [head]
    lines += [f"  {name((key,))} = {written_value(value)}" for key, value in table.items()]
    lines.append("")


def _one_line(line: str, key: str) -> tuple[str, str] | None:
    """What stands before and behind the value of a key that has its line to itself."""
    before, equals, rest = line.partition("=")
    try:
        if not equals or tomllib.loads(line).keys() != {key} or tomllib.loads(f"{before}= 0") != {key: 0}:
            return None
    except tomllib.TOMLDecodeError:
        return None
    value = rest.strip()
    comment = next((part for part in _comments(value) if _same(value, part)), "")
    space = rest[: len(rest) - len(rest.lstrip())]
    return f"{before}={space}", f"  {comment}" if comment else ""


def _comments(value: str) -> Iterator[str]:
    return (value[at:] for at, letter in enumerate(value) if letter == "#")


def _same(value: str, comment: str) -> bool:
    try:
        return tomllib.loads(f"v = {value[: -len(comment)]}") == tomllib.loads(f"v = {value}")
    except tomllib.TOMLDecodeError:
        return False


def _heads(lines: Sequence[str]) -> Iterator[tuple[int, Path, bool]]:
    """(line, name, whether of an array) of each heading; not of what looks like one in a value of several lines."""
    at = 0
    while at < len(lines):
        line = lines[at]
        if line.lstrip().startswith("["):
            table: Any = tomllib.loads(line)
            path: list[str] = []
            array = False
            while isinstance(table, dict) and table and not array:
                (key, table), *_ = table.items()
                path.append(key)
                array = isinstance(table, list)
            yield at, tuple(path), array
            at += 1
            continue
        at += _height(lines, at)


def _height(lines: Sequence[str], at: int) -> int:
    """Lines of the value that begins here: it is whole where TOML reads it."""
    for end in range(at + 1, len(lines) + 1):
        try:
            tomllib.loads("\n".join(lines[at:end]))
        except tomllib.TOMLDecodeError:
            continue
        return end - at
    return len(lines) - at


def written(document: Mapping[str, Any]) -> str:
    """The whole document, without comments."""
    return "\n".join(_table(document, ())).lstrip("\n") + "\n"


def _table(table: Mapping[str, Any], path: Path) -> Iterator[str]:
    plain = {key: value for key, value in table.items() if not isinstance(value, dict) and not _is_tables(value)}
    if path and (plain or len(plain) == len(table)):
        yield from ("", f"[{name(path)}]")
    for key, value in plain.items():
        yield f"{'  ' if path else ''}{name((key,))} = {written_value(value)}"
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _table(value, (*path, key))
        elif _is_tables(value):
            for one in value:
                yield from ("", f"[[{name((*path, key))}]]")
                yield from (f"  {name((inner,))} = {written_value(what)}" for inner, what in one.items())


def _is_tables(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value)


def written_value(value: object) -> str:
    """As TOML has it."""
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, list):
        return f"[{', '.join(written_value(one) for one in value)}]"
    if isinstance(value, dict):
        inner = ", ".join(f"{name((key,))} = {written_value(one)}" for key, one in value.items())
        return f"{{ {inner} }}" if inner else "{}"
    return repr(value)


def _string(value: str) -> str:
    return '"' + "".join(_ESCAPES.get(one) or (f"\\u{ord(one):04x}" if ord(one) < 32 or ord(one) == 127 else one)
                         for one in value) + '"'  # fmt: skip
