"""Which shared images a node uses: those that a key of the operator's has signed, those whose root hash is on the
operator's list, and those that it uses already. What lies beside an image proves nothing.

Keys and list are local files, read again when they change, so that keys can be changed without a restart. What cannot
be read trusts nothing, and is told.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from blockdev import durable
from snapshotter import signatures
from snapshotter.manifests import CHAIN, Manifest
from snapshotter.shares import Said
from snapshotter.signatures import PublicKey

_ROOT = re.compile(r"[0-9a-f]{64}\Z")
_LARGEST_LIST = 16 << 20
# Why an image is not used: a metric's labels.
UNSIGNED, UNTRUSTED, REPLACED, DAMAGED = "unsigned", "untrusted", "replaced", "damaged"
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """`manifest` is the one to use, and `by` says on whose word; None, and `why` and `advice` are for a person."""

    manifest: Manifest | None = None
    by: str = ""
    reason: str = ""
    why: str = ""
    advice: str = ""


def pin_of(manifest: Manifest) -> str:
    """What a node remembers of an image that it uses."""
    return json.dumps([manifest.root, manifest.salt, manifest.size])


class Trust:
    """`keys`: files of public keys, or directories whose `*.pub` are; `roots`: the list, a line `CHAIN ROOT` each;
    `unsigned`: whatever the share says is used."""

    def __init__(self, keys: Sequence[str] = (), roots: str = "", *, unsigned: bool = False) -> None:
        self._unsigned = unsigned
        self._keys = _Kept(lambda: _files(keys), _read_keys)
        self._roots = _Kept(lambda: [roots] if roots else [], _read_roots)

    def judge(self, said: Said, pin: str | None = None) -> Verdict:
        """Whether what the share says of a chain may be used by a node that has this pin of it."""
        if pin is not None:
            return self._same(said, pin)
        signer = said.envelope.signer(self._keys.get()[0]) if said.envelope is not None else None
        if signer is not None:
            return Verdict(manifest=said.signed, by=f"signed by {signer.name}")
        listed = self._roots.get()[0].get(said.chain, frozenset())
        for one in said.manifests:
            if one.root in listed:
                return Verdict(manifest=one, by="listed")
        if self._unsigned and said.manifests:
            return Verdict(manifest=said.manifests[0], by="unsigned")
        return _refused(said)

    def _same(self, said: Said, pin: str) -> Verdict:
        for one in said.manifests:
            if pin_of(one) == pin:
                return Verdict(manifest=one, by="used here before")
        if not said.manifests:
            return _refused(said)
        return Verdict(
            reason=REPLACED, why="it is not the one that this node has used before: somebody replaced it",
            advice=f"restore it, or `runvol images forget {said.chain}` on this node if it was made anew",
        )  # fmt: skip

    def troubles(self) -> list[str]:
        """What is wrong with the keys' files and the list, as sentences."""
        return [*self._keys.get()[1], *self._roots.get()[1]]

    def names(self) -> list[str]:
        """The keys that are trusted now."""
        return [key.name for key in self._keys.get()[0]]


def _refused(said: Said) -> Verdict:
    if not said.manifests:
        why = "; ".join(said.troubles) or "it has no manifest"
        return Verdict(reason=DAMAGED, why=why, advice=f"`runvol images remove {said.chain}`, and make it again")
    sign = f"`runvol images sign {said.chain} --key FILE` if you trust who made it"
    if said.envelope is None:
        return Verdict(reason=UNSIGNED, why="it is not signed", advice=sign)
    names = ", ".join(name for name, _ in said.envelope.signatures) or "nobody"
    return Verdict(
        reason=UNTRUSTED, why=f"no key of snapshotter.image_keys has signed it (its signatures name {names[:200]})",
        advice=f"add the public key to snapshotter.image_keys, or {sign}",
    )  # fmt: skip


class _Kept(Generic[T]):
    """What files say, as long as they stay the same."""

    def __init__(
        self, names: Callable[[], Sequence[str]], read: Callable[[Sequence[str]], tuple[T, list[str]]]
    ) -> None:
        self._names, self._read = names, read
        self._lock = threading.Lock()
        self._kept: tuple[object, tuple[T, list[str]]] | None = None

    def get(self) -> tuple[T, list[str]]:
        """It, and what is wrong with the files."""
        names = self._names()
        state = [(name, _state(name)) for name in names]
        with self._lock:
            if self._kept is None or self._kept[0] != state:
                self._kept = state, self._read(names)
            return self._kept[1]


def _state(path: str) -> tuple[int, ...]:
    try:
        facts = os.stat(path)
    except OSError as error:
        return (error.errno or 0,)
    return facts.st_dev, facts.st_ino, facts.st_mode, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns


def _files(keys: Iterable[str]) -> list[str]:
    found: list[str] = []
    for path in keys:
        try:
            found += sorted(os.path.join(path, name) for name in os.listdir(path) if name.endswith(".pub"))
        except OSError:
            # It is a file, or cannot be read as that either.
            found.append(path)
    return found


def _read_keys(paths: Sequence[str]) -> tuple[list[PublicKey], list[str]]:
    found, troubles = [], []
    for path in paths:
        try:
            found.append(signatures.public_key(path))
        except ValueError as error:
            troubles.append(f"snapshotter.image_keys: {path} {error}")
    return found, troubles


def _read_roots(paths: Sequence[str]) -> tuple[Mapping[str, frozenset[str]], list[str]]:
    """A list with one wrong line is not used at all: nobody knows what else is wrong with it."""
    found: dict[str, frozenset[str]] = {}
    for path in paths:
        said = f"snapshotter.image_roots: {path}"
        try:
            if os.stat(path).st_mode & 0o022:
                return {}, [f"{said}: others than its owner can write it; chmod go-w"]
            lines = durable.read(os.path.realpath(path), _LARGEST_LIST).decode("ascii").splitlines()
        except UnicodeDecodeError:
            return {}, [f"{said} is no text"]
        except OSError as error:
            return {}, [f"{said} cannot be read: {error.strerror}"]
        for number, line in enumerate(lines, 1):
            words = line.partition("#")[0].split()
            if not words:
                continue
            if len(words) != 2 or not CHAIN.match(words[0]) or not _ROOT.match(words[1]):
                return {}, [f"{said}, line {number}: takes a chain id and a root hash"]
            found[words[0]] = found.get(words[0], frozenset()) | {words[1]}
    return found, []
