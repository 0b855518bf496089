"""Which devices the kernel is thought to keep an entry of."""

from __future__ import annotations

from snapshotter.entries import Entries


def test_what_is_beyond_the_kept_goes_the_longest_unmapped_first() -> None:
    entries = Entries(kept=2)
    for device in (1, 2, 3, 4, 1):
        entries.unmapped(device)
    assert len(entries) == 4
    assert entries.surplus(10) == [2, 3]
    assert entries.surplus(1) == [2]


def test_nothing_goes_while_there_are_few() -> None:
    entries = Entries(kept=2)
    assert entries.surplus(10) == []
    entries.unmapped(1)
    entries.unmapped(2)
    assert entries.surplus(10) == []


def test_what_is_deleted_or_mapped_again_is_not_counted() -> None:
    entries = Entries(kept=0)
    entries.unmapped(1)
    entries.gone(1)
    entries.gone(2)
    assert entries.surplus(10) == []
