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
from runvol.diagnosis import BROKEN, OK, WARNING, Diagnosis
from runvol.gauge_place import former_roots, gauge_path

COMMAND = "`runvol snapshotter containerd-config`"


def entry(config: Config) -> Mapping[str, Any] | None:
    """containerd's entry of the snapshotter; None if there is none, or nobody can read it."""
    try:
        found = _document(assembly.places(config).taken(), config.text("paths.host_root"))[1]
    except Refused:
        return None
    plugin: Mapping[str, Any] | None = found.get("proxy_plugins", {}).get(NAME)
    return plugin


def examine(config: Config) -> Iterator[Diagnosis]:
    """Of the files as containerd reads them; what it was started with may be older."""
    taken, root = assembly.places(config).taken(), config.text("paths.host_root")
    path = taken.config
    try:
        version, document = _document(taken, root)
    except Refused as error:
        yield Diagnosis(state=BROKEN, subject=path, finding=str(error))
        return
    plugin = document.get("proxy_plugins", {}).get(NAME)
    if plugin is None:
        yield Diagnosis(state=WARNING, subject=path, finding=f"has no [proxy_plugins.{NAME}]: containerd does not "
                        f"know the snapshotter; {COMMAND} prints or writes the file that does")  # fmt: skip
        return
    said, address = str(plugin.get("address", "")), config.text("snapshotter.endpoint").removeprefix("unix://")
    if said != address:
        yield Diagnosis(state=BROKEN, subject=path, finding=f"proxy_plugins.{NAME}.address is {said!r}, but the "
                        f"snapshotter listens on {address!r}; {COMMAND} puts it right")  # fmt: skip
    root, gauge = str(plugin.get("exports", {}).get("root", "")), gauge_path(config)
    if gauge and root in former_roots(config) and root != gauge:
        yield Diagnosis(state=WARNING, subject=path, finding=f"proxy_plugins.{NAME}.exports.root is {root!r}, and what "
                        f"shows the pool's fill is {gauge!r}; {COMMAND} puts it right")  # fmt: skip
    users = sorted(_users(document))
    nobody = f"none: {COMMAND} sets snapshotter = {NAME!r} in the tables of runtimes"
    yield Diagnosis(state=OK if users else WARNING, subject="runtimes on it", finding=", ".join(users) or nobody)
    for finding in _discarding(document):
        yield Diagnosis(state=BROKEN, subject=path, finding=finding)
    if version.merges:
        for finding in _platforms(document):
            yield Diagnosis(state=WARNING, subject=path, finding=finding)


def _document(taken: Taken, root: str) -> tuple[Version, Mapping[str, Any]]:
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


def _discarding(document: Mapping[str, Any]) -> Iterator[str]:
    plugins = document.get("plugins", {})
    for path in ((IMAGES,), *((plugin, "containerd") for plugin in CRI_PLUGINS if plugin != RUNTIME)):
        table: Any = plugins
        for one in path:
            table = table.get(one, {}) if isinstance(table, dict) else {}
        if isinstance(table, dict) and table.get("discard_unpacked_layers"):
            yield (f"{toml_text.name(('plugins', *path))}.discard_unpacked_layers is true: an image that is there for "
                   "one snapshotter cannot be unpacked into another any more; set it to false")  # fmt: skip


def _platforms(document: Mapping[str, Any]) -> Iterator[str]:
    """Where pulls are unpacked at once, and whether that is for this machine."""
    here, plugins = machine(), document.get("plugins", {})
    for handler, one in plugins.get(IMAGES, {}).get("runtime_platforms", {}).items():
        if not fits(one.get("platform"), here):
            yield (f"runtime_platforms.{toml_text.name((handler,))}.platform is {one['platform']!r}, and this machine "
                   f"is {here}: its pods get images of the other; take the line out")  # fmt: skip
    entries = plugins.get(TRANSFER, {}).get("unpack_config")
    if entries is not None and not (isinstance(entries, list) and all(isinstance(one, dict) for one in entries)):
        yield f"{toml_text.name(('plugins', TRANSFER, 'unpack_config'))} is no list of tables"
        return
    if entries is None:
        yield f"has no unpack_config for {NAME}: layers are unpacked inside CreateContainer; {COMMAND} puts one in"
        return
    ours = [one.get("platform") for one in entries if one.get("snapshotter") == NAME]
    if not any(fits(one, here) for one in ours):
        said = f"is for {', '.join(map(repr, ours))}, and this machine is {here}" if ours else "is missing"
        yield f"the unpack_config of {NAME} {said}: layers are unpacked inside CreateContainer; {COMMAND} puts it right"
    others = [one.get("platform") for one in entries if one.get("snapshotter") != NAME]
    if not any(fits(one, here) for one in others):
        yield (f"unpack_config has no entry for {here} but {NAME}'s, and naming one replaces containerd's own: pulls "
               "for runc are not unpacked at once; add one with the snapshotter that runc has (overlayfs)")  # fmt: skip
