"""What containerd's configuration says of runtime handlers: which are sandboxes, and which shim serves them.

Tables: containerd's docs/cri/config.md.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import glob
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from blockdev import syscalls, toml_files

# runtime_type values whose shims start a virtual machine. gVisor's (runsc) is none.
_SANDBOX_TYPE = re.compile(r"io\.containerd\.(kata|runv|rund)([-.][a-z0-9.-]+)?\.v\d+\Z")
# Those that sound like it, and whose hand-off nobody here knows.
_VM_LIKE = re.compile(r"kuasar|firecracker|hyper|urunc|nabla|unik|qemu|crosvm|vmm|(^|[-._])[a-z]*vm([-._]|\Z)")
CRI_PLUGINS = ("io.containerd.cri.v1.runtime", "io.containerd.grpc.v1.cri", "cri")
_MAX_IMPORTS = 64


@dataclass(frozen=True, kw_only=True)
class Handler:
    """One `runtimes.<name>` table."""

    name: str
    runtime_type: str = ""
    runtime_path: str = ""
    config_path: str = ""
    binary: str = ""
    # Patterns (Go's path.Match) of the pod annotations that containerd passes to the shim.
    pod_annotations: tuple[str, ...] = ()
    snapshotter: str = ""

    @property
    def is_sandbox(self) -> bool:
        return bool(_SANDBOX_TYPE.match(self.runtime_type)) or any("kata" in one for one in self._programs)

    @property
    def _programs(self) -> tuple[str, ...]:
        """The names of what containerd starts: `runtime_type` may be a path too."""
        named = (self.runtime_path, self.runtime_type if "/" in self.runtime_type else "", self.binary)
        return tuple(os.path.basename(one).lower() for one in named if one)

    @property
    def is_unknown(self) -> bool:
        """A runtime that looks as if it starts a virtual machine, and is none that is known to."""
        names = (self.runtime_type, *self._programs)
        return not self.is_sandbox and any(_VM_LIKE.search(name.lower()) for name in names)


@dataclass(frozen=True, kw_only=True)
class ContainerdConfig:
    """The part of a containerd's configuration that decides runtimes. `source`: whose word it is; `running`: that of
    the containerd which runs, whatever its file has become since."""

    handlers: Mapping[str, Handler]
    default_handler: str = "runc"
    source: str = "containerd"
    running: bool = False

    @property
    def has_sandbox(self) -> bool:
        return any(handler.is_sandbox or handler.is_unknown for handler in self.handlers.values())


def tables(path: str, *names: str, root: str = "/") -> list[Mapping[str, Any]]:
    """The table of these names in each of containerd's files, in their order; later ones win. Empty if unreadable."""
    try:
        return [table_of(document, *names) for document in _documents(path, root)]
    except (OSError, ValueError, RecursionError):
        return []


def _documents(path: str, root: str) -> Iterator[Mapping[str, Any]]:
    """`path` and what it imports, breadth first. All are the node's names; one that is not absolute lies beside the
    file that says it."""
    seen: set[str] = set()
    pending = [path]
    while pending and len(seen) <= _MAX_IMPORTS:
        one = pending.pop(0)
        real = os.path.realpath(in_root(one, root))
        if real in seen:
            continue
        seen.add(real)
        document = _parsed(in_root(one, root))
        yield document
        for pattern in _texts(document.get("imports")):
            pending += _named(os.path.join(os.path.dirname(one), pattern), root)


def _named(pattern: str, root: str) -> list[str]:
    place, names = os.path.split(pattern)
    found = in_root(place, root)
    imported = sorted(glob.glob(os.path.join(found if glob.has_magic(place) else glob.escape(found), names)))
    if not glob.has_magic(place):
        return [os.path.join(place, os.path.basename(one)) for one in imported]
    return [f"/{os.path.relpath(one, root)}" for one in imported]


def _parsed(path: str) -> Mapping[str, Any]:
    """Read again where the file was changed. What comes of it is for all who ask, and stays as it is."""
    found = os.stat(path)
    return _parsed_once(path, (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns))


@functools.lru_cache(maxsize=32)
def _parsed_once(path: str, _stamp: tuple[int, ...]) -> Mapping[str, Any]:
    return toml_files.read(path)[1]


def in_root(path: str, root: str) -> str:
    """Where a file of the node's is found whose own root is mounted at `root`: all links lead where the node's do, also
    those of directories on the way. The plain path where there is nothing."""
    if not os.path.isabs(path):
        return path
    plain = os.path.join(root, path.lstrip("/"))
    if root == "/":
        return os.path.realpath(plain)
    with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
        top = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, top)
        found = syscalls.openat2(top, path.lstrip("/") or ".", os.O_PATH, syscalls.RESOLVE_IN_ROOT)
        stack.callback(os.close, found)
        link = os.readlink(f"/proc/self/fd/{found}")
        # In another mount namespace (/proc/<pid>/root) it is told as from there.
        for where in (link, os.path.join(root, link.lstrip("/"))):
            with contextlib.suppress(OSError):
                if os.path.samestat(os.stat(where), os.fstat(found)):
                    return where
    return plain


def _handler(name: str, runtime: Mapping[str, Any]) -> Handler:
    options = table_of(runtime, "options")
    return Handler(
        name=name,
        runtime_type=str(runtime.get("runtime_type", "")),
        runtime_path=str(runtime.get("runtime_path", "")),
        config_path=str(options.get("ConfigPath", "")),
        binary=str(options.get("BinaryName", "")),
        pod_annotations=_texts(runtime.get("pod_annotations")),
        snapshotter=str(runtime.get("snapshotter", "")),
    )


def handlers_of(table: Mapping[str, Any]) -> dict[str, Handler]:
    """Those of one `runtimes` table."""
    return {name: _handler(name, runtime) for name, runtime in table.items() if isinstance(runtime, dict)}


def _texts(value: object) -> tuple[str, ...]:
    return tuple(one for one in value if isinstance(one, str)) if isinstance(value, list) else ()


def table_of(document: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    """The table of these names; an empty one where there is none."""
    for name in names:
        document = document.get(name, {})
        if not isinstance(document, dict):
            return {}
    return document


def matches(handler: str, patterns: Sequence[str]) -> bool:
    """Whether a handler's name is one of an operator's patterns (`kata*`)."""
    return any(fnmatch.fnmatchcase(handler, pattern) for pattern in patterns)
