"""e2fsprogs before 1.47 (Ubuntu 22.04, RHEL 8 and 9) cannot be told that a device is zeros: what is made is the same."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from blockdev import Deadline, commands, filesystems
from blockdev.errors import CommandFailed

GIB = 1 << 30
# As mke2fs 1.46.5 refuses it.
REFUSAL = """
Bad option(s) specified: assume_storage_prezeroed

Extended options are separated by commas, and may take an argument which
	is set off by an equals ('=') sign.

Valid extended options are:
	mmp_update_interval=<interval>
	num_backup_sb=<0|1|2>
	lazy_itable_init=<0 to disable, 1 to enable>
	lazy_journal_init=<0 to disable, 1 to enable>
	discard
	nodiscard
	quotatype=<quota type(s) to be enabled>

"""


@pytest.fixture
def older(tmp_path: Path, monkeypatch):
    """mkfs.ext4 is one that does not know the option."""
    real = shutil.which("mkfs.ext4", path="/usr/sbin:/sbin")
    place = tmp_path / "older"
    place.mkdir()
    (place / "said").write_text(REFUSAL)
    program = place / "mkfs.ext4"
    program.write_text(
        f'#!/bin/sh\ncase "$*" in *assume_storage_prezeroed*) cat {place}/said >&2; exit 1 ;; esac\nexec {real} "$@"\n'
    )
    program.chmod(0o755)
    monkeypatch.setattr(commands, "_SEARCH", [str(place), *commands._SEARCH])
    commands._path.cache_clear()
    commands._command.cache_clear()
    yield place
    commands._path.cache_clear()
    commands._command.cache_clear()


def made(path: Path, size: int, *options: str) -> Path:
    with open(path, "wb") as file:
        file.truncate(size)
    filesystems.make_ext4_on_zeros(str(path), Deadline.after(60), *options)
    return path


def facts(path: Path) -> list[str]:
    """What dumpe2fs says, without what every one has of its own."""
    done = subprocess.run(
        ["dumpe2fs", path], capture_output=True, text=True, check=True, env={"LC_ALL": "C", **os.environ}
    )
    own = re.compile(r"UUID|Hash Seed|time:|created:|[Cc]hecked:|[Cc]hecksum:|csum 0x|Lifetime")
    lines = [re.sub(r" csum 0x[0-9a-f]+", "", line) for line in done.stdout.splitlines()]
    return [re.sub(r", csum 0x[0-9a-f]+", "", line) for line in lines if not own.search(line)]


@pytest.mark.parametrize("size", [8 << 20, 200 << 20, 10 * GIB], ids=["8M", "200M", "10G"])
def test_an_older_mke2fs_makes_the_same_filesystem(size: int, tmp_path: Path, older: Path) -> None:
    ours = made(tmp_path / "older.img", size, "-b", "4096")
    (older / "mkfs.ext4").unlink()
    commands._path.cache_clear()
    commands._command.cache_clear()
    newer = made(tmp_path / "newer.img", size, "-b", "4096")
    assert facts(ours) == facts(newer)
    assert "ITABLE_ZEROED" in " ".join(facts(ours))
    # As small, and sound.
    assert abs(os.stat(ours).st_blocks - os.stat(newer).st_blocks) * 512 <= 64 << 10
    subprocess.run(["e2fsck", "-f", "-n", ours], check=True, capture_output=True)


@pytest.mark.kernel
def test_the_kernel_takes_its_groups(tmp_path: Path, older: Path) -> None:
    """ext4 verifies each group's checksum, and leaves inode tables alone that bear the mark."""
    image, place = made(tmp_path / "older.img", 1 * GIB, "-b", "4096"), tmp_path / "mounted"
    place.mkdir()
    subprocess.run(["mount", "-o", "loop", image, place], check=True)
    try:
        for number in range(300):
            (place / f"d{number}").mkdir()
    finally:
        subprocess.run(["umount", place], check=True)
    subprocess.run(["e2fsck", "-f", "-n", image], check=True, capture_output=True)


def test_volumes_of_files_are_made_too(tmp_path: Path, older: Path) -> None:
    image = tmp_path / "v.img"
    with open(image, "wb") as file:
        file.truncate(64 << 20)
    filesystems.make(str(image), "ext4", Deadline.after(60))
    assert "ITABLE_ZEROED" in " ".join(facts(image))


def test_another_refusal_is_not_passed_over(tmp_path: Path, older: Path) -> None:
    (older / "said").write_text(REFUSAL.replace("specified: assume_storage_prezeroed", "specified: nodiscard"))
    with pytest.raises(CommandFailed, match="specified: nodiscard"):
        made(tmp_path / "a.img", 64 << 20)
