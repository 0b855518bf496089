"""containerd's filter language, and what is not in it."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapshotter.errors import BadRequest, TookTooLong
from snapshotter.filters import Work, parse
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


HEAVY = "labels.l~=/(" + "|".join("a?" * 20 for _ in range(8)) + ")*b$/"
LONG = replace(LAYER, labels={"l": "a" * 4000})


def test_one_list_gets_the_processor_for_so_long_and_no_longer_whatever_its_rows_are() -> None:
    passes = parse([HEAVY] * 8, Work(seconds=0.3))
    began = time.thread_time()
    with pytest.raises(TookTooLong, match="ask with simpler ones"):
        for _ in range(1000):
            passes(LONG)
    assert time.thread_time() - began < 2


def test_of_many_lists_one_searches_at_a_time() -> None:
    turn, lasting, most = threading.Lock(), list[int](), list[int]()

    class Watched(Work):
        def tick(self) -> None:
            lasting.append(1)
            most.append(len(lasting))
            time.sleep(0.001)
            lasting.pop()
            super().tick()

    def one(_number: int) -> bool:
        return parse([HEAVY.replace("8", "2")], Watched(turn, 30.0))(replace(LONG, labels={"l": "a" * 400}))

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(one, range(4))) == [False] * 4
    assert max(most) == 1


@pytest.mark.parametrize(
    "texts",
    [["name==x"] * 101, ["name==" + "x" * 20_000], ["name~=/(a?){100}/"] * 100, [",".join(["name~=a{390}"] * 1000)]],
)
def test_filters_that_would_take_much_memory_are_refused_in_a_short_sentence(texts: list[str]) -> None:
    with pytest.raises(BadRequest, match="filters") as refusal:
        parse(texts)
    assert len(str(refusal.value)) < 17_000
