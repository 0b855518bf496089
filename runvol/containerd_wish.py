"""What containerd's configuration has to say for the snapshotter, by its version, and what contradicts that.

`PluginConfig` of its CRI plugin (internal/cri/config; pkg/cri/config before 2.0), `proxy_plugins`, `unpack_config` of
the transfer service (plugins/transfer), whose built-in list is gone as soon as a file names one entry.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from guestmount.containerd_files import CRI, IMAGES, RUNTIME, File, Version, in_force
from guestmount.errors import Refused
from guestmount.runtimes import handlers_of
from runvol import toml_text
from runvol.toml_text import Append, Change, Path, Put

NAME = "runvol"
TRANSFER = "io.containerd.transfer.v1.local"
_TYPES = ("snapshot", "io.containerd.snapshotter.v1")
# Go's names of the machines of uname(2).
_MACHINES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm/v7", "i686": "386", "loongarch64": "loong64"}
_DEFAULT = "overlayfs"


def machine() -> str:
    """This machine's platform, as containerd writes it."""
    found = os.uname().machine
    return f"linux/{_MACHINES.get(found, found)}"


def fits(said: object, platform: str) -> bool:
    """Whether containerd takes a `platform = …` for this one: what a word leaves out is the machine's own."""
    either = ("linux/arm64", "linux/arm64/v8")
    return said in (None, "", "linux", platform) or (said in either and platform in either)


@dataclass(frozen=True, kw_only=True)
class Wish:
    """`runtimes`: handlers, with the runtime_type of one that the file does not have. `everything`: it is the default
    of all that name no other, as containerd 1.6 has no other choice. `root`: what kubelet is told the root filesystems
    lie on; `roots`: what earlier releases have said there, which is put right."""

    address: str
    root: str
    platform: str
    roots: Sequence[str] = ()
    runtimes: Mapping[str, str] = field(default_factory=dict)
    everything: bool = False


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a table is: its name in what is in force, and in the file that is written."""

    found: Path
    put: Path


def changes(files: Sequence[File], version: Version, wish: Wish) -> list[Change]:
    """What the first file lacks, in the order in which it is put in; none if all is in force. Refused for what says
    otherwise, by its name."""
    return list(_Changes(files, version, wish))


class _Changes:
    def __init__(self, files: Sequence[File], version: Version, wish: Wish) -> None:
        self._files, self._version, self._wish = files, version, wish
        self._document = in_force(files, version)
        self._main = files[0]

    def __iter__(self) -> Iterator[Change]:
        self._refuse_disabled()
        yield from self._proxy()
        if self._version < (1, 7) or self._wish.everything:
            yield from self._for_all()
            if self._version.merges:
                yield from self._unpack()
            return
        runtimes = self._wish.runtimes or self._sandboxes()
        yield from self._runc()
        for handler, kind in runtimes.items():
            yield from self._runtime(handler, kind)
        self._refuse_discarding()
        if self._version.merges:
            for handler in runtimes:
                yield from self._pulls(handler)
            yield from self._unpack()

    def _at(self, *path: str) -> Any:
        found: Any = self._document
        for one in path:
            if not isinstance(found, dict):
                raise Refused(f"{self._said_by(path)}: {toml_text.name(path)} lies in something that is no table")
            found = found.get(one)
            if found is None:
                return None
        return found

    def _said_by(self, path: Sequence[str]) -> str:
        """The last file that has it."""
        for file in reversed(self._files):
            found: Any = in_force([file], self._version)
            for one in path:
                found = found.get(one) if isinstance(found, dict) else None
            if found is not None:
                return file.path
        return self._main.path

    def _set(self, place: Place, key: str, value: Any) -> Iterator[Change]:
        if self._at(*place.found, key) != value:
            yield Put(path=(*place.put, key), value=value)

    def _same(self, *path: str) -> Place:
        return Place(found=path, put=path)

    def _cri(self, *path: str, images: bool = False) -> Place:
        """A table of the CRI plugin's `containerd`."""
        older = ("plugins", self._main.cri, "containerd", *path)
        if not self._version.merges:
            return Place(found=older, put=older)
        modern = ("plugins", IMAGES, *path) if images else ("plugins", RUNTIME, "containerd", *path)
        hidden = self._main.document.get("plugins", {}).get(RUNTIME, {}).get("containerd", {})
        ours = self._main.form >= 3 or images or (path and path[0] in hidden)
        return Place(found=modern, put=modern if ours else older)

    def _refuse_disabled(self) -> None:
        needed = {CRI, "cri"} | ({RUNTIME, IMAGES, TRANSFER} if self._version.merges else set())
        for one in self._at("disabled_plugins") or []:
            if one in needed:
                raise Refused(
                    f"{self._said_by(('disabled_plugins',))}: disabled_plugins has {one!r}, without which kubelet can "
                    "start no pod; take it out, or name the configuration of kubelet's containerd with --config"
                )

    def _proxy(self) -> Iterator[Change]:
        place = self._same("proxy_plugins", NAME)
        kind = self._at(*place.found, "type")
        if kind is not None and kind not in _TYPES[: 2 if self._version.merges else 1]:
            raise Refused(f"{self._said_by(place.found)}: {toml_text.name((*place.found, 'type'))} = {kind!r} is "
                          "another plugin's; give that one another name")  # fmt: skip
        yield from self._set(place, "address", self._wish.address)
        if kind is None:
            yield Put(path=(*place.put, "type"), value="snapshot")
        # 1.6 takes it from 1.6.33 on, and passes over it before.
        if (said := self._at(*place.found, "exports", "root")) != self._wish.root and said in (None, *self._wish.roots):
            yield Put(path=(*place.put, "exports", "root"), value=self._wish.root)

    def _for_all(self) -> Iterator[Change]:
        if not self._wish.everything:
            raise Refused(f"containerd {self._version} has one snapshotter for all runtimes, so runc's containers "
                          "would lie on it too; say --all-runtimes if that is wanted, or upgrade to 1.7")  # fmt: skip
        if self._wish.runtimes:
            why = f"containerd {self._version} has one snapshotter for all runtimes"
            raise Refused(f"--runtime: {'--all-runtimes names all of them' if self._wish.everything else why}")
        place = self._cri(images=True)
        if self._main.form < 3:  # whose own table wins over that of its newer name
            place = Place(found=place.found, put=self._cri("snapshotter").put[:-1])
        there = self._at(*place.found, "snapshotter")
        self._refuse_other(place.found, there, (_DEFAULT,))
        self._refuse_discarding()
        yield from self._set(place, "snapshotter", NAME)

    def _refuse_other(self, table: Path, there: object, replaced: Sequence[str] = ()) -> None:
        if there and there != NAME and there not in replaced:
            raise Refused(f"{self._said_by(table)}: {toml_text.name((*table, 'snapshotter'))} = {there!r}: that "
                          "runtime has another snapshotter; take the line out if it is to have runvol's")  # fmt: skip

    def _refuse_discarding(self) -> None:
        table = self._cri(images=True).found
        if self._at(*table, "discard_unpacked_layers"):
            raise Refused(
                f"{self._said_by(table)}: {toml_text.name((*table, 'discard_unpacked_layers'))} = true: an image that "
                "is there for one snapshotter cannot be unpacked into another any more; set it to false"
            )

    def _sandboxes(self) -> dict[str, str]:
        found = handlers_of(self._at(*self._cri("runtimes").found) or {})
        names = {name: "" for name, handler in found.items() if handler.is_sandbox}
        if not names:
            raise Refused(f"{self._main.path} has no runtime that is a sandbox; name one with --runtime HANDLER, or, "
                          "if it is to be added, --runtime HANDLER=TYPE (kata=io.containerd.kata.v2)")  # fmt: skip
        return names

    def _runc(self) -> Iterator[Change]:
        """1.x has it by itself as long as no other is named: its TOML reader replaces the whole map."""
        place = self._cri("runtimes", "runc")
        if not self._version.merges and not self._at(*place.found[:-1]) and "runc" not in self._wish.runtimes:
            yield Put(path=(*place.put, "runtime_type"), value="io.containerd.runc.v2")

    def _runtime(self, handler: str, kind: str) -> Iterator[Change]:
        place = self._cri("runtimes", handler)
        there = self._at(*place.found)
        if there is None and not kind:
            raise Refused(f"{self._main.path} has no runtime {handler!r}; install it first, or say its type: --runtime "
                          f"{handler}=TYPE (kata=io.containerd.kata.v2)")  # fmt: skip
        said = self._at(*place.found, "runtime_type")
        if kind and said and said != kind:
            raise Refused(f"{self._said_by(place.found)}: {toml_text.name((*place.found, 'runtime_type'))} = "
                          f"{said!r}, not {kind!r} as --runtime {handler}={kind} says")  # fmt: skip
        if kind:
            yield from self._set(place, "runtime_type", kind)
        self._refuse_other(place.found, self._at(*place.found, "snapshotter"))
        yield from self._set(place, "snapshotter", NAME)

    def _pulls(self, handler: str) -> Iterator[Change]:
        """Pulls for pods of this runtime are unpacked into it at once, not inside CreateContainer."""
        place = self._cri("runtime_platforms", handler, images=True)
        self._refuse_other(place.found, self._at(*place.found, "snapshotter"))
        yield from self._set(place, "snapshotter", NAME)
        if not fits(self._at(*place.found, "platform"), self._wish.platform):
            yield Put(path=(*place.put, "platform"), value=self._wish.platform)

    def _unpack(self) -> Iterator[Change]:
        path = ("plugins", TRANSFER, "unpack_config")
        there = self._at(*path)
        ours = {"platform": self._wish.platform, "snapshotter": NAME}
        if there is None:
            for one in (ours, *self._builtin()):
                yield Append(path=path, table=one)
            return
        if not isinstance(there, list) or not all(isinstance(one, dict) for one in there):
            raise Refused(f"{self._said_by(path)}: {toml_text.name(path)} is no list of tables")
        entries = [one for one in there if one.get("snapshotter") == NAME]
        if not entries:
            yield Append(path=path, table=ours)
        elif not any(fits(one.get("platform"), self._wish.platform) for one in entries):
            yield Put(path=path, value=[one | ours if one is entries[0] else one for one in there])

    def _builtin(self) -> Iterator[dict[str, Any]]:
        """What containerd has without a list, in its own words."""
        yield {"platform": self._wish.platform, "snapshotter": _DEFAULT, "differ": "walking"}
        if not self._version < (2, 3):
            system, slash, rest = self._wish.platform.partition("/")
            yield {"platform": f"{system}(+erofs){slash}{rest}", "snapshotter": "erofs", "differ": "erofs",
                   "optional": True}  # fmt: skip
