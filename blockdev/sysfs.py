"""Where the kernel tells of a block device: `/sys/dev/block/MAJOR:MINOR`, a link to the device's own directory."""

from __future__ import annotations

import os


def place(number: int) -> str:
    """Of a device's number (`st_rdev`; `st_dev` of what lies on it)."""
    return of_number(f"{os.major(number)}:{os.minor(number)}")


def of_number(number: str) -> str:
    """Of `MAJOR:MINOR`, as device-mapper and mountinfo write it."""
    return f"/sys/dev/block/{number}"


def name(number: str) -> str:
    """The kernel's name (`dm-3`, `loop0`) of the device `MAJOR:MINOR`; the number itself of one that is gone."""
    return os.path.basename(os.path.realpath(of_number(number)))


def stands_on(place: str) -> str:
    """What the loop device that sysfs has at `place` says that it stands on; empty for others, and for one that stands
    on nothing."""
    try:
        with open(f"{place}/loop/backing_file", errors="surrogateescape") as file:
            return file.read().rstrip("\n")
    except OSError:
        return ""
