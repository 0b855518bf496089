"""Claims: one record a volume, under a lock that holds between processes and dies with its holder."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from blockdev import Deadline, durable, flocks
from guestmount import BadRequest, Busy, Claim, Claims, Owner, Refused, Target
from guestmount.claims import HOST, SANDBOX, Use


def a_claim(volume="loop-1"):
    return Claim(volume=volume, source="/x", staging_path="/s", use=Use(mode="single_node_writer", fstype="ext4"),
                 owner=Owner(kind=SANDBOX, pod_uid="u", handler="kata"), targets={"/t": Target(read_only=False, pod_uid="u")})  # fmt: skip


@pytest.fixture
def claims(tmp_path):
    return Claims(str(tmp_path))


def test_a_record_is_read_back_as_it_was_written(claims, soon):
    with claims.locked("loop-1", soon) as cell:
        assert cell.claim is None
        cell.write(a_claim())
    assert claims.peek("loop-1") == a_claim()
    assert claims.all() == [a_claim()]


def test_a_removed_record_leaves_nothing_on_the_disk(claims, soon, tmp_path):
    with claims.locked("loop-1", soon) as cell:
        cell.write(a_claim())
    with claims.locked("loop-1", soon) as cell:
        cell.remove()
    assert not any(files for _, _, files in os.walk(tmp_path))


def test_a_second_taker_is_told_that_the_volume_is_busy(claims, soon):
    with claims.locked("loop-1", soon), pytest.raises(Busy, match="loop-1"), claims.locked("loop-1", soon):
        pass
    with claims.locked("loop-1", soon), claims.locked("loop-2", soon):
        pass


_CHILD = """
import sys, time
from blockdev import Deadline
from guestmount import Claims
with Claims(sys.argv[1]).locked("loop-1", Deadline.after(5)):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_the_lock_holds_between_processes_and_ends_with_a_kill(claims, soon, tmp_path):
    child = subprocess.Popen([sys.executable, "-c", _CHILD, str(tmp_path)], stdout=subprocess.PIPE)
    child.stdout.readline()
    with pytest.raises(Busy), claims.locked("loop-1", soon):
        pass
    child.send_signal(signal.SIGKILL)
    child.wait()
    with claims.patient(2).locked("loop-1", soon) as cell:
        assert cell.claim is None


def test_the_lock_excludes_although_its_file_comes_and_goes(claims):
    inside, most, errors = [], [], []

    def work():
        for _ in range(60):
            try:
                with claims.patient(20).locked("loop-1", Deadline.after(20)) as cell:
                    inside.append(1)
                    most.append(len(inside))
                    cell.write(a_claim())
                    cell.remove()
                    inside.pop()
            except Exception as error:
                errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and max(most) == 1


def test_a_damaged_record_is_an_error_and_never_a_free_volume(claims, soon, tmp_path):
    (tmp_path / "claims").mkdir()
    (tmp_path / "claims" / "loop-1.json").write_text('{"volume": "loop-1"')
    with pytest.raises(Refused, match=r"loop-1\.json cannot be read"), claims.locked("loop-1", soon):
        pass


@pytest.mark.parametrize("volume_id", ["", "..", "../x", "a/b", "A", "x\0y", "x" * 129])
def test_an_id_is_never_a_path(claims, soon, volume_id):
    with pytest.raises(BadRequest, match="volume_id"), claims.locked(volume_id, soon):
        pass


def test_what_a_killed_process_was_writing_is_swept_once_it_is_old(claims, tmp_path):
    (tmp_path / "tmp").mkdir()
    for name, age in (("old", 120), ("new", 0)):
        path = tmp_path / "tmp" / name
        path.touch()
        os.utime(path, (time.time() - age,) * 2)
    claims.sweep()
    assert os.listdir(tmp_path / "tmp") == ["new"]


def test_an_owner_is_named_as_a_person_would():
    assert str(Owner(kind=HOST)) == "the host's kernel (runc pods)"
    owner = Owner(kind=SANDBOX, pod_uid="u", pod_namespace="prod", pod_name="db-0", handler="kata-qemu")
    assert str(owner) == "pod prod/db-0 (runtime handler kata-qemu)"


def test_what_a_killed_writer_left_goes_with_the_record_and_a_neighbours_does_not(tmp_path):
    claims = Claims(str(tmp_path))
    left = tmp_path / "tmp" / "loop-a.123-0123abcd.new"
    neighbours = tmp_path / "tmp" / "loop-a.b.123-0123abcd.new"
    (tmp_path / "tmp").mkdir()
    for path in (left, neighbours):
        path.write_text("half")
    with claims.locked("loop-a", Deadline.after(5)) as cell:
        cell.remove()
    assert not left.exists() and neighbours.exists()


@pytest.mark.parametrize("ending", [False, True])
@pytest.mark.parametrize("trouble", [errno.EIO, errno.EMFILE, errno.EACCES, errno.ESTALE])
def test_a_record_that_cannot_be_read_now_is_no_damaged_one(claims, soon, tmp_path, monkeypatch, trouble, ending):
    with claims.locked("loop-1", soon) as cell:
        cell.write(a_claim())
    claims.remake = lambda _volume: None
    real = durable.read

    def failing(path, *more):
        if path.endswith("loop-1.json"):
            raise OSError(trouble, os.strerror(trouble), path)
        return real(path, *more)

    monkeypatch.setattr(durable, "read", failing)
    if ending and trouble != errno.EMFILE:  # a pod can end on a disk that is dying
        with claims.locked("loop-1", soon, ending=True) as cell:
            assert cell.claim is None
    else:
        with pytest.raises(OSError, match=os.strerror(trouble)), claims.locked("loop-1", soon, ending=ending):
            pytest.fail("it counted as none")
    with claims.locked("loop-2", soon) as cell:
        cell.write(a_claim("loop-2"))
    found, damaged = claims.readable()
    assert [one.volume for one in found] == ["loop-2"] and len(damaged) == 1
    assert [one.volume for one in claims.known()[0]] == ["loop-2"]
    monkeypatch.undo()
    assert {one.volume for one in claims.known()[0]} == {"loop-1", "loop-2"}, "that moment has passed"
    assert claims.peek("loop-1") == a_claim() and not (tmp_path / "damaged").exists()


@pytest.mark.parametrize("kind", ["fifo", "directory", "link", "garbage", "long"])
def test_what_lies_in_a_records_place_is_laid_aside_again_and_again(claims, soon, tmp_path, kind):
    claims.remake = lambda _volume: None
    path = tmp_path / "claims/loop-1.json"
    path.parent.mkdir()
    for other in ("directory", "garbage"):  # what was laid aside before
        for one in (other, kind):
            if one == "fifo":
                os.mkfifo(path)
            elif one == "directory":
                (path / "inner").mkdir(parents=True)
            elif one == "link":
                path.symlink_to("/etc/passwd")
            else:
                path.write_bytes(b"{" * (2 << 20 if one == "long" else 3))
            with claims.locked("loop-1", soon) as cell:
                assert cell.claim is None
            assert not os.path.lexists(path)
    assert os.listdir(tmp_path / "damaged") == ["loop-1"]


def test_who_lost_its_lock_takes_nobody_elses_away(claims, soon, tmp_path):
    with claims.locked("loop-1", soon):
        (tmp_path / "locks/loop-1").unlink()
        with claims.locked("loop-1", soon) as second:
            second.write(a_claim())
            inode = (tmp_path / "locks/loop-1").stat().st_ino
    with claims.turn("loop-1", soon):
        (tmp_path / "turns/loop-1").unlink()
        other = flocks.take(str(tmp_path / "turns/loop-1"), 1)
    assert (tmp_path / "turns/loop-1").exists()
    flocks.release(other)
    first = claims.locked("loop-1", soon)
    with first as cell:
        assert cell.claim == a_claim() and (tmp_path / "locks/loop-1").stat().st_ino == inode
        cell.remove()
        (tmp_path / "locks/loop-1").unlink()
        other = flocks.take(str(tmp_path / "locks/loop-1"), 1)
    assert (tmp_path / "locks/loop-1").exists(), "it is another's lock"
    flocks.release(other)


def test_a_device_that_its_index_cannot_note_is_not_written_into_a_claim(claims, soon, tmp_path):
    (tmp_path / "devices").write_text("no directory")
    with claims.locked("loop-1", soon) as cell:
        cell.write(a_claim())
        with pytest.raises(OSError, match="devices"):
            cell.write(a_claim().but(device="/dev/loop7"))
    assert claims.peek("loop-1") == a_claim()


def test_a_wrong_entry_of_the_index_is_put_right_at_a_start(claims, soon, tmp_path):
    with claims.locked("loop-1", soon) as cell:
        cell.write(a_claim().but(device="/dev/loop7"))
    (tmp_path / "devices/loop7").write_text("loop-9")
    with claims.locked("loop-2", soon) as cell:
        assert not cell.has_another("/dev/loop7")
        claims.sweep()
        assert cell.has_another("/dev/loop7")


_KILLED_NOTING = """
import os, signal, sys
from blockdev import Deadline, durable
from guestmount import Claim, Claims, Owner, Target
from guestmount.claims import HOST, Use
claim = Claim(volume="loop-a", source="/x", staging_path="/s", use=Use(mode="single_node_writer", fstype="ext4"),
              owner=Owner(kind=HOST), targets={"/t": Target(read_only=False, pod_uid="u")})
with Claims(sys.argv[1]).locked("loop-a", Deadline.after(5)) as cell:
    cell.write(claim)
    durable.os.rename = lambda *_a, **_k: os.kill(os.getpid(), signal.SIGKILL)
    cell.write(claim.but(device="/dev/loop7"))
"""


def test_what_was_being_noted_of_its_device_goes_with_the_record(tmp_path, soon):
    child = subprocess.run([sys.executable, "-c", _KILLED_NOTING, str(tmp_path)], check=False)
    assert child.returncode == -signal.SIGKILL and len(os.listdir(tmp_path / "tmp")) == 1
    with Claims(str(tmp_path)).locked("loop-a", soon) as cell:
        cell.remove()
    assert not any(files for _, _, files in os.walk(tmp_path))


def test_a_look_sees_who_works_on_a_volume_and_makes_nothing(claims, soon, tmp_path):
    assert claims.unworked("loop-1") is None and not os.listdir(tmp_path)
    with claims.locked("loop-1", soon) as cell:
        cell.write(a_claim())
        with pytest.raises(Busy, match="loop-1"):
            claims.unworked("loop-1")
    before = {path: files for path, _, files in os.walk(tmp_path)}
    assert claims.unworked("loop-1") == a_claim()
    assert before == {path: files for path, _, files in os.walk(tmp_path)}
