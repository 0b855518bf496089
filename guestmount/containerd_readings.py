"""What containerd's configuration says of runtime handlers, as each version of it reads the file.

Which version will read it is not known where the running containerd does not tell; 1.x and 2.x put the files that are
imported together in different ways, and what they differ in nobody may rely on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from guestmount.containerd_files import CRI, RUNTIME, File, Version, in_force, load
from guestmount.errors import Refused
from guestmount.runtimes import ContainerdConfig, Handler, handlers_of, table_of

# 1.6 reads files as 1.7 does, and 2.0 as 2.4, as far as handlers go.
_OLDER, _NEWER = Version(major=1, minor=7), Version(major=2, minor=4)
_DEFAULT = "runc"


@dataclass(frozen=True, kw_only=True)
class Readings:
    """`found`: each different one, none where no containerd would start with the file, or there is none; `why` says
    what is wrong with it then, in words that go on after its name."""

    found: tuple[ContainerdConfig, ...] = ()
    why: str = ""


def read(path: str, root: str = "/") -> Readings:
    """`root`: where the node's own root is seen, which all paths begin at."""
    found: list[ContainerdConfig] = []
    doubts: list[str] = []
    for version in (_OLDER, _NEWER):
        try:
            files = load(path, version, root)
            if not files:
                return Readings(why="does not exist")
            if version is _OLDER and _is_of_newer(files):
                continue
            one = of(in_force(files, version), version, path)
        except Refused as error:
            doubts.append(str(error))
        else:
            found += [one] if one not in found else []
    return Readings(found=tuple(found), why="" if found else f"is of no use: {doubts[-1]}")


def _is_of_newer(files: Sequence[File]) -> bool:
    """Whether they speak to 2.x alone, whatever version they say: an older one would have nothing but runc, whose pods
    find the placeholder of a sandbox's volume, and lose nothing."""
    plugins = {name for file in files for name in file.document.get("plugins", {})}
    return RUNTIME in plugins and not plugins & {CRI, "cri"}


def of(document: Mapping[str, Any], version: Version, source: str) -> ContainerdConfig:
    """From what is in force of all files."""
    first = document.get("version", 1)
    older = "cri" if isinstance(first, int) and first < 2 else CRI
    table = table_of(document, "plugins", RUNTIME if version.merges else older, "containerd")
    handlers: dict[str, Handler] = handlers_of(table_of(table, "runtimes"))
    default = str(table.get("default_runtime_name") or _DEFAULT)
    if not version.merges:  # 2.0 knows neither any more
        handlers |= handlers_of(
            {"untrusted": untrusted} if (untrusted := table_of(table, "untrusted_workload_runtime")) else {}
        )
        unnamed = table_of(table, "default_runtime")
        if unnamed.get("runtime_type"):  # whatever default_runtime_name says
            handlers |= handlers_of({"default": unnamed})
            default = "default"
    return ContainerdConfig(handlers=handlers, default_handler=default, source=source)
