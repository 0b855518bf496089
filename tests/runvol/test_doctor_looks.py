"""Doctor only looks: nothing is opened for writing, made, mounted or bound, whatever there is to be found."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from blockdev import databases
from runvol.diagnosis import STATES, Diagnosis, good, status, warning
from runvol.doctor import ended
from runvol.doctor_shown import lines
from runvol.doctor_table import TABLE
from tests.driver import Driver, mount_capability
from tests.installation import ROOT

A = "6dad7281-57ff-49e4-b844-c588ceabec1a"
# Devices that take questions as ioctls, and sinks. What is private to a child (`confined` tries a mount namespace of its
# own) is nobody else's.
_HARMLESS = ('"/dev/null"', '"/dev/mapper/control"', '"/dev/pts/', '"/proc/self/fd')


def _tree(*roots: Path) -> dict[str, tuple[object, ...]]:
    found: dict[str, tuple[object, ...]] = {}
    for root in roots:
        for place, names, files in os.walk(root):
            for name in (*names, *files):
                path = os.path.join(place, name)
                facts = os.lstat(path)
                content = Path(path).read_bytes() if os.path.isfile(path) and facts.st_size < 1 << 20 else b""
                # SQLite, as root, gives what lies beside a database the owner that it has, which counts as a change.
                changed = 0 if name.endswith(("-shm", "-wal")) else facts.st_ctime_ns
                found[path] = (facts.st_ino, facts.st_mode, facts.st_uid, facts.st_size, facts.st_mtime_ns, changed,
                               content)  # fmt: skip
    return found


def _mounts_and_loops(driver: Driver) -> list[str]:
    """Of this driver; others may be at work on this machine."""
    done = subprocess.run(["losetup", "-ln", "-O", "NAME,BACK-FILE"], capture_output=True, text=True, check=True)
    lines = [*Path("/proc/self/mounts").read_text().splitlines(), *done.stdout.splitlines()]
    return [line for line in lines if driver.directory.name in line or driver.volatile.name in line]


@pytest.mark.parametrize("running", [True, False])
def test_nothing_is_changed_or_made(running: bool, tmp_path: Path) -> None:
    with Driver() as driver:
        volume, truncated = driver.create("pvc-1"), driver.create("pvc-2")
        driver.stage(volume)
        target = driver.kubelet / "elsewhere" / "mount"
        target.parent.mkdir()
        driver.client.NodePublishVolume(
            volume_id=volume.volume_id, staging_target_path=driver.staging(volume.volume_id), target_path=str(target),
            volume_capability=mount_capability(), volume_context={"runtime": "kata"},
        )  # fmt: skip
        (driver.records / "claims" / f"{volume.volume_id}.json").unlink()
        other = driver.create("pvc-3")
        driver.stage(other)
        driver.publish(other, A, runtime="kata")
        shutil.rmtree(driver.run / "locks", ignore_errors=True)
        (driver.run / "claims").mkdir(exist_ok=True)
        (driver.run / "claims" / "loop-older.json").write_text("{}")
        os.truncate(driver.state / "volumes" / f"{truncated.volume_id}.img", 4096)
        (driver.state / "volumes" / "stray.img").touch()
        if not running:
            driver.kill()
        for name in ("volumes.db.reserve", "answers"):
            if (driver.state / name).is_file():
                (driver.state / name).unlink()
        before = _tree(driver.state, driver.run, driver.kubelet, driver.direct_volumes)
        mounts = _mounts_and_loops(driver)
        trace = tmp_path / "trace"
        done = subprocess.run(
            ["strace", "-f", "-qq", "-s", "300", "-o", trace, "-e", "trace=%file,ftruncate,fallocate,fchmod,fchown,fsetxattr",
             sys.executable, "-B", "-m", "runvol", "doctor"],
            env={**os.environ, **driver.environment}, capture_output=True, text=True, check=False, cwd=ROOT,
        )  # fmt: skip
        assert "left.hand-off" in done.stdout and "left.placeholder" in done.stdout, done.stdout + done.stderr
        assert "is smaller than its volume" in done.stdout, done.stdout + done.stderr
        after = _tree(driver.state, driver.run, driver.kubelet, driver.direct_volumes)
        assert after == before
        assert _mounts_and_loops(driver) == mounts
        assert _writing(trace.read_text(), (str(driver.state), str(driver.run), str(driver.kubelet))) == []


def _writing(trace: str, ours: tuple[str, ...]) -> list[str]:
    """Calls that would change a file that is there, anywhere, or make one."""
    found = []
    for line in trace.splitlines():
        call = re.sub(r"^\d+ +", "", line)
        if re.match(r"open(at2?)?\(", call) and re.search(r"O_WRONLY|O_RDWR|O_CREAT|O_TMPFILE|O_TRUNC", call):
            if not any(one in call for one in _HARMLESS):
                found.append(call)
        elif re.match(
            r"(mkdir|unlink|rename|mknod|symlink|link|chmod|chown|lchown|truncate|utime|[lf]?setxattr)", call
        ):
            if any(one in call for one in ours):
                found.append(call)
        elif re.match(r"(ftruncate|fallocate|fchmod|fsetxattr)", call):
            found.append(call)
    return found


def test_a_store_that_somebody_writes_to_is_read_without_a_lock(tmp_path: Path) -> None:
    from volumes.store import State, Store, StoreFailed

    path = str(tmp_path / "volumes.db")
    writing = Store(path)
    fields = {"backend": "loop", "capacity": 1, "parameters": {}, "state": State.READY}
    writing.insert(volume_id="loop-1", name="one", **fields)  # type: ignore[arg-type]
    with writing.transaction():
        writing.insert(volume_id="loop-2", name="two", **fields)  # type: ignore[arg-type]
        assert [row.volume_id for row in Store(path, reading=True).rows()] == ["loop-1"]
    reading = Store(path, reading=True)
    assert [row.volume_id for row in reading.rows()] == ["loop-1", "loop-2"]
    with pytest.raises(StoreFailed, match="only looked at"):
        reading.insert(volume_id="loop-3", name="three", **fields)  # type: ignore[arg-type]
    reading.close()
    # A copy of the file with its log, as a killed process leaves it.
    (tmp_path / "copy").mkdir()
    for name in ("volumes.db", "volumes.db-wal"):
        shutil.copy(tmp_path / name, tmp_path / "copy" / name)
    copied = Store(str(tmp_path / "copy" / "volumes.db"), reading=True)
    assert [row.volume_id for row in copied.rows()] == ["loop-1", "loop-2"]
    writing.close()
    assert [row.volume_id for row in Store(path, reading=True).rows()] == ["loop-1", "loop-2"]
    assert sorted(os.listdir(tmp_path / "copy")) == ["volumes.db", "volumes.db-wal"]


def test_a_log_that_begins_anew_and_a_file_that_shrinks_are_read_as_sqlite_reads_them(tmp_path: Path) -> None:
    path = str(tmp_path / "one.db")
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA auto_vacuum = FULL")
        db.execute("VACUUM")
        db.execute("CREATE TABLE t (a INTEGER PRIMARY KEY, b BLOB)")
        for round_ in range(12):
            for number in range(round_ * 40, round_ * 40 + 40):
                db.execute("INSERT INTO t VALUES (?, zeroblob(3000))", (number,))
            if round_ % 3 == 1:
                db.execute("DELETE FROM t WHERE a % 4 <> 0")
            if round_ % 4 == 2:
                db.execute("PRAGMA wal_checkpoint(RESTART)")
            with contextlib.closing(databases.for_reading(path)) as seen:
                assert seen.execute("SELECT a, b FROM t").fetchall() == db.execute("SELECT a, b FROM t").fetchall()
                assert seen.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_what_is_no_database_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "one.db").write_bytes(b"nothing" * 1000)
    with pytest.raises(sqlite3.Error):
        databases.for_reading(str(tmp_path / "one.db"))


# -- what a finding is


def test_no_finding_can_be_made_whose_id_is_not_in_the_table() -> None:
    for made in (lambda: warning("kernel.new", "x", "y"), lambda: good("kernel.loop-missing", "x", "y"),
                 lambda: warning("kernel.loop", "x", "y"), lambda: Diagnosis(state="bad", id="kernel.loop-missing",
                                                                            subject="x", finding="y")):  # fmt: skip
        with pytest.raises(ValueError, match="id"):
            made()
    assert warning("kernel.loop-missing", "x", "y").fix == TABLE["kernel.loop-missing"].fix


def test_ids_are_dotted_and_lower_case_and_all_of_them_are_used() -> None:
    assert all(re.fullmatch(r"[a-z]+\.[a-z0-9]+(-[a-z0-9]+)*", one) for one in TABLE)
    assert all(one.meaning and not one.meaning.endswith(".") for one in TABLE.values())
    code = "".join(path.read_text() for path in sorted((ROOT / "runvol").glob("doctor*.py"))
                   if path.name != "doctor_table.py")  # fmt: skip
    needs = re.findall(r'what="([a-z-]+)"', "".join(path.read_text() for path in (ROOT / "volumes").glob("*.py")))
    made = set(re.findall(r'"([a-z]+\.[a-z0-9-]+)"', code)) | {f"volumes.{one}" for one in needs}
    made |= {f"programs.{one}-missing" for one in ("e2fsprogs", "util-linux", "xfsprogs", "tar", "coreutils",
                                                   "thin-provisioning-tools")}  # fmt: skip
    assert {*TABLE} - made == set()


def test_the_worst_counts_and_what_could_not_be_looked_at_comes_after_it() -> None:
    def of(*states: str) -> int:
        ids = {"ok": "kernel.loop"}
        return status([Diagnosis(state=one, id=ids.get(one, "kernel.loop-missing"), subject="x", finding="y")
                       for one in states])  # fmt: skip

    assert STATES == ("ok", "warning", "unknown", "broken")
    assert [of(), of("ok", "warning"), of("ok", "unknown", "warning"), of("unknown", "broken")] == [0, 0, 3, 1]


def test_a_check_that_fails_or_hangs_is_a_finding_and_keeps_what_it_found() -> None:
    import threading

    def fails():
        yield good("kernel.loop", "loop devices", "there")
        raise OSError(5, "Input/output error", "/dev/x")

    def hangs():
        yield good("kernel.loop", "loop devices", "there")
        threading.Event().wait(5)

    for look, words in ((fails, "Input/output error"), (hangs, "looking at x")):
        first, second = ended("x", look, 0.3)
        assert (first.id, second.id, second.state) == ("kernel.loop", "doctor.not-looked", "unknown")
        assert words in second.finding


def test_80_columns_hold_whole_words_and_commands_stay_in_one_piece() -> None:
    found = [one for name, known in TABLE.items() for one in [
        Diagnosis(state="ok" if known.is_good else "broken", id=name, subject="handler kata", finding=known.meaning * 2)
    ]]  # fmt: skip
    shown = list(lines(found, 80))
    commands = re.findall(r"`[^`]*`", " ".join(one.fix for one in found))
    assert all(len(line) <= 80 or "`" in line for line in shown)
    assert all(command in "\n".join(shown) for command in commands)
    words = set(" ".join(one.finding for one in found).split())
    assert words <= set(" ".join(shown).split())
    piped = list(lines(found, None))
    assert all(f"fix: {one.fix}" in line for one, line in
               zip([one for one in found if one.fix], [line for line in piped if "fix: " in line], strict=True))  # fmt: skip
