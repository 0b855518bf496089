"""SELinux's mount options: the label that all files of a filesystem have, for the kernel that mounts it.

A label may hold a comma (`system_u:object_r:container_file_t:s0:c10,c20`), so kubelet, and whoever writes one into
mountOptions, puts it in double quotes: mount(2) takes it with them (selinux_sb_eat_lsm_opts in the kernel's
security/selinux/hooks.c), fsconfig(2) without. A kernel that runs without SELinux knows none of these options, and
mount(8) leaves them out there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

CONTEXT = "context"
_KEYS = frozenset({CONTEXT, "fscontext", "defcontext", "rootcontext"})
_VALUE = re.compile(r'"[^"]+"|[^",]+')
# A label's categories, where a comma has divided them from it.
_CATEGORIES = re.compile(r"c\d{1,4}(\.c\d{1,4})?\"?")
_FILESYSTEMS, _OWN_LABEL = "/proc/filesystems", "/proc/self/attr/current"
# Colons of a whole label, at least.
_FIELDS = 2


def is_on() -> bool:
    """Whether the running kernel has a policy of SELinux, by which it enforces or logs. Told by the kernel itself:
    selinuxfs is mounted in no container.

    One that runs SELinux and was given no policy refuses labels. This process is labelled `kernel` there, and
    user:role:type with a policy.
    """
    with open(_FILESYSTEMS) as known:
        if not any(line.split()[-1] == "selinuxfs" for line in known):
            return False
    try:
        with open(_OWN_LABEL) as own:
            return own.read().count(":") >= _FIELDS
    except OSError:  # another security module has it
        return False


def is_label(option: str) -> bool:
    return option.partition("=")[0] in _KEYS


def without(options: Iterable[str]) -> tuple[str, ...]:
    """What another kernel than the host's is told: a guest has a policy of its own, or none."""
    return tuple(option for option in options if not is_label(option))


def of_host(options: Iterable[str]) -> tuple[str, ...]:
    """What the host's kernel is told: each label once, since it refuses a second one; none where SELinux is off."""
    if not is_on():
        return without(options)
    once = {_plain(option) if is_label(option) else option: option for option in options}
    return tuple(once.values())


def context_of(options: Sequence[str]) -> str:
    """The label of `context=`, without quotes; empty for none."""
    found = [_plain(option).partition("=")[2] for option in options if option.startswith(f"{CONTEXT}=")]
    return found[-1] if found else ""


def wrong(options: Sequence[str]) -> tuple[str, str] | None:
    """The first option that gives no whole label, or a second one, and why; None if there is none."""
    given: dict[str, str] = {}
    for before, option in zip(("", *options), options, strict=False):
        key, _, value = option.partition("=")
        if is_label(before) and _CATEGORIES.fullmatch(option):
            return before, f"has lost {option!r} to a comma; put double quotes around the whole label"
        if key not in _KEYS:
            continue
        plain = value.replace('"', "")
        if not _VALUE.fullmatch(value) or plain.count(":") < _FIELDS or not all(plain.split(":")[:3]):
            return option, "is no label of SELinux, which is user:role:type or user:role:type:level, in double quotes"
        if given.setdefault(key, plain) != plain:
            return option, f"is a second label beside {key}={given[key]}; give one (mountOptions, or the pod's own)"
    return None


def _plain(option: str) -> str:
    return option.replace('"', "")
