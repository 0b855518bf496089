"""The configuration that a Kata shim will really read for a handler, and what it makes of block devices.

Search order, drop-ins and defaults: Kata's docs/runtime-configuration.md and its two shims. The Go shim with
`disable_block_device_use = true` skips a direct volume without a word and shares the empty host directory instead.
"""

from __future__ import annotations

import glob
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from guestmount.runtimes import Handler

GO, RUST = "go", "rust"
_RUST_DIRS = (
    "/etc/kata-containers/runtime-rs",
    "/usr/share/defaults/kata-containers/runtime-rs",
    "/opt/kata/share/defaults/kata-containers/runtime-rs",
)
_GO_DIRS = (
    "/etc/kata-containers",
    "/usr/share/defaults/kata-containers",
    "/opt/kata/share/defaults/kata-containers",
)
_ANNOTATION = "io.katacontainers.config.hypervisor."


@dataclass(frozen=True, kw_only=True)
class KataConfig:
    """What decides the fate of a direct volume. `path` is for the error's sentence."""

    path: str
    shim: str
    hypervisor: str = ""
    disable_block_device_use: bool = False
    shared_fs: str = "virtio-fs"
    enable_annotations: tuple[str, ...] = ()
    # The guest's kernel image; empty if the configuration names none.
    kernel: str = ""

    def blocks_disabled(self, annotations: Mapping[str, str]) -> bool:
        """Whether this pod's shim will leave block devices alone; a pod's annotation counts if it is enabled."""
        key = "disable_block_device_use"
        value = annotations.get(_ANNOTATION + key)
        if value is not None and any(_allowed(pattern, key) for pattern in self.enable_annotations):
            return value.strip().lower() in ("1", "t", "true")
        if self.shim == GO and self.hypervisor == "firecracker":
            return False
        return self.disable_block_device_use

    def shared_by(self, annotations: Mapping[str, str]) -> str:
        """How this pod's shim shares directories; a pod's annotation counts if it is enabled."""
        key = "shared_fs"
        value = annotations.get(_ANNOTATION + key)
        if value is not None and any(_allowed(pattern, key) for pattern in self.enable_annotations):
            return value.strip()
        return self.shared_fs


def _allowed(pattern: str, key: str) -> bool:
    try:
        return re.fullmatch(pattern, key) is not None
    except re.error:
        return False


def read(handler: Handler, *, root: str = "/") -> KataConfig | None:
    """None if no configuration is found; `root` is where the search starts, for tests."""
    shim = shim_of(handler)
    path = _find(handler, shim, root)
    if path is None:
        return None
    try:
        document = _load(path)
    except (OSError, tomllib.TOMLDecodeError):
        return None
    runtime = document.get("runtime", {})
    if runtime.get("name") == "virt_container" or "hypervisor_name" in runtime:
        shim = RUST  # whatever the path is called: only the Rust shim's configuration says so
    elif "runtime-rs" not in path and not handler.runtime_path:
        shim = GO
    hypervisors: dict[str, dict[str, Any]] = document.get("hypervisor", {})
    first = next(iter(hypervisors), "")
    name = str(runtime.get("hypervisor_name", first)) if shim == RUST else first
    settings = hypervisors.get(name, {})
    return KataConfig(
        path=path,
        shim=shim,
        hypervisor=name,
        disable_block_device_use=bool(settings.get("disable_block_device_use", False)),
        shared_fs=str(settings.get("shared_fs", "virtio-fs")),
        enable_annotations=tuple(map(str, settings.get("enable_annotations", ()))),
        kernel=os.path.join(root, str(settings["kernel"]).lstrip("/")) if settings.get("kernel") else "",
    )


def shim_of(handler: Handler) -> str:
    """Which of the two shims a handler starts, as far as its paths tell."""
    rust = "runtime-rs" in handler.runtime_path or "runtime-rs" in handler.config_path
    return RUST if rust else GO


def _find(handler: Handler, shim: str, root: str) -> str | None:
    candidates = [handler.config_path] if handler.config_path else []
    directories = _RUST_DIRS if shim == RUST else _GO_DIRS
    candidates += [os.path.join(directory, "configuration.toml") for directory in directories]
    for candidate in candidates:
        path = os.path.join(root, candidate.lstrip("/"))
        if os.path.isfile(path):
            return path
    return None


def _load(path: str) -> dict[str, Any]:
    with open(path, "rb") as file:
        document = tomllib.load(file)
    for extra in sorted(glob.glob(os.path.join(os.path.dirname(path), "config.d", "*.toml"))):
        with open(extra, "rb") as file:
            _merge(document, tomllib.load(file))
    return document


def _merge(base: dict[str, Any], extra: dict[str, Any]) -> None:
    for key, value in extra.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            _merge(base[key], value)
        else:
            base[key] = value
