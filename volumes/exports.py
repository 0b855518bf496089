"""Exports of NFS servers: which ones this controller knows, and how what lies on one is named.

The name of a volume or snapshot holds its export's, so that any controller that knows the export finds it there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import msgspec

from blockdev import BlockdevError, Deadline, MountFailed, WaitExpired, durable, flocks, nfs
from blockdev.deadlines import bounded
from volumes import nfs_parameters
from volumes.errors import ExportUnknown, InvalidParameter, StoreFailed, VolumeNotFound
from volumes.export_ids import above, digest, export_of, is_of, key, short
from volumes.model import Snapshot, Volume
from volumes.troubles import EXPECTED, Trouble

_CALL = 60.0
# Seconds to wait for whoever writes the file, which takes milliseconds.
_PATIENCE = 10.0
# Seconds for which it holds what a cluster says, and that it says nothing.
_MINUTE, _MOMENT = 60.0, 10.0
# Servers that are asked at once for a list, and seconds for all of them together; one that got fewer than `_FAIR` of
# these, and did not answer in them, may be as well as any. How many of such are named.
_AT_ONCE, _LONGEST_LIST, _FAIR, _NAMED = 8, 15.0, 5.0, 3
# What one export can do to a list: somebody else's words among it, which a kernel or a codec takes for none.
_OF_ONE = (*EXPECTED, ValueError)
# Servers of ids that are kept in mind.
_MOST_SERVERS = 10_000
# An id in the words of a work, and the source of an export.
_ID = re.compile(r"nfs(?:snap)?-([0-9a-f]{12})-[0-9a-f]{20}(?:\.[a-z2-7]{1,90})?")
_SOURCE = re.compile(r" (\S+?):/")
# Mount options without which a server may not be reached.
_REACHING = frozenset(
    {"port", "proto", "sec", "xprtsec", "mountport", "mountproto", "mountvers", "resvport", "noresvport"}
)
# Bytes of the file: some 100,000 exports.
_MOST = 16 << 20
T = TypeVar("T", Volume, Snapshot)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Said:
    """What somebody says of an export: the parameters of a class, or of the volume `handle`, which has a directory of
    it; with the options of the mount."""

    parameters: Mapping[str, str]
    mount_options: Sequence[str] = ()
    handle: str = ""


class Exports:
    """`<state_dir>/exports.json`: every export on which a volume was made here. Changed under a lock that holds between
    processes; one that was remembered later comes later. `configured`: exports that are known without that, as
    `server:/path`. `cluster`: who says what a cluster's objects name, and takes seconds for it; raises StoreFailed."""

    def __init__(
        self, state_dir: str, configured: Sequence[str] = (), cluster: Callable[[], Sequence[Said]] | None = None
    ) -> None:
        self._configured = [_named(one) for one in configured]
        self._cluster = Remembered(cluster) if cluster is not None else None
        self._path, self._lock = os.path.join(state_dir, "exports.json"), os.path.join(state_dir, "exports.lock")
        self._silent = _Silent()
        # By the export's key, of those that were worked with or looked for here.
        self._servers: dict[str, str] = {}

    def known(self) -> list[nfs.Export]:
        """Raises StoreFailed."""
        try:
            return msgspec.json.decode(durable.read(self._path, _MOST), type=list[nfs.Export])
        except FileNotFoundError:
            return []
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise StoreFailed(
                f"{self._path} cannot be read ({error}), so no volume on NFS is found, made or deleted here; bring it "
                "back from a backup, or remove it: an export is known again once a volume of its class was made"
            ) from error

    def remember(self, export: nfs.Export) -> None:
        """To be called once something has worked on it: what never did would be asked for ever. Raises StoreFailed."""
        self._note([export])
        if export in self.known():
            return
        try:
            with self._locked():
                known = self.known()
                if export not in known:
                    content = msgspec.json.encode([*known, export])
                    if len(content) > _MOST:
                        raise StoreFailed(f"{self._path} is full: no more exports can be remembered here")
                    durable.replace(self._path, content)
                    durable.sweep(f"{self._path}.")
        except OSError as error:
            raise StoreFailed(f"{self._path} cannot be written: {error.strerror}") from error

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        fd = flocks.take(self._lock, _PATIENCE)
        if fd is None:
            raise StoreFailed(f"another process keeps {self._lock} locked; end it if it hangs")
        try:
            yield
        finally:
            flocks.release(fd)

    def shares(self) -> list[list[nfs.Export]]:
        """Each share with all that is known of how to mount it, the latest first: the latest has worked last."""
        found: dict[str, list[nfs.Export]] = {}
        for export in [*self._configured, *self.known()]:
            found.setdefault(key(export), []).insert(0, export)
        return list(found.values())

    def _all(self, trouble: Trouble) -> list[list[nfs.Export]]:
        """`shares`, with those that the cluster names; `trouble` is told of what cannot be known."""
        shares: list[list[nfs.Export]] = []
        said: Sequence[nfs.Export] = []
        try:
            shares = self.shares()
        except StoreFailed as error:
            trouble(str(error))
        try:
            said = self._cluster.exports() if self._cluster is not None else []
        except StoreFailed as error:
            trouble(str(error))
        known = {key(share[0]) for share in shares}
        more: dict[str, list[nfs.Export]] = {}
        for export in said:
            more.setdefault(key(export), []).append(export)
        return [*shares, *(share for one, share in more.items() if one not in known)]

    def on_each(self, look: Callable[[int, nfs.Export], list[T]], trouble: Trouble) -> list[T]:
        """What `look` finds on every share; `trouble` is told of one that cannot be looked at. No share waits for
        another's server, but for a few; those of servers that did not answer the last time come last, and all looks
        together end within `_LONGEST_LIST` seconds. One that goes on still is left behind, and its share is looked at
        by no other until it has come back."""
        shares = self._silent.last(self._all(trouble))
        deadline, silent = Deadline.after(_LONGEST_LIST), dict[tuple[str, int], str]()
        one = partial(self._looked, look, deadline=deadline, silent=silent)
        if len(shares) < 2:
            answers = [one(share) for share in shares]
        else:
            with ThreadPoolExecutor(_AT_ONCE, "exports") as pool:
                answers = list(pool.map(one, shares))
        for _found, wrong in answers:
            if wrong:
                trouble(wrong)
        missed = [share[0].source for share, (found, _wrong) in zip(shares, answers, strict=True) if found is None]
        if missed:
            trouble(f"what lies on exports that were not reached within {_LONGEST_LIST:.0f} s, as others did not "
                    f"answer: {', '.join(sorted(missed)[:_NAMED])}{', …' if len(missed) > _NAMED else ''}")  # fmt: skip
        return [one for found, _wrong in answers for one in found or ()]

    def _looked(
        self, look: Callable[[int, nfs.Export], list[T]], share: list[nfs.Export], *, deadline: Deadline,
        silent: dict[tuple[str, int], str],
    ) -> tuple[list[T] | None, str]:  # fmt: skip
        """What was found, or what is wrong; None where there was no time to look."""
        server, given = _server(share), deadline.remaining()
        if server in silent:  # and is not asked for each of its exports
            return [], f"what lies on the export {share[0].source}: {silent[server]}"
        if not given:
            return None, ""

        def looked() -> list[T]:
            with opened_any(share) as (root, export):
                return look(root, export)

        try:
            found = bounded(f"looking at the export {share[0].source}", deadline, looked)
        except _OF_ONE as error:
            if isinstance(error, WaitExpired) and given < _FAIR:
                return None, ""
            if isinstance(error, nfs.ServerSilent):
                silent[server] = str(error)
            if isinstance(error, nfs.ServerSilent | WaitExpired):
                self._silent.note(server)
            return [], f"what lies on the export {share[0].source}: {error}"
        self._silent.forget(server)
        return found, ""

    def server_of(self, work: str) -> str:
        """For which server a work waits, by what its words name; the export's key where nobody knows that. One that has
        two names is two. Asks nobody, and raises nothing."""
        found = _ID.search(work)
        if found is None:
            source = _SOURCE.search(work)
            return source[1].strip("[]") if source else work
        said = export_of(found[0])
        if said is not None:
            return said.server
        if (known := self._servers.get(found[1])) is None:
            with contextlib.suppress(StoreFailed):
                self._note(share[0] for share in self.shares())
            known = self._servers.get(found[1])
        return known or found[1]

    def _note(self, found: Iterable[nfs.Export]) -> None:
        for export in found:
            if len(self._servers) >= _MOST_SERVERS:
                self._servers.clear()
            self._servers[key(export)] = export.server

    def of(self, one_id: str, prefix: str) -> list[nfs.Export]:
        """How the share is mounted on which the volume or snapshot of this id lies. ExportUnknown; VolumeNotFound for
        an id that this backend never gives."""
        if not re.fullmatch(rf"{re.escape(prefix)}[0-9a-f]{{12}}-[0-9a-f]{{20}}(\.[a-z2-7]{{1,90}})?", one_id):
            raise VolumeNotFound(one_id)
        said = export_of(one_id)
        try:
            shares = self.shares()
        except StoreFailed:
            if said is None:
                raise
            shares = []
        known = next((share for share in shares if is_of(one_id, share[0])), [])
        unasked = ""
        if not known and self._cluster is not None:
            try:
                known = [one for one in self._cluster.exports() if is_of(one_id, one)]
            except StoreFailed as error:
                unasked = str(error)
        if said is not None:  # what worked before is tried first
            versions = [said.version, *(one for one in nfs.VERSIONS if one != said.version)]
            known = [*known, *(dataclasses.replace(said, version=one) for one in versions)]
        if not known:
            raise ExportUnknown(one_id, self._path, unasked)
        self._note(known[:1])
        return known


def _server(share: list[nfs.Export]) -> tuple[str, int]:
    return share[0].server, share[0].port


class _Silent:
    """The servers that did not answer when they were last asked for a list."""

    def __init__(self) -> None:
        self._lock, self._servers = threading.Lock(), set[tuple[str, int]]()

    def last(self, shares: list[list[nfs.Export]]) -> list[list[nfs.Export]]:
        """The same, with those of these servers behind all others."""
        with self._lock:
            self._servers &= {_server(share) for share in shares}
            return sorted(shares, key=lambda share: _server(share) in self._servers)

    def note(self, server: tuple[str, int]) -> None:
        with self._lock:
            self._servers.add(server)

    def forget(self, server: tuple[str, int]) -> None:
        with self._lock:
            self._servers.discard(server)


class Remembered:
    """What a cluster's objects say, for a minute: there may be thousands of them. That it did not answer holds for a
    moment, so that each call does not wait for it anew."""

    def __init__(self, ask: Callable[[], Sequence[Said]]) -> None:
        self._ask, self._lock = ask, threading.Lock()
        self._until, self._found, self._failed = 0.0, list[nfs.Export](), ""

    def exports(self) -> Sequence[nfs.Export]:
        """Each once. StoreFailed."""
        if not self._lock.acquire(timeout=_PATIENCE):
            raise StoreFailed("which NFS exports the cluster names is being asked, which takes long")
        try:
            if time.monotonic() > self._until:
                try:
                    self._found, self._failed = _of_said(self._ask()), ""
                except StoreFailed as error:
                    self._failed = str(error)
                self._until = time.monotonic() + (_MOMENT if self._failed else _MINUTE)
            if self._failed:
                raise StoreFailed(self._failed)
            return self._found
        finally:
            self._lock.release()


def _of_said(said: Sequence[Said]) -> list[nfs.Export]:
    """What is no export, or nobody's volume of ours, is left out."""
    found: dict[nfs.Export, None] = {}
    for one in said:
        # ValueError: somebody wrote what no codec takes, and what others wrote counts nevertheless.
        with contextlib.suppress(InvalidParameter, ValueError):
            found.update(dict.fromkeys(_of_one(one)))
    return [*found]


def _of_one(one: Said) -> list[nfs.Export]:
    """InvalidParameter, ValueError."""
    export = of_class(nfs_parameters.of_export(one.parameters), one.mount_options)
    path = one.parameters.get(nfs_parameters.RECORDS_PATH, "")
    records = dataclasses.replace(export, path=path if nfs_parameters.is_path(path) else export.path)
    if one.handle:
        return [its for other in (export, records) if (its := above(one.handle, other)) is not None]
    for other in (export, records):
        key(other)
    return [export, records]


def _named(text: str) -> nfs.Export:
    """`server:/path`, and mount options behind semicolons."""
    place, *options = text.split(";")
    server, _, path = place.removeprefix("[").partition(":/")
    version, rest = nfs.version_among(options)
    return nfs.Export(server=server.removesuffix("]"), path=f"/{path}".rstrip("/") or "/",
                      version=version or nfs.DEFAULT_VERSION, options=rest)  # fmt: skip


@contextlib.contextmanager
def opened_any(share: Sequence[nfs.Export]) -> Iterator[tuple[int, nfs.Export]]:
    """The root of a share, by the first of its exports that can be mounted; what `opened` raises, of the first."""
    first: BlockdevError | None = None
    silent: set[tuple[int, bool]] = set()
    for export in share:
        protocol = export.port, export.version == "3"
        if protocol in silent:
            continue  # it is the same server in each
        with contextlib.ExitStack() as stack:
            try:
                root = stack.enter_context(opened(export))
            except BlockdevError as error:
                first = first or error
                if isinstance(error, nfs.ServerSilent):
                    silent.add(protocol)
                continue
            yield root, export
            return
    raise first or VolumeNotFound("no export")


@contextlib.contextmanager
def opened(export: nfs.Export) -> Iterator[int]:
    """Its root, through a mount that hangs nowhere; ServerSilent, MountFailed."""
    with contextlib.ExitStack() as stack:
        try:
            root = stack.enter_context(nfs.opened(export, Deadline.after(_CALL)))
        except ValueError as error:
            # What somebody wrote, and no system call takes: a NUL, half a character, a number without an end.
            raise MountFailed(export.source, "nowhere", f"its words are none that can be mounted ({error})") from error
        yield root


def of_class(parameters: Mapping[str, str], flags: Sequence[str]) -> nfs.Export:
    """The export, in the version that the parameter `vers`, or else one of the mount options, names."""
    for name in ("server", "path"):
        if not parameters.get(name):
            raise InvalidParameter(name, "", "must be given with the backend nfs")
    own = parameters.get("options", "").split(",")
    for name, words in (("mountOptions", flags), ("options", own)):
        if (wrong := nfs.wrong_port(words)) is not None:
            raise InvalidParameter(name, wrong, "names a port, and no number from 0 to 65535")
    asked, options = nfs.version_among([*flags, *own])
    named = parameters.get("vers", "")
    if asked and named and asked != named:
        raise InvalidParameter("vers", named, f"contradicts the mount option for version {asked}")
    return nfs.Export(
        server=parameters["server"],
        path=parameters["path"].rstrip("/") or "/",
        version=named or asked or nfs.DEFAULT_VERSION,
        # What decides whether the share can be reached at all.
        options=tuple(option for option in options if option.partition("=")[0] in _REACHING),
    )


def place(one_id: str) -> int:
    """A stable place in the list of all volumes, or of all snapshots, of NFS; below 2^56."""
    return int(digest(short(one_id))[:13], 16) + 1


def order(export: nfs.Export, after: int) -> Callable[[str], int | None]:
    """The places of what lies on the export; None for what comes before, or lies on another one by its name."""

    def at(name: str) -> int | None:
        found = place(name)
        return found if found > after and is_of(name, export) else None

    return at


def part(numbered: list[tuple[int, T]], after: int, limit: int) -> Sequence[tuple[int, T]]:
    """Those after the place `after`, in order."""
    rest = sorted((pair for pair in numbered if pair[0] > after), key=lambda pair: pair[0])
    return rest if limit < 0 else rest[:limit]
