"""Whether a guest's kernel can mount NFS, from the configuration that lies beside it or in it.

Kata's releases put `config-<version>` beside `vmlinux-<version>`; a kernel with CONFIG_IKCONFIG holds its own, between
the marks of kernel/configs.c. A stock Kata kernel has no NFS and loads no modules.
"""

from __future__ import annotations

import mmap
import os
import re
import zlib
from collections.abc import Mapping

# NFS version to what a kernel needs for it.
NEEDED: Mapping[str, tuple[str, ...]] = {
    "3": ("CONFIG_NFS_FS", "CONFIG_NFS_V3"),
    "4.0": ("CONFIG_NFS_FS", "CONFIG_NFS_V4"),
    "4.1": ("CONFIG_NFS_FS", "CONFIG_NFS_V4", "CONFIG_NFS_V4_1"),
    "4.2": ("CONFIG_NFS_FS", "CONFIG_NFS_V4", "CONFIG_NFS_V4_1", "CONFIG_NFS_V4_2"),
}
_MARK = b"IKCFG_ST"
_SET = re.compile(r"^(CONFIG_NFS_(?:FS|V3|V4|V4_1|V4_2))=(.)", re.MULTILINE)
_LARGEST = 4 << 20


def missing(kernel: str, version: str) -> list[str] | None:
    """The options that this kernel image lacks for an NFS version, modules counted as there: the guest's image may hold
    them. None where nobody can tell."""
    options = _options(kernel)
    return None if options is None else [one for one in NEEDED[version] if one not in options]


def _options(kernel: str) -> dict[str, str] | None:
    text = _beside(kernel) or _inside(kernel)
    return dict(_SET.findall(text)) if text else None


def _beside(kernel: str) -> str:
    real = os.path.realpath(kernel)
    found = re.fullmatch(r"(?:vmlinu[xz]|bzImage|Image)-(.+?)(?:\.container)?", os.path.basename(real))
    if found is None:
        return ""
    path = os.path.join(os.path.dirname(real), f"config-{found[1]}")
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(_LARGEST)
    except OSError:
        return ""


def _inside(kernel: str) -> str:
    try:
        with open(kernel, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as image:
            at = image.find(_MARK)
            if at < 0:
                return ""
            packed = image[at + len(_MARK) : at + len(_MARK) + _LARGEST]
        return zlib.decompressobj(wbits=31).decompress(packed, _LARGEST).decode("utf-8", "replace")
    except (OSError, ValueError, zlib.error):
        return ""
