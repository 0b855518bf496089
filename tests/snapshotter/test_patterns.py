"""Expressions that Go and Python have in common mean the same here, and none takes long."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshotter.patterns import NoPattern, Pattern

_ATOMS = st.sampled_from(["a", "b", ".", "[ab]", "[^a]", r"\w", r"\d", r"\.", "^", "$", r"\b", r"\B", "", "-"])
_TIMES = st.sampled_from(["*", "+", "?", "{2}", "{0}", "{1,}", "{0,2}", "*?", ""])


def _larger(smaller: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return (
        st.tuples(smaller, smaller).map("".join)
        | st.tuples(smaller, smaller).map(lambda two: f"({two[0]}|{two[1]})")
        | st.tuples(smaller, _TIMES).map(lambda one: f"(?:{one[0]}){one[1]}")
    )


@given(st.recursive(_ATOMS, _larger, max_leaves=6), st.text("ab-1.\n", min_size=1, max_size=8))
def test_it_finds_what_pythons_own_finds(expression: str, text: str) -> None:
    theirs = re.compile(re.sub(r"(?<!\\)\$", r"\\Z", expression))
    assert Pattern(expression).search(text) == (theirs.search(text) is not None)


@pytest.mark.parametrize(
    ("expression", "text", "found"),
    [
        ("(?i)SHA256:[0-9a-f]{4}", "k8s.io/3/sha256:AB01", True), ("^k8s|^moby", "default/k8s", False),
        ("(?P<n>a)(?<m>b)", "ab", True), (r"\x41", "A", True), ("(?m)^b$", "a\nb\nc", True), ("(?s)a.b", "a\nb", True),
        ("a{2,3}b", "caab", True), ("a{3,}b", "caab", False), ("", "", True), ("ä+", "bää", True), ("}", "}", True),
    ],
)  # fmt: skip
def test_what_a_filter_says(expression: str, text: str, found: bool) -> None:
    assert Pattern(expression).search(text) is found


@pytest.mark.parametrize(
    "expression",
    ["(", ")", "a)", "(a", "*", "a**", "a{2}{2}", "[", "[]", "a{2,1}", r"\Z", r"(a)\1", "(?=a)", "(?!a)", "(?<=a)b",
     "\\", "(?x)a", "[z-a]", "(" * 100000, "(" * 60 + ")" * 60, "(a{100}){100}", "(((a{9}){9}){9}){9999}"],
)  # fmt: skip
def test_what_is_not_taken_is_refused(expression: str) -> None:
    with pytest.raises(NoPattern, match="at position"):
        Pattern(expression)


@pytest.mark.parametrize("expression", ["(a+)+$", "(a|a)*b", "(a*)*b", "(x+x+)+y", ".*.*.*.*.*=", "(a?){60}a{60}b"])
def test_no_expression_takes_long(expression: str) -> None:
    began = time.monotonic()
    assert not Pattern(expression).search("a" * 4000 + "!")
    assert time.monotonic() - began < 20
