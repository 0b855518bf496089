"""The settings that the demo compares: Kata's defaults and what docs/runtimes.md recommends, for each shim.

Each is a runtime handler of the demo's node, with a configuration as Kata has it, which runvol reads; and the double's
settings, which are the same ones.
"""

from __future__ import annotations

import functools
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.sandbox.shim import GO, RUST

_PLUGIN = 'plugins."io.containerd.cri.v1.runtime".containerd.runtimes'
_SHIMS = {GO: "/opt/kata/bin/containerd-shim-kata-v2", RUST: "/opt/kata/runtime-rs/bin/containerd-shim-kata-v2"}


@dataclass(frozen=True, kw_only=True)
class Setup:
    """One handler. `settings` are keys of `[hypervisor.qemu]`; `plugs`, for the table, what the shim hands to QEMU."""

    handler: str
    shim: str
    name: str
    plugs: str
    settings: dict[str, Any]

    @property
    def double(self) -> dict[str, Any]:
        """As the double takes them."""
        return {
            "shim": self.shim,
            "block_device_driver": self.settings.get("block_device_driver", "virtio-scsi"),
            "aio": self.settings.get("block_device_aio", default_aio()),
            "cache_set": self.settings.get("block_device_cache_set", False),
            "cache_direct": self.settings.get("block_device_cache_direct", False),
            "indep_iothreads": self.settings.get("enable_iothreads", False),
        }


@functools.cache
def default_aio() -> str:
    """Kata's default since 4.0 is io_uring; threads where this machine's QEMU or kernel has none."""
    with tempfile.NamedTemporaryFile() as file:
        file.truncate(1 << 20)
        disk = f"driver=file,filename={file.name},aio=io_uring,node-name=probe"
        tried = subprocess.run(
            ["qemu-system-x86_64", "-M", "none", "-nodefaults", "-display", "none", "-S", "-monitor", "stdio", "-blockdev", disk],
            input=b"quit\n", capture_output=True, timeout=20, check=False,
        )  # fmt: skip
    return "io_uring" if tried.returncode == 0 else "threads"


_FAST = {
    "block_device_aio": "native",
    "block_device_cache_direct": True,
    "enable_iothreads": True,
    "indep_iothreads": 1,
}
RUST_DEFAULT = Setup(handler="kata-rs-default", shim=RUST, name="Rust shim, defaults", plugs="file, virtio-scsi, host cache",
                     settings={})  # fmt: skip
RECOMMENDED = Setup(handler="kata", shim=RUST, name="Rust shim, recommended", plugs="file, virtio-blk-pci, direct",
                    settings={"block_device_driver": "virtio-blk-pci", **_FAST})  # fmt: skip
GO_SHIPPED = Setup(handler="kata-go-shipped", shim=GO, name="Go shim, as shipped", plugs="nothing: refused",
                   settings={"disable_block_device_use": True})  # fmt: skip
GO_DEFAULT = Setup(handler="kata-go-default", shim=GO, name="Go shim, block devices on", plugs="file, virtio-scsi, host cache",
                   settings={"disable_block_device_use": False})  # fmt: skip
GO_RECOMMENDED = Setup(handler="kata-go", shim=GO, name="Go shim, recommended", plugs="loop device, virtio-blk, direct",
                       settings={"disable_block_device_use": False, "block_device_driver": "virtio-blk",
                                 "block_device_cache_set": True, **_FAST})  # fmt: skip
MEASURED = (RUST_DEFAULT, RECOMMENDED, GO_DEFAULT, GO_RECOMMENDED)


def write(containerd: Path, root: Path) -> None:
    """The node's configuration: a handler each."""
    tables = []
    for one in (*MEASURED, GO_SHIPPED):
        path = f"/opt/kata/{one.handler}.toml"
        tables.append(
            f"""[{_PLUGIN}.{one.handler}]
runtime_type = "io.containerd.kata.v2"
runtime_path = "{_SHIMS[one.shim]}"
[{_PLUGIN}.{one.handler}.options]
ConfigPath = "{path}"
"""
        )
        file = root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = [
            f"{key} = {str(value).lower() if isinstance(value, bool) else repr(value)}"
            for key, value in one.settings.items()
        ]
        text = "\n".join(["[hypervisor.qemu]", *lines])
        file.write_text(f"{text}\n[runtime]\n" + ('name = "virt_container"\n' if one.shim == RUST else ""))
    containerd.write_text("".join(tables))
