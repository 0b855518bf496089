"""What containerd's configuration says of runtime handlers: which are sandboxes, and which shim serves them.

Tables: containerd's docs/cri/config.md; `imports` are followed as containerd does, later files win.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import glob
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from blockdev import syscalls

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


def read_containerd(path: str, root: str = "/") -> ContainerdConfig | None:
    """None if the file does not exist or is not TOML: then nothing is known, which is not the same as no sandbox.
    `root`: where the node's own root is, which all paths begin at."""
    try:
        documents = list(_documents(path, set(), root))
    except (OSError, ValueError, RecursionError):
        return None
    handlers: dict[str, Handler] = {}
    default, older = "runc", False
    for document in documents:
        for plugin in CRI_PLUGINS:
            table = _table(document, "plugins", plugin, "containerd")
            default = str(table.get("default_runtime_name") or default)
            for name, runtime in _table(table, "runtimes").items():
                if isinstance(runtime, dict):
                    handlers[name] = _handler(name, runtime)
            untrusted, unnamed = _table(table, "untrusted_workload_runtime"), _table(table, "default_runtime")
            if untrusted:
                handlers["untrusted"] = _handler("untrusted", untrusted)
            if unnamed.get("runtime_type"):  # up to 1.7, which goes by it whatever default_runtime_name says
                handlers["default"], older = _handler("default", unnamed), True
    return ContainerdConfig(handlers=handlers, default_handler="default" if older else default, source=path)


def tables(path: str, *names: str, root: str = "/") -> list[Mapping[str, Any]]:
    """The table of these names in each of containerd's files, in their order; later ones win. Empty if unreadable."""
    try:
        return [_table(document, *names) for document in _documents(path, set(), root)]
    except (OSError, ValueError, RecursionError):
        return []


def _documents(path: str, seen: set[str], root: str) -> Iterator[Mapping[str, Any]]:
    """`path` and what it imports are the node's names; one that is not absolute lies beside the file that says it."""
    real = os.path.realpath(in_root(path, root))
    if real in seen or len(seen) > _MAX_IMPORTS:
        return
    seen.add(real)
    document = _parsed(in_root(path, root))
    yield document
    for pattern in _texts(document.get("imports")):
        place, names = os.path.split(os.path.join(os.path.dirname(path), pattern))
        found = in_root(place, root)
        for imported in sorted(glob.glob(os.path.join(found if glob.has_magic(place) else glob.escape(found), names))):
            beside = f"/{os.path.relpath(os.path.dirname(imported), root)}" if glob.has_magic(place) else place
            yield from _documents(os.path.join(beside, os.path.basename(imported)), seen, root)


def _parsed(path: str) -> Mapping[str, Any]:
    """Read again where the file was changed. What comes of it is for all who ask, and stays as it is."""
    found = os.stat(path)
    return _parsed_once(path, (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns))


@functools.lru_cache(maxsize=32)
def _parsed_once(path: str, _stamp: tuple[int, ...]) -> Mapping[str, Any]:
    with open(path, "rb") as file:
        return tomllib.load(file)


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
    options = _table(runtime, "options")
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


def _table(document: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    for name in names:
        document = document.get(name, {})
        if not isinstance(document, dict):
            return {}
    return document


def matches(handler: str, patterns: Sequence[str]) -> bool:
    """Whether a handler's name is one of an operator's patterns (`kata*`)."""
    return any(fnmatch.fnmatchcase(handler, pattern) for pattern in patterns)
