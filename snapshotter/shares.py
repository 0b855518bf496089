"""The directory of shared images. Whoever can write to it is not believed: nothing here decides what is trusted.

`<directory>/<hex of the chain id>/` holds `image`, `hashes` (dm-verity's tree), `manifest.json` and, where it was
signed, `manifest.signed`; it appears whole, by a rename. Only regular files inside of that very directory are read, no
more of each than it may have, and no link is followed. Shared storage may hang: what a node's calls ask of it has a
limit, and while one look at it hangs, others are refused at once.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

from blockdev import Deadline, WaitExpired, durable, ioctls, sparse
from blockdev.deadlines import bounded
from snapshotter import manifests, signatures, verity
from snapshotter.errors import BadRequest, NotFound, SnapshotterError, Unavailable
from snapshotter.manifests import CHAIN, Manifest
from snapshotter.signatures import Envelope, PrivateKey

# How long shared storage may take to answer, in seconds.
PATIENCE = 3.0
_PLAIN, _SIGNED, _IMAGE, _HASHES = "manifest.json", "manifest.signed", "image", "hashes"
_LARGEST_MANIFEST = 64 << 10
_MOST_NAMES = 100_000
_LONGEST_TROUBLE = 200
# What a killed `make` or `remove` has left.
_LEFT = re.compile(r"\.[0-9a-f]{64}\.[0-9a-f]{8}(\.removed)?\Z")
# Seconds after which nobody writes to it any more.
_ABANDONED = 86400.0
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
Progress = Callable[[str, int], object]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Said:
    """What the share says of one chain, unproved. `signed` is the content of `envelope`; both are there or none."""

    chain: str
    plain: Manifest | None = None
    signed: Manifest | None = None
    envelope: Envelope | None = None
    troubles: tuple[str, ...] = ()

    @property
    def manifests(self) -> list[Manifest]:
        return [one for one in (self.signed, self.plain) if one is not None]


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The two files, open. Their paths stand for what is open, whatever the names in the share become."""

    image_fd: int
    hashes_fd: int

    @property
    def image(self) -> str:
        return f"/proc/self/fd/{self.image_fd}"

    @property
    def hashes(self) -> str:
        return f"/proc/self/fd/{self.hashes_fd}"

    def lacks(self, size: int) -> str:
        """What keeps them from being an image of so many bytes; empty if nothing does."""
        there, tree = os.fstat(self.image_fd).st_size, os.fstat(self.hashes_fd).st_size
        if there != size:
            return f"{_IMAGE} has {there} bytes instead of {size}"
        wanted = verity.tree_bytes(size)
        return "" if tree >= wanted else f"{_HASHES} has {tree} bytes instead of {wanted}"


class Share:
    """The directory. What asks it for a node's calls may raise Unavailable, within PATIENCE."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self._hanging: threading.Thread | None = None
        self._lock = threading.Lock()

    def place(self, chain: str) -> str:
        return os.path.join(self.directory, chain.removeprefix("sha256:"))

    def ask(self, what: str, work: Callable[[], T], deadline: Deadline) -> T:
        """Run `work`, which touches the share. Only one such thread may ever hang."""
        with self._lock:
            if self._hanging is not None and self._hanging.is_alive():
                raise Unavailable(f"the shared images in {self.directory} do not answer (since {self._hanging.name})")
            self._hanging = None
        thread: list[threading.Thread] = []

        def noted() -> T:
            thread.append(threading.current_thread())
            return work()

        try:
            return bounded(what, Deadline.after(min(PATIENCE, deadline.remaining())), noted)
        except WaitExpired as error:
            with self._lock:
                self._hanging = thread[0] if thread else None
                if thread:
                    thread[0].name = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            raise Unavailable(f"the shared images in {self.directory} do not answer: {error}") from None
        except OSError as error:
            raise Unavailable(f"the shared images in {self.directory}: {error}") from None

    # -- reading ------------------------------------------------------------------------------------------------------

    def said(self, chain: str, deadline: Deadline) -> Said | None:
        """What stands there of this chain; None if nothing does."""
        if not CHAIN.match(chain):
            return None
        return self.ask(f"reading {self.place(chain)}", lambda: self._said(chain), deadline)

    def _said(self, chain: str) -> Said | None:
        troubles: list[str] = []
        try:
            with self._inside(chain) as directory:
                plain, signed = (_content(directory, name, troubles) for name in (_PLAIN, _SIGNED))
        except FileNotFoundError:
            return None
        except SnapshotterError as error:
            return Said(chain=chain, troubles=(str(error),))
        said = Said(chain=chain)
        if plain is not None:
            with _noting(_PLAIN, troubles):
                said = replace(said, plain=manifests.decode(chain, plain))
        if signed is not None:
            with _noting(_SIGNED, troubles):
                envelope = signatures.unseal(signed)
                content = manifests.decode(chain, envelope.content, signed=True)
                said = replace(said, envelope=envelope, signed=content)
        return replace(said, troubles=tuple(troubles))

    def manifest(self, chain: str, deadline: Deadline) -> Manifest | None:
        """What the share says of this chain, whoever wrote it; None if it has no such image. SnapshotterError for one
        that is not whole."""
        said = self.said(chain, deadline)
        return None if said is None else self._first(said)

    def _first(self, said: Said) -> Manifest:
        if not said.manifests:
            why = "; ".join(said.troubles) or "it has no manifest"
            raise SnapshotterError(f"{self.place(said.chain)}: {why}; remove this image and make it again")
        return said.manifests[0]

    def chains(self) -> list[str]:
        """The images that are whole."""
        with os.scandir(self.directory) as entries:
            names = [entry.name for entry in itertools.islice(entries, _MOST_NAMES)]
        return sorted(f"sha256:{name}" for name in names if CHAIN.match(f"sha256:{name}"))

    @contextlib.contextmanager
    def _inside(self, chain: str) -> Iterator[int]:
        """The image's directory, open. FileNotFoundError if there is nothing, SnapshotterError if it is none."""
        try:
            fd = os.open(self.place(chain), _DIRECTORY)
        except OSError as error:
            if error.errno in (errno.ENOTDIR, errno.ELOOP):
                raise SnapshotterError(f"{self.place(chain)} is no directory; remove it") from None
            raise
        try:
            yield fd
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def parts(self, chain: str) -> Iterator[Parts]:
        """The image and its tree, open for reading. FileNotFoundError without them, SnapshotterError for no files."""
        with self._inside(chain) as directory, contextlib.ExitStack() as held:
            fds = []
            for name in (_IMAGE, _HASHES):
                fds.append(_regular(directory, name))
                held.callback(os.close, fds[-1])
            yield Parts(image_fd=fds[0], hashes_fd=fds[1])

    def used(self, chain: str) -> int:
        """Bytes that the image takes on the share."""
        with self.parts(chain) as parts:
            return os.fstat(parts.image_fd).st_blocks * 512

    def check(self, chain: str, progress: Progress | None = None) -> str:
        """Read everything; what is wrong, or nothing. Not who has signed it: that is `trust`'s."""
        said = self._there(chain)
        if not said.manifests or said.troubles:
            return f"{self.place(chain)}: {'; '.join(said.troubles) or 'it has no manifest'}"
        return self._differ(said) or self._wrong(said.manifests[0], progress)

    def _there(self, chain: str) -> Said:
        if not CHAIN.match(chain):
            raise BadRequest("chain id", chain, "is sha256: and 64 hexadecimal digits")
        said = self.said(chain, Deadline.after(PATIENCE))
        if said is None:
            raise NotFound(chain, "image")
        return said

    def differ(self, chain: str) -> str:
        """How the two manifests contradict each other; empty if they do not."""
        return self._differ(self._there(chain))

    def _differ(self, said: Said) -> str:
        both = said.plain is not None and said.signed is not None
        return f"{self.place(said.chain)}: {_PLAIN} and {_SIGNED} differ" if both and said.plain != said.signed else ""

    def _wrong(self, manifest: Manifest, progress: Progress | None) -> str:
        place = self.place(manifest.chain)
        with self._told(f"the image {place} cannot be read"), self.parts(manifest.chain) as parts:
            if lacking := parts.lacks(manifest.size):
                return f"{place}/{lacking}"
            levels, root = verity.tree(
                parts.image, bytes.fromhex(manifest.salt), lambda done: progress and progress("reading", done)
            )  # fmt: skip
            if root != manifest.root:
                return f"{place}/{_IMAGE} is not what it was when the image was made"
            with open(parts.hashes, "rb") as hashes:
                same = all(hashes.read(len(level)) == level for level in reversed(levels))
            return "" if same else f"{place}/{_HASHES} is not what it was when the image was made"

    @contextlib.contextmanager
    def _told(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise Unavailable(f"{what}: {error.strerror or error}") from None

    # -- writing: for the command line alone, as nodes need no more than to read -------------------------------------

    def make(
        self, chain: str, device: str, fstype: str, *, progress: Progress | None = None, key: PrivateKey | None = None
    ) -> Manifest:
        """Copy the filesystem on `device`, which must not change, into the share, with its hash tree, and sign it.

        One that exists is left as it is, which is a success only for one that is whole and, with a `key`, signed by it.
        """
        found = self.present(chain, key)
        if found is not None:
            return found
        self.sweep()
        with self._told(f"the image of {chain} cannot be made in {self.directory}"):
            beside = os.path.join(self.directory, f".{chain[7:]}.{os.urandom(4).hex()}")
            os.mkdir(beside, mode=0o755)
            try:
                made = _write(beside, chain, device, fstype, progress, key)
                first = _renamed(beside, self.place(chain))
            finally:
                shutil.rmtree(beside, ignore_errors=True)
            durable.sync_directory(self.directory)
        found = self.present(chain, key)
        if found is None or (first and found != made):
            raise SnapshotterError(f"the image of {chain} was taken away while it was made; make it again")
        if not first and (wrong := self._wrong(found, progress)):
            raise SnapshotterError(f"somebody else has made the image of {chain} meanwhile: {wrong}; remove it")
        return found

    def present(self, chain: str, key: PrivateKey | None = None) -> Manifest | None:
        """The image if there is one. SnapshotterError for one that is not whole, or not signed by `key`."""
        if not CHAIN.match(chain):
            raise BadRequest("chain id", chain, "is sha256: and 64 hexadecimal digits")
        said = self.said(chain, Deadline.after(PATIENCE))
        if said is None:
            return None
        manifest = self._first(said)
        with self._told(f"the image {self.place(chain)} cannot be read"), self.parts(chain) as parts:
            if lacking := parts.lacks(manifest.size):
                raise SnapshotterError(f"{self.place(chain)}/{lacking}; remove this image and make it again")
        if key is not None and (said.signed is None or not said.envelope or not said.envelope.signer([key.public])):
            raise SnapshotterError(
                f"the image of {chain} is there already, and not signed by the key {key.public.name}. If you trust who "
                f"made it, `runvol images sign {chain} --key FILE`; else remove it and make it again"
            )
        return manifest

    def sign(self, chain: str, key: PrivateKey, progress: Progress | None = None) -> Manifest:
        """Sign an image that is there, after reading all of it: its root must be the manifest's. May be repeated.

        Signatures by other keys on the same content stay. SnapshotterError for one that is not whole.
        """
        said = self._there(chain)
        manifest = self._first(said)
        if wrong := self._differ(said) or self._wrong(manifest, progress):
            raise SnapshotterError(f"the image of {chain} is not signed: {wrong}")
        content, others = manifests.encode_signed(manifest), []
        if said.envelope is not None and said.signed is not None:
            content, others = said.envelope.content, list(said.envelope.signatures)
        with self._told(f"the signature cannot be written to {self.place(chain)}"), self._inside(chain) as directory:
            durable.replace(_SIGNED, signatures.seal(content, key, others), mode=0o644, dir_fd=directory)
            durable.sweep(f"/proc/self/fd/{directory}/{_SIGNED}.")
        return manifest

    def remove(self, chain: str) -> None:
        """It is gone for new containers at once; nodes that have it mapped keep their files until they let go."""
        if not CHAIN.match(chain) or not os.path.lexists(self.place(chain)):
            raise NotFound(chain, "image")
        self.sweep()
        with self._told(f"the image of {chain} cannot be removed from {self.directory}"):
            beside = os.path.join(self.directory, f".{chain[7:]}.{os.urandom(4).hex()}.removed")
            os.rename(self.place(chain), beside)
            durable.sync_directory(self.directory)
            durable.clear(beside)
        if os.path.lexists(beside):
            raise Unavailable(f"the image of {chain} is removed, but its files in {beside} cannot be deleted")

    def sweep(self) -> list[str]:
        """Remove what killed calls have left: at once what was being removed, after a day what was being made."""
        gone, names = [], list[str]()
        with contextlib.suppress(OSError), os.scandir(self.directory) as entries:
            names = [entry.name for entry in itertools.islice(entries, _MOST_NAMES)]
        for name in filter(_LEFT.match, names):
            path = os.path.join(self.directory, name)
            with contextlib.suppress(OSError):  # what cannot be looked at keeps no other
                if name.endswith(".removed") or _last_written(path) < time.time() - _ABANDONED:
                    durable.clear(path)
                    gone.append(name)
        return gone


def _regular(directory: int, name: str) -> int:
    """The file, open for reading. FileNotFoundError, and SnapshotterError for what is no regular file: that is not even
    opened, as a device may do something then."""
    found = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    try:
        if not stat.S_ISREG(os.fstat(found).st_mode):
            raise SnapshotterError(f"{name} is no regular file")
        return os.open(f"/proc/self/fd/{found}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(found)


def _content(directory: int, name: str, troubles: list[str]) -> bytes | None:
    """A manifest's bytes; None if it is not there, or too long to be one."""
    try:
        fd = _regular(directory, name)
    except FileNotFoundError:
        return None
    except SnapshotterError as error:
        troubles.append(str(error))
        return None
    with open(fd, "rb", buffering=0) as opened:
        content = b""
        while len(content) <= _LARGEST_MANIFEST and (more := opened.read(_LARGEST_MANIFEST + 1 - len(content))):
            content += more
    if len(content) > _LARGEST_MANIFEST:
        troubles.append(f"{name} has more than {_LARGEST_MANIFEST} bytes")
        return None
    return content


@contextlib.contextmanager
def _noting(name: str, troubles: list[str]) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        # It may quote what somebody has written there for a terminal to obey.
        quoted = "".join(one if one.isprintable() else "?" for one in str(error))
        troubles.append(f"{name}: {quoted[:_LONGEST_TROUBLE]}")


def _write(
    beside: str, chain: str, device: str, fstype: str, progress: Progress | None, key: PrivateKey | None
) -> Manifest:
    """The image's files. The tree is that of the device: what is read back from the share may be somebody else's."""
    inside = os.open(beside, _DIRECTORY)
    try:
        os.fchmod(inside, 0o755)
        size, salt = ioctls.size_bytes(device), os.urandom(32)
        with _new(inside, _IMAGE) as image:
            os.truncate(image, size)
            sparse.copy_written(device, f"/proc/self/fd/{image}", lambda done: progress and progress("copying", done))
        levels, root = verity.tree(device, salt, lambda done: progress and progress("hashing", done))
        with _new(inside, _HASHES) as hashes:
            for level in reversed(levels):
                durable.write_all(hashes, level)
            os.fsync(hashes)
        made = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        manifest = Manifest(chain=chain, fstype=fstype, size=size, root=root, salt=salt.hex(), made=made)
        if key is not None:
            signed = signatures.seal(manifests.encode_signed(manifest), key)
            durable.write(_SIGNED, signed, mode=0o644, dir_fd=inside)
        durable.write(_PLAIN, manifests.encode(manifest), mode=0o644, dir_fd=inside)
        os.fsync(inside)
    finally:
        os.close(inside)
    return manifest


@contextlib.contextmanager
def _new(directory: int, name: str) -> Iterator[int]:
    fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644, dir_fd=directory)
    try:
        os.fchmod(fd, 0o644)  # nodes may come as nobody, whatever the umask was here
        yield fd
    finally:
        os.close(fd)


def _renamed(beside: str, place: str) -> bool:
    """Whether it stands in its place now; False if somebody was faster."""
    try:
        os.rename(beside, place)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            return False
        raise
    return True


def _last_written(path: str) -> float:
    """When something in the directory was last written, in seconds since 1970."""
    times = [os.lstat(path).st_mtime]
    if os.path.islink(path):
        return times[0]
    with contextlib.suppress(NotADirectoryError), os.scandir(path) as entries:
        times += [entry.stat(follow_symlinks=False).st_mtime for entry in itertools.islice(entries, _MOST_NAMES)]
    return max(times)
