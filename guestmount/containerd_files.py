"""What containerd makes of its configuration file and of those that it imports: the rules of each version.

services/server/config (1.6, 1.7), cmd/containerd/server/config (2.x): `imports` are taken breadth first, a file once;
one that is not absolute lies beside the file that names it, and only a name with `*` is a pattern. Later files win.
1.x replaces whole tables by their first name below `plugins`, `proxy_plugins`, `stream_processors` and `timeouts`; 2.x
merges what is below `plugins`, but replaces arrays, and the other three as 1.x does. 2.x brings older files to its own
form first.
"""

from __future__ import annotations

import copy
import functools
import glob
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from blockdev import toml_files
from guestmount.errors import Refused
from guestmount.runtimes import in_root

CRI, RUNTIME, IMAGES = "io.containerd.grpc.v1.cri", "io.containerd.cri.v1.runtime", "io.containerd.cri.v1.images"
_WHOLE = ("proxy_plugins", "stream_processors", "timeouts")
_MOST = 64
# What is read below: tables all of them, and all on their way.
_TABLES = (
    *((key, "*") for key in ("plugins", "proxy_plugins")),
    ("stream_processors",), ("timeouts",), ("proxy_plugins", "*", "exports"),
    *(("plugins", plugin, "containerd", "runtimes", "*", "options") for plugin in ("cri", CRI, RUNTIME)),
    ("plugins", IMAGES, "runtime_platforms", "*"),
)  # fmt: skip
# What a file may say its version is.
_NEWEST_FORM = {(1, 6): 2, (1, 7): 2, (2, 0): 3, (2, 1): 3, (2, 2): 3}
_LATER_FORM = 4


@dataclass(frozen=True, kw_only=True)
class Version:
    """1.6, 1.7, 2.0 and later; another one is refused."""

    major: int
    minor: int

    @classmethod
    def parse(cls, text: str) -> Version:
        """`1.7`, `v1.7.33`, `1.6.20~ds1`, `2.4.2-k3s1`."""
        found = re.match(r"v?([0-9]{1,3})\.([0-9]{1,4})(?![0-9])", text.strip())
        if found is None:
            raise Refused(f"{text!r} is no version of containerd; write it as 1.6, 1.7, 2.0, 2.4.2")
        version = cls(major=int(found[1]), minor=int(found[2]))
        if version < (1, 6) or (version.major == 1 and version.minor > 7) or version.major > 2:
            raise Refused(f"containerd {version} is not known here; there are 1.6, 1.7 and 2.x")
        return version

    def __lt__(self, other: tuple[int, int]) -> bool:
        return (self.major, self.minor) < other

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"

    @property
    def merges(self) -> bool:
        return self.major >= 2

    @property
    def form(self) -> int:
        """The newest `version = …` that it reads."""
        return _NEWEST_FORM.get((self.major, self.minor), _LATER_FORM)


@dataclass(frozen=True, kw_only=True)
class File:
    """`path`: the node's name of it."""

    path: str
    text: str
    document: Mapping[str, Any]

    @property
    def form(self) -> int:
        said = self.document.get("version", 1)
        return said if isinstance(said, int) else 1

    @property
    def cri(self) -> str:
        """What the CRI plugin is called in a file of this form that is not of 2.x's own."""
        return "cri" if self.form < 2 else CRI


def load(path: str, version: Version, root: str = "/") -> list[File]:
    """The file and what it imports, in the order in which later ones win; none where there is no file. Refused for what
    containerd would not start with, or what cannot be read. `root`: where the node's own root is seen."""
    if not os.path.lexists(in_root(path, root)):
        return []
    files: dict[str, File] = {}
    pending = [path]
    while pending:
        one = pending.pop(0)
        if one in files:
            continue
        if len(files) >= _MOST:
            raise Refused(f"{path} imports more than {_MOST} files")
        files[one] = _read(one, version, root)
        pending += _imports(files[one], version, root)
    return list(files.values())


def _read(path: str, version: Version, root: str) -> File:
    try:
        place = in_root(path, root)
        found = os.stat(place)
        stamp = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
        text, document = _parsed(place, stamp)
    except OSError as error:
        raise Refused(f"{path} cannot be read: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise Refused(f"{path} is no TOML: {error}") from error
    file = File(path=path, text=text, document=document)
    said = document.get("version", 1)
    if not isinstance(said, int) or isinstance(said, bool):
        raise Refused(f"{path}: version = {said!r} is no number")
    if said > version.form:
        raise Refused(f"{path}: version = {said} is not read by containerd {version}, which knows up to {version.form}")
    for names in _TABLES:
        for trodden, table in _found(document, names):
            if not isinstance(table, dict):
                raise Refused(f"{path}: {trodden} = {table!r} is no table"[:500])
    disabled = document.get("disabled_plugins", [])
    if not isinstance(disabled, list):
        raise Refused(f"{path}: disabled_plugins = {disabled!r} is no list"[:500])
    return file


@functools.lru_cache(maxsize=32)
def _parsed(path: str, _stamp: tuple[int, ...]) -> tuple[str, Mapping[str, Any]]:
    """What comes of it is for all who ask, and stays as it is."""
    return toml_files.read(path)


def _found(table: Any, names: Sequence[str], trodden: str = "") -> Iterator[tuple[str, Any]]:
    """(name, value) of all that lies on the way of these names, of which `*` is each."""
    if trodden:
        yield trodden, table
    if not names or not isinstance(table, dict):
        return
    for name in table if names[0] == "*" else (names[0],):
        if name in table:
            yield from _found(table[name], names[1:], f"{trodden}.{name}" if trodden else name)


def _imports(file: File, version: Version, root: str) -> list[str]:
    said = file.document.get("imports", [])
    if not isinstance(said, list) or not all(isinstance(one, str) for one in said):
        raise Refused(f"{file.path}: imports = {said!r} is no list of paths")
    found: list[str] = []
    for one in said:
        path = os.path.normpath(os.path.join(os.path.dirname(file.path), one))
        if "*" not in path:
            if not os.path.exists(in_root(path, root)):
                raise Refused(f"{file.path} imports {path}, which does not exist: containerd does not start with it")
            found.append(path)
            continue
        if not version.merges and not os.path.isabs(one):
            raise Refused(
                f"{file.path} imports {one}: releases of containerd {version} differ on where that is (beside the "
                "file, or below the daemon's working directory); write it from the root on"
            )
        place, last = os.path.split(path)
        if glob.has_magic(place):
            seen = glob.glob(os.path.join(root, path.lstrip("/")), include_hidden=True)
            found += sorted(f"/{os.path.relpath(each, root)}" for each in seen)
        else:
            names = glob.glob(last, root_dir=in_root(place, root), include_hidden=True)
            found += [os.path.join(place, each) for each in sorted(names)]
    return found


def in_force(files: Sequence[File], version: Version) -> dict[str, Any]:
    """What holds of all of them. In 1.x the form is the first file's; in 2.x the CRI plugin's tables have 2.x's names,
    as far as runtimes and snapshotters go."""
    made: dict[str, Any] = {}
    for file in files:
        document = _modern(file) if version.merges else copy.deepcopy(dict(file.document))
        document.pop("imports", None)
        for key, value in document.items():
            if key in _WHOLE or (key == "plugins" and not version.merges):
                made.setdefault(key, {}).update(value)
            elif key == "version":
                made.setdefault(key, value)
            elif isinstance(value, dict):
                _merge(made.setdefault(key, {}), value, empties=key == "plugins")
            elif isinstance(value, list):
                there = made.setdefault(key, [])
                there += [one for one in value if not version.merges or one not in there]
            elif value or key not in made:
                made[key] = value
    return made


def _merge(into: dict[str, Any], other: Mapping[str, Any], *, empties: bool) -> None:
    """`empties`: whether zero, false and the empty word win over what was there."""
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value, empties=empties)
        elif empties or value or key not in into:
            into[key] = value


def _modern(file: File) -> dict[str, Any]:
    """2.x's own names for what decides runtimes and snapshotters in an older file."""
    document = copy.deepcopy(dict(file.document))
    plugins: dict[str, Any] = document.get("plugins", {})
    name = CRI if CRI in plugins else file.cri  # the later name hides the first form's own
    if file.form >= 3 or name not in plugins:
        return document
    older = plugins[name].get("containerd", {})
    runtime = plugins.setdefault(RUNTIME, {}).setdefault("containerd", {})
    moved = ("snapshotter", "disable_snapshot_annotations", "discard_unpacked_layers")
    for key, value in older.items():
        if key not in moved:
            runtime.setdefault(key, value)  # whole: what is there under its own name hides all of the older one
        elif "runtimes" in older:
            plugins.setdefault(IMAGES, {})[key] = value
    return document
