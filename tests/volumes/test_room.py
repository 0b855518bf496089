"""What was promised can be written, whatever shares its blocks; and more is not promised."""

from __future__ import annotations

import contextlib
import os
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from blockdev import Deadline, shared_blocks, syscalls
from blockdev.shared_blocks import Shared
from tests.disks import mounted
from volumes import AccessMode, Capability, Catalog, ContentSource, NoSpace, SizeRange, copies, room
from volumes.room import File, Room

pytestmark = pytest.mark.kernel
MIB = 1 << 20
USE = [Capability(mode=AccessMode.SINGLE_NODE_WRITER, raw=True)]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 600 MiB that shares blocks."""
    with mounted(tmp_path / "disk.img", tmp_path / "disk", ["mkfs.xfs", "-q"], size=600 * MIB) as place:
        yield place


@pytest.fixture
def catalog(disk: Path) -> Iterator[Catalog]:
    one = Catalog.open(str(disk / "state"))
    yield one
    one.close()


def fill(catalog: Catalog, volume_id: str, mebibytes: int, *, filler: Path | None = None) -> None:
    """Every byte of the volume can be written, also where everybody else takes what is left of the disk."""
    with open(catalog.loop.attach(volume_id).path, "r+b", buffering=0) as file:
        for _ in range(mebibytes):
            assert file.write(os.urandom(MIB)) == MIB
        os.fsync(file.fileno())


def make(catalog: Catalog, name: str, mebibytes: int, source: ContentSource | None = None, **parameters: str) -> str:
    return catalog.loop.create(name, SizeRange(required=mebibytes * MIB), parameters, USE, source).volume_id


def test_clones_are_promised_no_more_than_there_is(catalog, soon):
    first = make(catalog, "v", 150)
    fill(catalog, first, 150)
    made, before = [first], catalog.loop.available_bytes()
    with pytest.raises(NoSpace):
        for number in range(5):
            made.append(make(catalog, f"c{number}", 150, ContentSource(kind="volume", source_id=made[-1])))
    assert 2 <= len(made) <= 3
    assert catalog.loop.available_bytes() <= before - (len(made) - 1) * 150 * MIB + 8 * MIB
    for one in made:
        fill(catalog, one, 150)


def test_a_snapshot_is_promised_what_it_holds(catalog, soon):
    volume = make(catalog, "v", 150)
    fill(catalog, volume, 150)
    before = catalog.loop.available_bytes()
    taken = catalog.loop.take_snapshot("s", volume, soon)
    after = catalog.loop.available_bytes()
    assert abs(before - after - 150 * MIB) < 4 * MIB
    with pytest.raises(NoSpace):
        make(catalog, "more", after // MIB + 2)
    fill(catalog, volume, 150)
    again = make(catalog, "again", after // MIB - 8)
    assert catalog.loop.available_bytes() < 16 * MIB
    catalog.loop.delete(again)
    assert abs(catalog.loop.available_bytes() - after) < 8 * MIB
    catalog.loop.delete_snapshot(taken.snapshot_id)
    soon.poll("XFS frees blocks a moment later", lambda: abs(catalog.loop.available_bytes() - before) < 8 * MIB)


def test_a_preallocated_clone_has_blocks_of_its_own(catalog, disk):
    volume = make(catalog, "v", 100, preallocate="true")
    fill(catalog, volume, 100)
    clone = make(catalog, "c", 100, ContentSource(kind="volume", source_id=volume), preallocate="true")
    path = catalog.loop.attach(clone).path
    assert shared_blocks.look(path).total == 0 and os.stat(path).st_blocks * 512 >= 100 * MIB
    with pytest.raises(OSError, match="No space"), open(disk / "others", "wb", buffering=0) as file:
        while file.write(bytes(MIB)):
            pass
    fill(catalog, clone, 100)


def test_a_clone_is_unshared_by_writing_it_again_where_the_filesystem_has_no_call_for_it(catalog, monkeypatch):
    volume = make(catalog, "v", 20)
    fill(catalog, volume, 20)
    monkeypatch.setattr(syscalls, "FALLOC_FL_UNSHARE_RANGE", 0x1000)  # a mode that no filesystem knows
    clone = make(catalog, "c", 24, ContentSource(kind="volume", source_id=volume), preallocate="true")
    one, other = (catalog.loop.attach(each).path for each in (volume, clone))
    assert shared_blocks.look(other).total == 0 and os.stat(other).st_size == 24 * MIB
    assert Path(one).read_bytes() == Path(other).read_bytes()[: 20 * MIB]


@pytest.mark.parametrize("backend", ["loop", "directory"])
def test_what_an_expansion_was_promised_is_nobody_elses(tmp_path, backend):
    from volumes.directory import DirectoryBackend
    from volumes.loop import LoopBackend

    kind = LoopBackend if backend == "loop" else DirectoryBackend
    one = kind(str(tmp_path), capacity_limit=1000 * MIB)
    parameters = {"quota": "none"} if backend == "directory" else {}
    use = USE if backend == "loop" else [Capability(mode=AccessMode.SINGLE_NODE_WRITER)]
    first, second = (one.create(name, SizeRange(required=300 * MIB), parameters, use).volume_id for name in "ab")
    larger = SizeRange(required=600 * MIB)
    assert one.promise(first, larger) == one.promise(first, larger) == 600 * MIB
    assert one.get(first).capacity_bytes == 300 * MIB and one.available_bytes() == 100 * MIB
    with pytest.raises(NoSpace):
        one.promise(second, larger)
    with pytest.raises(NoSpace):
        one.expand(second, larger)
    with pytest.raises(NoSpace):
        one.create("c", SizeRange(required=200 * MIB), parameters, use)
    assert one.expand(first, larger).capacity_bytes == 600 * MIB
    assert one.available_bytes() == 100 * MIB
    assert one.promise(second, SizeRange(required=400 * MIB)) == 400 * MIB
    assert one.promise(second, SizeRange(required=350 * MIB)) == 350 * MIB, "a smaller wish frees the rest"
    assert one.available_bytes() == 50 * MIB
    one.delete(second)
    assert one.available_bytes() == 400 * MIB
    one.close()


def test_more_promises_than_there_is_room_are_kept_and_told(catalog, disk):
    volume = make(catalog, "v", 300)
    assert not [need for need in catalog.named("loop").needs() if "promised" in need.finding]
    (disk / "others").write_bytes(bytes(380 * MIB))
    (told,) = [need for need in catalog.named("loop").needs() if "promised" in need.finding]
    assert not told.met and "bytes more than there are" in told.finding
    assert catalog.loop.available_bytes() == 0
    with pytest.raises(NoSpace):
        make(catalog, "w", 1)
    fill(catalog, volume, 100)
    (disk / "others").unlink()
    fill(catalog, volume, 300)


def test_only_what_may_share_blocks_is_looked_at(tmp_path):
    def file(one: str, source: str = "") -> File:
        return File(one_id=one, path=str(tmp_path / one), promised=1, source=source)

    files = [file("a"), file("s", "a"), file("b", "s"), file("e")]
    assert room._sharing(files) == {"a", "s", "b"}
    assert room._sharing([*files, file("c", "gone")]) == {"a", "s", "b", "c", "e"}, "what is gone was made of any"
    assert room._sharing([file("a"), file("e")]) == set()
    assert Room().owed(files) == 4


def test_a_block_counts_once_among_volumes_and_never_where_a_snapshot_has_it():
    """By the blocks themselves, for pieces at random."""
    for seed in range(300):
        random = Random(seed)
        have = [[random.sample(range(40), 2) for _ in range(random.randint(0, 4))] for _ in range(5)]
        files = [Shared(1, array("Q", [at for piece in pieces for at in sorted(piece)])) for pieces in have]
        blocks = [Counter(at for piece in pieces for at in range(*sorted(piece))) for pieces in have]
        volumes, kept = sum(blocks[:3], Counter()), sum(blocks[3:], Counter())
        once = sum(count > 1 and at not in kept for at, count in volumes.items())
        assert room._once(files[:3], files[3:]) == once
        assert room._once(files[:3], [*files[3:], None]) == 0, "one that cannot be told may have them all"
        assert room._once(files[:3], [*files[3:], Shared(1, array("Q"), (0, 40))]) == 0


def test_a_file_of_very_many_pieces_costs_no_more_than_a_look_at_some(catalog, monkeypatch, soon):
    """What was not looked at counts as shared: less is promised, never more."""
    volume = make(catalog, "v", 64)
    with open(catalog.loop.attach(volume).path, "r+b", buffering=0) as file:
        for number in range(0, 64 * MIB, 64 << 10):
            os.pwrite(file.fileno(), b"x" * 4096, number)
        os.fsync(file.fileno())
    assert shared_blocks.look(catalog.loop.attach(volume).path).total == 0
    monkeypatch.setattr(shared_blocks, "_MOST", 512)
    assert shared_blocks.look(catalog.loop.attach(volume).path).total > 16 * MIB
    taken = catalog.loop.take_snapshot("s", volume, Deadline.after(30))
    assert catalog.loop.available_bytes() > 0
    catalog.loop.delete_snapshot(taken.snapshot_id)


def test_many_snapshots_owe_no_more_than_one(catalog, soon):
    """Whatever is written over the volume afterwards has room, and the snapshots keep what they had."""
    volume = make(catalog, "v", 150)
    fill(catalog, volume, 150)
    before = catalog.loop.available_bytes()
    taken = [catalog.loop.take_snapshot(f"s{number}", volume, soon) for number in range(6)]
    assert abs(before - catalog.loop.available_bytes() - 150 * MIB) < 8 * MIB
    held = Path(catalog.loop.image_snapshots.path(taken[0].snapshot_id)).read_bytes()
    rest = make(catalog, "rest", catalog.loop.available_bytes() // MIB - 8)
    fill(catalog, rest, catalog.loop.get(rest).capacity_bytes // MIB)
    fill(catalog, volume, 150)
    assert Path(catalog.loop.image_snapshots.path(taken[-1].snapshot_id)).read_bytes() == held
    for one in taken:
        catalog.loop.delete_snapshot(one.snapshot_id)
    fill(catalog, volume, 150)


def test_a_snapshot_that_its_volume_could_not_afford_is_refused(catalog, soon):
    volume = make(catalog, "v", 200)
    fill(catalog, volume, 200)
    make(catalog, "rest", catalog.loop.available_bytes() // MIB - 100)
    with pytest.raises(NoSpace, match="a snapshot takes"):
        catalog.loop.take_snapshot("s", volume, soon)


@pytest.mark.parametrize("kind", ["fifo", "link to itself", "directory"])
def test_what_lies_in_an_images_place_holds_up_nobody_else(catalog, soon, kind):
    volume, other = make(catalog, "v", 20), make(catalog, "o", 20)
    catalog.loop.take_snapshot("s", volume, soon)
    path = Path(catalog.loop.attach(volume).path)
    path.unlink()
    {"fifo": lambda: os.mkfifo(path), "link to itself": lambda: path.symlink_to(path), "directory": path.mkdir}[kind]()
    assert catalog.loop.available_bytes() > 0
    made = make(catalog, "more", 20)
    assert {one.volume_id for _place, one in catalog.loop.list()} == {volume, other, made}
    catalog.loop.take_snapshot("t", other, soon)
    catalog.loop.delete(other)


def test_volumes_whose_common_snapshot_is_deleted_still_share_its_blocks(catalog, soon):
    volume = make(catalog, "v", 100)
    fill(catalog, volume, 100)
    before = catalog.loop.available_bytes()
    taken = catalog.loop.take_snapshot("s", volume, soon)
    restored = make(catalog, "r", 100, ContentSource(kind="snapshot", source_id=taken.snapshot_id))
    assert abs(before - catalog.loop.available_bytes() - 200 * MIB) < 8 * MIB
    catalog.loop.delete_snapshot(taken.snapshot_id)
    catalog.loop._room.forget()
    assert abs(before - catalog.loop.available_bytes() - 100 * MIB) < 8 * MIB
    make(catalog, "rest", catalog.loop.available_bytes() // MIB - 8, preallocate="true")
    fill(catalog, volume, 100)
    fill(catalog, restored, 100)


def test_a_snapshot_costs_what_its_volume_had_together_with_a_clone(catalog, soon):
    volume = make(catalog, "v", 150)
    fill(catalog, volume, 150)
    clone = make(catalog, "c", 150, ContentSource(kind="volume", source_id=volume))
    rest = make(catalog, "rest", catalog.loop.available_bytes() // MIB - 100)
    with pytest.raises(NoSpace, match="a snapshot takes about 1[45]0 MiB"):
        catalog.loop.take_snapshot("s", volume, soon)
    catalog.loop.delete(rest)
    catalog.loop.take_snapshot("s", volume, soon)
    make(catalog, "rest", catalog.loop.available_bytes() // MIB - 8, preallocate="true")
    for one in (volume, clone):
        fill(catalog, one, 150)


def test_clones_share_once_what_was_written_after_a_snapshot(catalog, soon):
    volume = make(catalog, "v", 60)
    fill(catalog, volume, 60)
    catalog.loop.take_snapshot("s", volume, soon)
    fill(catalog, volume, 60)
    before = catalog.loop.available_bytes()
    clone = make(catalog, "c", 60, ContentSource(kind="volume", source_id=volume))
    assert abs(before - catalog.loop.available_bytes() - 60 * MIB) < 4 * MIB
    make(catalog, "rest", catalog.loop.available_bytes() // MIB - 8, preallocate="true")
    for one in (clone, volume):
        fill(catalog, one, 60)


def test_nobody_is_promised_what_a_snapshots_source_will_need_while_it_is_taken(catalog, soon, monkeypatch):
    volume = make(catalog, "v", 150)
    fill(catalog, volume, 150)
    before, seen, copy = catalog.loop.available_bytes(), [], copies.copy

    def watched(source: str, writer: int, deadline: Deadline, **more: Any) -> None:
        seen.append(catalog.loop.available_bytes())
        copy(source, writer, deadline, **more)
        seen.append(catalog.loop.available_bytes())

    monkeypatch.setattr(copies, "copy", watched)
    catalog.loop.take_snapshot("s", volume, soon)
    seen.append(catalog.loop.available_bytes())
    assert all(abs(before - left - 150 * MIB) < 4 * MIB for left in seen), (before, seen)


def test_a_snapshot_that_is_copied_is_promised_its_bytes_once(tmp_path, monkeypatch, soon):
    """Where no blocks are shared."""
    monkeypatch.setattr(copies, "_reflink", lambda *_: False)
    with contextlib.closing(Catalog.open(str(tmp_path / "state"))) as catalog:
        volume = make(catalog, "v", 16)
        fill(catalog, volume, 16)
        before, seen, copy = catalog.loop._left(), [], copies._copy_data

        def watched(*arguments: Any) -> None:
            seen.append(before - catalog.loop._left())
            copy(*arguments)

        monkeypatch.setattr(copies, "_copy_data", watched)
        catalog.loop.take_snapshot("s", volume, soon)
        assert 8 * MIB < seen[0] < 24 * MIB


def test_looks_that_take_long_are_spread_over_questions(catalog, monkeypatch):
    """What there was no time for counts as shared; what was seen before is believed."""
    first = make(catalog, "v", 40)
    fill(catalog, first, 40)
    second = make(catalog, "c", 40, ContentSource(kind="volume", source_id=first))
    fill(catalog, second, 40)
    catalog.loop._room.forget()
    before = catalog.loop.available_bytes()
    monkeypatch.setattr(room, "_LONGEST", -1.0)
    catalog.loop._room.forget()
    assert abs(catalog.loop.available_bytes() - before) < 4 * MIB
    monkeypatch.setattr(catalog.loop, "_room", Room())
    assert abs(before - catalog.loop.available_bytes() - 80 * MIB) < 4 * MIB
