"""Mounts that hang nowhere: whatever lies on them, nothing goes through a link there."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from blockdev import filesystems, syscalls
from blockdev.detached import PRIVATE, filesystem, private_mount


def through_a_link(root: int, outside: Path) -> str:
    os.symlink(outside, "link", dir_fd=root)
    try:
        os.mkdir("link/new", dir_fd=root)
    except OSError as error:
        return errno.errorcode[error.errno]
    return "followed"


@pytest.mark.kernel
def test_a_private_mount_follows_no_link(image, tmp_path, soon):
    path = image()
    filesystems.make(path, "ext4", soon)
    with private_mount(path, "ext4", deadline=soon) as root:
        assert through_a_link(root, tmp_path) == "ELOOP"


def test_a_kernel_that_cannot_but_follow_links_mounts_all_the_same(tmp_path, soon, monkeypatch):
    asked, fsmount = [], syscalls.fsmount

    def older(context: int, attributes: int) -> int:
        asked.append(attributes)
        if attributes & syscalls.MOUNT_ATTR_NOSYMFOLLOW:
            raise OSError(errno.EINVAL, "Invalid argument")
        return fsmount(context, attributes)

    monkeypatch.setattr(syscalls, "fsmount", older)
    with filesystem("tmpfs", {}, attributes=PRIVATE, deadline=soon) as root:
        assert through_a_link(root, tmp_path) == "followed"
        facts = os.fstatvfs(root).f_flag
    assert asked == [PRIVATE, PRIVATE & ~syscalls.MOUNT_ATTR_NOSYMFOLLOW]
    assert facts & (os.ST_NOSUID | os.ST_NODEV | os.ST_NOEXEC) == os.ST_NOSUID | os.ST_NODEV | os.ST_NOEXEC
