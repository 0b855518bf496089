"""The configuration that a Kata shim will really read for a handler, and what it makes of block devices.

Search order, drop-ins and defaults: Kata's docs/runtime-configuration.md and its two shims. The Go shim with
`disable_block_device_use = true` skips a direct volume without a word and shares the empty host directory instead.
"""

from __future__ import annotations

import fnmatch
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from blockdev import toml_files
from guestmount.runtimes import Handler, in_root

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
# With which a pod chooses the whole file.
_OTHER = "io.katacontainers.config_path"
# Values of block_device_driver. The Go shim's own check knows these; of the Rust shim's, those that its QEMU plugs in.
_GO_DRIVERS = ("virtio-scsi", "virtio-blk", "virtio-mmio", "nvdimm", "virtio-blk-ccw")
_RUST_DRIVERS = ("virtio-scsi", "virtio-blk-pci")
_RUST_DRIVERS_ELSEWHERE = (*_RUST_DRIVERS, "virtio-blk-mmio", "virtio-blk-ccw", "virtio-pmem")
# Of those, the ones that take a slot of a PCI bridge for each disk; slots of a bridge, and bridges at most.
_PCI_DRIVER = {GO: "virtio-blk", RUST: "virtio-blk-pci"}
_BRIDGE, _BRIDGES = 30, 5
_FIRECRACKER_DRIVES = {GO: 8, RUST: 6}


@dataclass(frozen=True, kw_only=True)
class KataConfig:
    """What decides the fate of a direct volume. `path` is for the error's sentence, `settings` the hypervisor's table.

    `passed`: patterns of the pod annotations that containerd passes to the shim. `trouble`: what keeps the shim from
    starting at all.
    """

    path: str
    shim: str
    hypervisor: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    passed: tuple[str, ...] = ()
    trouble: str = ""
    # The guest's kernel image; empty if the configuration names none.
    kernel: str = ""

    @property
    def table(self) -> str:
        """The table that a setting belongs into."""
        return f"[hypervisor.{self.hypervisor or 'qemu'}]"

    @property
    def disable_block_device_use(self) -> bool:
        """As the files have it."""
        return self._flag("disable_block_device_use", {})

    @property
    def shared_fs(self) -> str:
        """How the shim shares directories, unless a pod's annotation says otherwise."""
        return self.shared_by({})

    def blocks_disabled(self, annotations: Mapping[str, str]) -> bool:
        """Whether this pod's shim will leave block devices alone; a pod's annotation counts if it is enabled."""
        key = "disable_block_device_use"
        if self._annotated(key, annotations) is None and self.shim == GO and self.hypervisor == "firecracker":
            return False
        return self._flag(key, annotations)

    def shared_by(self, annotations: Mapping[str, str]) -> str:
        """How this pod's shim shares directories; a pod's annotation counts if it is enabled."""
        return self._text("shared_fs", annotations) or "virtio-fs"

    def wants_node(self, annotations: Mapping[str, str]) -> bool:
        """Whether the shim takes block nodes only: with cache options the Go shim calls whatever it plugs in one."""
        return self.shim == GO and self._flag("block_device_cache_set", annotations)

    def block_trouble(self, annotations: Mapping[str, str]) -> str:
        """Why the shim plugs in no block device of this pod, in words that name the setting; empty if it does."""
        if self.trouble:
            return self.trouble
        if _OTHER in annotations and any(_matches(_OTHER, pattern) for pattern in self.passed):
            return (
                f"the pod's annotation {_OTHER} names another configuration than {self.path}, which was looked "
                "at; remove it, and give the handler that ConfigPath"
            )
        driver, aio = self._text("block_device_driver", annotations), self._text("block_device_aio", annotations)
        known = self._drivers()
        if driver and driver not in known:
            return (
                f"block_device_driver is {driver!r}, which Kata's {self.shim.capitalize()} shim does not plug in; set "
                f"{' or '.join(known[:2])} in {self.table} of {self.path}"
            )
        if aio == "native" and not self._is_direct(annotations):
            needed = "block_device_cache_direct = true"
            if self.shim == GO:
                needed = f"block_device_cache_set = true and {needed}"
            return (
                f'block_device_aio is "native", which QEMU refuses without direct I/O; set {needed} beside it in '
                f"{self.table} of {self.path}"
            )
        return ""

    def disk_slots(self, annotations: Mapping[str, str]) -> int:
        """How many disks the shim can plug into one guest, root filesystems that are devices among them; 0 where no
        pod comes near it (virtio-scsi: 65,536), or it is not known.

        PCIBridgeMaxCapacity in the Go shim's virtcontainers/types/bridges.go and find_free_slot in runtime-rs's qmp.rs;
        fcDiskPoolSize in fc.go and DISK_POOL_SIZE in fc_api.rs, the drives that a Firecracker is started with.
        """
        if self.hypervisor == "firecracker":
            return _FIRECRACKER_DRIVES[self.shim]
        if self.hypervisor != "qemu" or self._text("block_device_driver", annotations) != _PCI_DRIVER[self.shim]:
            return 0
        if self.shim == RUST and self.settings.get("pcie_root_port"):
            return 0  # newer ones plug disks into those, too
        bridges = self._text("default_bridges", annotations)
        return _BRIDGE * max(1, min(int(bridges), _BRIDGES) if bridges.isascii() and bridges.isdigit() else 1)

    def _drivers(self) -> tuple[str, ...]:
        if self.shim == GO:
            return _GO_DRIVERS
        return _RUST_DRIVERS if self.hypervisor == "qemu" else _RUST_DRIVERS_ELSEWHERE

    def _is_direct(self, annotations: Mapping[str, str]) -> bool:
        direct = self._flag("block_device_cache_direct", annotations)
        return direct and (self.shim == RUST or self._flag("block_device_cache_set", annotations))

    def _flag(self, key: str, annotations: Mapping[str, str]) -> bool:
        value = self._annotated(key, annotations)
        return value.lower() in ("1", "t", "true") if value is not None else self.settings.get(key) is True

    def _text(self, key: str, annotations: Mapping[str, str]) -> str:
        value = self._annotated(key, annotations)
        return value if value is not None else str(self.settings.get(key, ""))

    def _annotated(self, key: str, annotations: Mapping[str, str]) -> str | None:
        """The pod's own word, if containerd passes it on and the configuration enables it; None otherwise."""
        value = annotations.get(_ANNOTATION + key)
        if value is None or not any(_matches(_ANNOTATION + key, pattern) for pattern in self.passed):
            return None
        enabled = self.settings.get("enable_annotations", ())
        return value.strip() if _is_enabled(key, enabled, self.shim) else None


def _matches(name: str, pattern: str) -> bool:
    """As Go's path.Match, for names without a slash."""
    return fnmatch.fnmatchcase(name, pattern.replace("[^", "[!"))


def _is_enabled(key: str, patterns: object, shim: str) -> bool:
    """Regular expressions that match anywhere in the key. A wrong one is passed over by the Go shim; the Rust shim
    then enables nothing."""
    found = False
    for pattern in patterns if isinstance(patterns, list) else ():
        try:
            found = found or re.search(str(pattern), key) is not None
        except re.error:
            if shim == RUST:
                return False
    return found


def read(handler: Handler, *, root: str = "/") -> KataConfig | None:
    """None if no configuration is found; `root` is where the search starts, for tests."""
    shim = shim_of(handler)
    path = _find(handler, shim, root)
    if path is None:
        return None
    try:
        document, trouble = _load(path, root)
    except (OSError, tomllib.TOMLDecodeError):
        return None
    runtime = _table(document, "runtime")
    if runtime.get("name") == "virt_container" or "hypervisor_name" in runtime:
        shim = RUST  # whatever the path is called: only the Rust shim's configuration says so
    elif "runtime-rs" not in path and not handler.runtime_path:
        shim = GO
    hypervisors = _table(document, "hypervisor")
    first = next(iter(hypervisors), "")
    name = str(runtime.get("hypervisor_name", first)) if shim == RUST else first
    settings = _table(hypervisors, name)
    return KataConfig(
        path=path,
        shim=shim,
        hypervisor=name,
        settings=settings,
        passed=handler.pod_annotations,
        trouble=trouble if shim == RUST else "",
        kernel=os.path.join(root, str(settings["kernel"]).lstrip("/")) if settings.get("kernel") else "",
    )


def found(handler: Handler, *, root: str = "/") -> str | None:
    """The file that `read` reads, if there is one."""
    path = _find(handler, shim_of(handler), root)
    return None if path is None else _real(path, root)


def _table(document: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = document.get(name)
    return found if isinstance(found, dict) else {}


def shim_of(handler: Handler) -> str:
    """Which of the two shims a handler starts, as far as its paths tell."""
    rust = "runtime-rs" in handler.runtime_path or "runtime-rs" in handler.config_path
    return RUST if rust else GO


def _find(handler: Handler, shim: str, root: str) -> str | None:
    """The file, as it is called; a drop-in lies beside what that is a link to."""
    candidates = [handler.config_path] if handler.config_path else []
    directories = _RUST_DIRS if shim == RUST else _GO_DIRS
    candidates += [os.path.join(directory, "configuration.toml") for directory in directories]
    for candidate in candidates:
        path = os.path.join(root, candidate.lstrip("/"))
        if os.path.isfile(_real(path, root)):
            return path
    return None


def _real(path: str, root: str) -> str:
    """Where the links of a path lead, below `root`."""
    return in_root(f"/{os.path.relpath(path, root)}", root)


def _load(path: str, root: str) -> tuple[dict[str, Any], str]:
    """The file with its drop-ins, each of them but hidden ones; and what of those stops the Rust shim, in words."""
    real, trouble = _real(path, root), ""
    document = toml_files.read(real)[1]
    place = os.path.join(os.path.dirname(real), "config.d")
    names = sorted(os.listdir(place)) if os.path.isdir(place) else []
    for name in names:
        extra = os.path.join(place, name)
        if name.startswith("."):
            continue
        if os.path.islink(extra) or os.path.isdir(extra):
            trouble = f"Kata's Rust shim does not start with {extra}, which is no regular file; put a copy there"
        if os.path.isdir(extra):
            continue
        _merge(document, toml_files.read(_real(extra, root))[1])
    return document, trouble


def _merge(base: dict[str, Any], extra: dict[str, Any]) -> None:
    for key, value in extra.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            _merge(base[key], value)
        else:
            base[key] = value
