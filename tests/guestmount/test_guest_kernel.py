"""Whether a guest's kernel can mount NFS: from the configuration beside it, in it, or not known."""

from __future__ import annotations

import gzip
import os

import pytest

from guestmount import Refused, Runtime, guest_kernel, preflight
from guestmount.kata_config import GO, KataConfig

FULL = "CONFIG_NFS_FS=y\nCONFIG_NFS_V3=m\nCONFIG_NFS_V4=y\nCONFIG_NFS_V4_1=y\nCONFIG_NFS_V4_2=y\n"
STOCK = "CONFIG_NET_9P=y\n# CONFIG_NFS_FS is not set\nCONFIG_NFSD_V4=y\n"


@pytest.fixture
def kernel(tmp_path):
    """As Kata's release lays it out: a link, the image, its configuration beside it."""
    image, link = tmp_path / "vmlinux-6.12.47-168", tmp_path / "vmlinux.container"
    image.write_bytes(b"\x7fELF" + b"\0" * 100)
    link.symlink_to(image.name)

    def write(config: str | None, *, inside: bool = False) -> str:
        if config is not None and inside:
            image.write_bytes(
                b"\x7fELF" + os.urandom(5000) + b"IKCFG_ST" + gzip.compress(config.encode()) + b"IKCFG_ED" + b"x" * 99
            )
        elif config is not None:
            (tmp_path / "config-6.12.47-168").write_text(config)
        return str(link)

    return write


@pytest.mark.parametrize("inside", [False, True])
def test_a_kernel_with_nfs_misses_nothing(kernel, inside):
    path = kernel(FULL, inside=inside)
    assert [guest_kernel.missing(path, version) for version in guest_kernel.NEEDED] == [[]] * 4


@pytest.mark.parametrize("inside", [False, True])
def test_a_stock_kernel_misses_all_of_it(kernel, inside):
    path = kernel(STOCK, inside=inside)
    assert guest_kernel.missing(path, "3") == ["CONFIG_NFS_FS", "CONFIG_NFS_V3"]
    assert guest_kernel.missing(path, "4.2") == list(guest_kernel.NEEDED["4.2"])


def test_some_versions_only(kernel):
    path = kernel("CONFIG_NFS_FS=y\nCONFIG_NFS_V4=y\n")
    assert guest_kernel.missing(path, "4.0") == []
    assert guest_kernel.missing(path, "4.1") == ["CONFIG_NFS_V4_1"]


@pytest.mark.parametrize(
    "content", [b"", b"\x7fELF", b"IKCFG_ST", b"IKCFG_ST" + b"\x1f\x8bgarbage" * 9, os.urandom(9999)]
)
def test_what_nobody_can_tell(kernel, tmp_path, content):
    path = kernel(None)
    (tmp_path / "vmlinux-6.12.47-168").write_bytes(content)
    assert guest_kernel.missing(path, "4.1") is None
    assert guest_kernel.missing(str(tmp_path / "nothing"), "4.1") is None


def test_publish_is_refused_in_words_only_where_it_is_certain(kernel):
    def runtime(path: str) -> Runtime:
        return Runtime(kind="sandbox", handler="kata", source="t", dialect="kata",
                       kata=KataConfig(path="/c.toml", shim=GO, kernel=path))  # fmt: skip

    preflight.check_guest_nfs(runtime(kernel(None)), "4.1", pv_name="v")
    preflight.check_guest_nfs(runtime(""), "4.1", pv_name="v")
    with pytest.raises(Refused, match=r"CONFIG_NFS_FS, CONFIG_NFS_V4, CONFIG_NFS_V4_1\. .*inSandbox: share"):
        preflight.check_guest_nfs(runtime(kernel(STOCK)), "4.1", pv_name="v")
    preflight.check_guest_nfs(runtime(kernel(FULL)), "4.1", pv_name="v")
