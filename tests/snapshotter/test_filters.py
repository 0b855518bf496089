"""containerd's filter language, and what is not in it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshotter.errors import BadRequest
from snapshotter.filters import parse
from snapshotter.model import Kind, Snapshot, State

LAYER = Snapshot(key="ns/3/sha256:ab", parent="ns/2/x y", kind=Kind.COMMITTED, state=State.READY, device=1, size=1,
                 fstype="ext4", created=1, updated=1,
                 labels={"containerd.io/snapshot.ref": "sha256:ab", "plain": "v", "empty.dotted": "w"})  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "", "name", "parent", "kind", "kind==committed", "kind!=active", "kind~=^comm", "name~=/sha256/", "labels.plain",
        "labels.plain==v", 'labels."plain"=="v"', 'labels."containerd.io/snapshot.ref"==sha256:ab', "labels.missing!=x",
        'labels."containerd.io/snapshot.ref"==sha256:ab,parent=="ns/2/x y"', ' kind == committed , labels.plain ',
        "parent==`ns/2/x y`", "labels.empty.dotted==w", "name~=|^ns|",
    ],
)  # fmt: skip
def test_passes(text: str) -> None:
    assert parse([text])(LAYER)


@pytest.mark.parametrize(
    "text", ["kind==active", "labels.missing", "labels.missing==x", "name==x", "other", "other==x"]
)
def test_does_not_pass(text: str) -> None:
    assert not parse([text])(LAYER)


def test_filters_are_alternatives_and_selectors_all_hold() -> None:
    assert parse(["kind==active", "kind==committed"])(LAYER)
    assert not parse(["kind==committed,name==x"])(LAYER)


@pytest.mark.parametrize(
    "text",
    ["==x", "kind==", "kind=committed", "a b", "kind,,name", "kind,", "name~=(", '"', 'name=="x', "a.", 'name==a"b'],
)
def test_what_cannot_be_parsed_is_refused(text: str) -> None:
    with pytest.raises(BadRequest, match="filters"):
        parse([text])


@given(st.text(max_size=60))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    try:
        parse([text])(LAYER)
    except BadRequest:
        pass
