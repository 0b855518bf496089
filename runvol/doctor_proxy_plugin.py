"""`runvol doctor` for containerd's side of the snapshotter: its entry, who uses it, where pulls are unpacked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from guestmount import containerd_version
from guestmount.containerd_files import IMAGES, RUNTIME, File, Version, in_force, load
from guestmount.containerd_places import Taken
from guestmount.errors import Refused
from guestmount.runtimes import CRI_PLUGINS
from runvol import assembly, toml_text
from runvol.config import Config
from runvol.containerd_wish import NAME, TRANSFER, fits, machine
from runvol.diagnosis import Diagnosis, broken, good, warning
from runvol.gauge_place import former_roots, gauge_path

COMMAND = "`runvol snapshotter containerd-config`"
_SUBJECT = "snapshotter in containerd"
# Stands for the file's name in a fix.
_FILE = "FILE"


def entry(config: Config) -> Mapping[str, Any] | None:
    """containerd's entry of the snapshotter; None if there is none, or nobody can read it."""
    try:
        found = document(assembly.places(config).taken(), config.text("paths.host_root"))[1]
    except Refused:
        return None
    plugin: Mapping[str, Any] | None = found.get("proxy_plugins", {}).get(NAME)
    return plugin


def examine(config: Config) -> Iterator[Diagnosis]:
    """Of the files as containerd reads them; what it was started with may be older."""
    taken, root = assembly.places(config).taken(), config.text("paths.host_root")
    path, write = taken.config, writing(taken.config)
    try:
        version, found = document(taken, root)
    except Refused as error:
        yield broken("containerd.config-unreadable", _SUBJECT, f"{path}: {error}")
        return
    plugin = found.get("proxy_plugins", {}).get(NAME)
    if plugin is None:
        yield warning("containerd.proxy-plugin-missing", _SUBJECT, f"{path} has no [proxy_plugins.{NAME}]: containerd "
                      "does not know the snapshotter", write)  # fmt: skip
        return
    said, address = str(plugin.get("address", "")), config.text("snapshotter.endpoint").removeprefix("unix://")
    if said != address:
        yield broken("containerd.proxy-plugin-elsewhere", _SUBJECT, f"proxy_plugins.{NAME}.address is {said!r} in "
                     f"{path}, but the snapshotter listens on {address!r}", write)  # fmt: skip
    else:
        yield good("containerd.proxy-plugin", _SUBJECT, f"{path} has [proxy_plugins.{NAME}] at {address}")
    root, gauge = str(plugin.get("exports", {}).get("root", "")), gauge_path(config)
    if gauge and root in former_roots(config) and root != gauge:
        yield warning("containerd.gauge-elsewhere", _SUBJECT, f"proxy_plugins.{NAME}.exports.root is {root!r} in "
                      f"{path}, and what shows the pool's fill is {gauge!r}", write)  # fmt: skip
    users = sorted(_users(found))
    if users:
        yield good("containerd.handlers-on-snapshotter", "runtimes on it", ", ".join(users))
    else:
        yield warning("containerd.no-handler-on-snapshotter", "runtimes on it", f"none has snapshotter = {NAME!r} in "
                      f"{path}", write)  # fmt: skip
    for finding, line in _discarding(found):
        yield broken("containerd.layers-discarded", _SUBJECT, f"{path}: {finding}", line.replace(_FILE, path))
    if version.merges:
        for one in _platforms(found):
            yield warning(one[0], _SUBJECT, f"{path}: {one[1]}", one[2].replace(_FILE, path) or write)


def writing(path: str) -> str:
    """The fix of most of it."""
    return f"`runvol snapshotter containerd-config --write --config {path}`, then restart containerd"


def document(taken: Taken, root: str) -> tuple[Version, Mapping[str, Any]]:
    try:
        version = containerd_version.detect(taken, root)
    except Refused:
        version, files = _by_form(taken.config, root)
    else:
        files = load(taken.config, version, root)
    return version, in_force(files, version)


def _by_form(path: str, root: str) -> tuple[Version, list[File]]:
    """Of a containerd that does not tell its version: only 2.x reads the newer forms."""
    newer = Version(major=2, minor=4)
    files = load(path, newer, root)
    if not files or files[0].form >= 3:
        return newer, files
    older = Version(major=1, minor=7)
    return older, load(path, older, root)


def _users(document: Mapping[str, Any]) -> Iterator[str]:
    plugins = document.get("plugins", {})
    for plugin in CRI_PLUGINS:
        table = plugins.get(plugin, {}).get("containerd", {})
        if table.get("snapshotter") == NAME:
            yield "every runtime"
        for name, runtime in table.get("runtimes", {}).items():
            if isinstance(runtime, dict) and runtime.get("snapshotter") == NAME:
                yield str(name)
    if plugins.get(IMAGES, {}).get("snapshotter") == NAME:
        yield "every runtime"


def _discarding(document: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Finding and fix, in which the file's name is still missing."""
    plugins = document.get("plugins", {})
    for path in ((IMAGES,), *((plugin, "containerd") for plugin in CRI_PLUGINS if plugin != RUNTIME)):
        table: Any = plugins
        for one in path:
            table = table.get(one, {}) if isinstance(table, dict) else {}
        if isinstance(table, dict) and table.get("discard_unpacked_layers"):
            name = toml_text.name(("plugins", *path))
            yield (f"{name}.discard_unpacked_layers is true: an image that is there for one snapshotter cannot be "
                   "unpacked into another any more",
                   f"set `discard_unpacked_layers = false` in [{name}] of {_FILE}; restart containerd")  # fmt: skip


def _platforms(document: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Where pulls are unpacked at once, and whether that is for this machine: id, finding, and a fix if it is not the
    usual one."""
    here, plugins = machine(), document.get("plugins", {})
    for handler, one in plugins.get(IMAGES, {}).get("runtime_platforms", {}).items():
        if not fits(one.get("platform"), here):
            name, table = toml_text.name((handler,)), toml_text.name(("plugins", IMAGES, "runtime_platforms", handler))
            yield ("containerd.platform-wrong", f"runtime_platforms.{name}.platform is {one['platform']!r}, and this "
                   f"machine is {here}: its pods get images of the other",
                   f'set `platform = "{here}"` in [{table}] of {_FILE}, then restart containerd')  # fmt: skip
    unpack, entries = "containerd.unpack-wrong", plugins.get(TRANSFER, {}).get("unpack_config")
    if entries is not None and not (isinstance(entries, list) and all(isinstance(one, dict) for one in entries)):
        yield unpack, f"{toml_text.name(('plugins', TRANSFER, 'unpack_config'))} is no list of tables", ""
        return
    late = "layers are unpacked inside CreateContainer"
    if entries is None:
        yield unpack, f"has no unpack_config for {NAME}: {late}", ""
        return
    ours = [one.get("platform") for one in entries if one.get("snapshotter") == NAME]
    if not any(fits(one, here) for one in ours):
        said = f"is for {', '.join(map(repr, ours))}, and this machine is {here}" if ours else "is missing"
        yield unpack, f"the unpack_config of {NAME} {said}: {late}", ""
    others = [one.get("platform") for one in entries if one.get("snapshotter") != NAME]
    if not any(fits(one, here) for one in others):
        yield (unpack, f"unpack_config has no entry for {here} but {NAME}'s, and naming one replaces containerd's: "
               "pulls for runc are not unpacked at once", "add an entry with the snapshotter that runc has, "
               "overlayfs; restart containerd")  # fmt: skip
