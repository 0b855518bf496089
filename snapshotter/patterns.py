"""Regular expressions, matched in a time that grows with the text and with nothing else.

Python's own backtrack, and let no other thread run meanwhile: the expression of one List could stop every call for
hours. Here it becomes a machine that is in several places at once. What Go's expressions have in common with Python's
is known (groups, alternatives, classes, escapes, repeats, anchors); what Go refuses, as references back, is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

# Steps of a machine, a repeat's as often as it may be taken; groups in each other.
_MOST_STEPS, _MOST_NESTED = 400, 50
# Characters of a text between two ticks.
_TICK = 64
_REPEAT = re.compile(r"\{([0-9]{1,4})(?:(,)([0-9]{0,4}))?\}")
_GROUP = re.compile(r"\?(?:P?<[A-Za-z_][A-Za-z0-9_]*>|:)")
_FLAGS = re.compile(r"\(\?([ims]+)\)")
_CLASS = re.compile(r"\[\^?\]?(?:\\.|[^\]\\\[])*\]", re.DOTALL)
_ESCAPE = re.compile(r"\\(?:x[0-9a-fA-F]{2}|[dDsSwWafnrtv]|[^A-Za-z0-9])", re.DOTALL)
_ANCHOR = re.compile(r"\^|\$|\\[AzbB]")


class NoPattern(ValueError):
    """No expression, or none that is taken; says why, and where."""


@dataclass
class _Step:
    """Takes a character that matches `one`, or none where `anchor` holds, or none at all; then goes on with `ways`."""

    ways: list[int]
    one: re.Pattern[str] | None = None
    anchor: str = ""


# A part of a machine: its first step, and the steps whose ways lead out of it.
_Part = tuple[int, list[int]]


class Pattern:
    """An expression. NoPattern for what is none."""

    def __init__(self, text: str) -> None:
        self._text, self._at, self._nested, self._flags = text, 0, 0, 0
        self._steps: list[_Step] = []
        if found := _FLAGS.match(text):
            self._at = found.end()
            for letter in found.group(1):
                self._flags |= {"i": re.IGNORECASE, "m": re.MULTILINE, "s": re.DOTALL}[letter]
        self._first, last = self._alternatives()
        if self._at < len(text):
            raise self._fail("a bracket closes that was not opened")
        self._end = self._step()
        self._join(last, self._end)

    @property
    def steps(self) -> int:
        """Of the machine; what it takes of the memory goes with them."""
        return len(self._steps)

    def search(self, text: str, tick: Callable[[], object] = lambda: None) -> bool:
        """Whether the expression matches anywhere in the text; `tick` is called now and then, and may end it."""
        there: set[int] = set()
        for at in range(len(text) + 1):
            if not at % _TICK:
                tick()
            there = self._reached([*there, self._first], text, at)
            if self._end in there:
                return True
            if at < len(text):
                steps = [step for step in map(self._steps.__getitem__, there) if step.one is not None]
                there = {way for step in steps if step.one and step.one.match(text[at]) for way in step.ways}
        return False

    def _reached(self, begun: Iterable[int], text: str, at: int) -> set[int]:
        """These steps, and what is reached from them without a character."""
        found, left = set[int](), list(begun)
        while left:
            number = left.pop()
            if number not in found:
                found.add(number)
                step = self._steps[number]
                if step.one is None and (not step.anchor or self._holds(step.anchor, text, at)):
                    left += step.ways
        return found

    def _holds(self, anchor: str, text: str, at: int) -> bool:
        lines = self._flags & re.MULTILINE
        if anchor in (r"\b", r"\B"):
            return (_is_word(text[at - 1 : at]) != _is_word(text[at : at + 1])) == (anchor == r"\b")
        if anchor in ("^", r"\A"):
            return at == 0 or (anchor == "^" and bool(lines) and text[at - 1] == "\n")
        return at == len(text) or (anchor == "$" and bool(lines) and text[at] == "\n")

    # -- building ---------------------------------------------------------------------------------------------------

    def _fail(self, why: str) -> NoPattern:
        return NoPattern(f"{why} at position {self._at}")

    def _step(self, *ways: int, one: re.Pattern[str] | None = None, anchor: str = "") -> int:
        if len(self._steps) >= _MOST_STEPS:
            raise self._fail("it is too long, its repeats counted,")
        self._steps.append(_Step(list(ways), one, anchor))
        return len(self._steps) - 1

    def _join(self, ends: list[int], to: int) -> None:
        for end in ends:
            self._steps[end].ways.append(to)

    def _alternatives(self) -> _Part:
        firsts, ends = list[int](), list[int]()
        while True:
            first, last = self._sequence()
            firsts.append(first)
            ends += last
            if not self._takes("|"):
                break
        return (firsts[0] if len(firsts) == 1 else self._step(*firsts)), ends

    def _sequence(self) -> _Part:
        first = self._step()
        ends = [first]
        while self._at < len(self._text) and self._text[self._at] not in "|)":
            one, last = self._repeated()
            self._join(ends, one)
            ends = last
        return first, ends

    def _repeated(self) -> _Part:
        began, part = self._at, self._atom()
        least, most = self._times()
        if (least, most) == (1, 1):
            return part
        after, first = self._at, self._step()
        ends, ways_out = [first], list[int]()
        for number in range(max(least, most if most is not None else least + 1)):
            if number >= least:
                ways_out += ends
            self._at = began
            one, last = part if number == 0 else self._atom()
            self._join(ends, one)
            ends = last
            if most is None and number >= least - 1:
                again = self._step(one) if least else first
                self._join(ends, again)
                ends = [again]
                break
        self._at = after
        return first, ends + [end for end in ways_out if end not in ends]

    def _times(self) -> tuple[int, int | None]:
        """How often what was just read may come; None for any number."""
        found: tuple[int, int | None] = (1, 1)
        for sign, times in {"*": (0, None), "+": (1, None), "?": (0, 1)}.items():
            if self._takes(sign):
                found = times
                break
        else:
            said = _REPEAT.match(self._text, self._at)
            if said is None:
                return found
            self._at = said.end()
            least = int(said.group(1))
            found = least, (least if not said.group(2) else int(said.group(3)) if said.group(3) else None)
            if found[1] is not None and found[1] < least:
                raise self._fail("a repeat ends before it begins")
        self._takes("?")
        if self._text[self._at : self._at + 1] in ("*", "+", "?") or _REPEAT.match(self._text, self._at):
            raise self._fail("a repeat is repeated")
        return found

    def _atom(self) -> _Part:
        if self._takes("("):
            return self._group()
        for known in (_ANCHOR, _ESCAPE, _CLASS):
            if found := known.match(self._text, self._at):
                self._at = found.end()
                return self._single(found.group(), anchor=known is _ANCHOR)
        character = self._text[self._at]
        if character in "*+?[\\":
            raise self._fail(f"{character!r} stands for nothing that is taken here")
        self._at += 1
        return self._single(character if character == "." else re.escape(character))

    def _single(self, text: str, *, anchor: bool = False) -> _Part:
        if anchor:
            step = self._step(anchor=text)
        else:
            try:
                step = self._step(one=re.compile(text, self._flags))
            except re.error as error:
                raise self._fail(str(error)) from None
        return step, [step]

    def _group(self) -> _Part:
        if self._text[self._at : self._at + 1] == "?":
            found = _GROUP.match(self._text, self._at)
            if found is None:
                raise self._fail("a group of a kind that is not taken")
            self._at = found.end()
        self._nested += 1
        if self._nested > _MOST_NESTED:
            raise self._fail("too many groups are in each other")
        part = self._alternatives()
        self._nested -= 1
        if not self._takes(")"):
            raise self._fail("a bracket is not closed")
        return part

    def _takes(self, sign: str) -> bool:
        if self._text[self._at : self._at + 1] != sign:
            return False
        self._at += 1
        return True


def _is_word(character: str) -> bool:
    return character.isalnum() or character == "_"
