"""Broken installations: each is found, named, put right by what doctor says, and found good.

The rest is in `test_broken_volumes`, `test_broken_cluster`, and with pools in the kernel tier.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import pytest

from blockdev import Deadline
from guestmount import Claim, Target
from guestmount.claims import Use
from runvol import assembly
from runvol.diagnosis import OK
from snapshotter import backing
from tests.installation import Installation
from volumes import VolumeKind

RUST = '[runtime]\nname = "virt_container"\nhypervisor_name = "qemu"\n[hypervisor.qemu]\n'
GO = "[hypervisor.qemu]\n"
ENTRY = '[proxy_plugins.runvol]\ntype = "snapshot"\naddress = "{}"\n'
OTHER = "linux/s390x"
NFS_KERNEL = "CONFIG_NFS_FS=y\nCONFIG_NFS_V4=y\n"


@dataclass(frozen=True, kw_only=True)
class Broken:
    """`given`: what the fix leaves open; `by_hand`: what is done of a fix that nobody can type, which must have these
    words."""

    id: str
    breaks: Callable[[Installation], object]
    given: Mapping[str, str] = field(default_factory=dict)
    words: str = ""
    by_hand: Callable[[Installation], object] | None = None


def found_and_put_right(it: Installation, one: Broken) -> None:
    assert not [each for each in it.look() if each.id == one.id and each.state != OK]
    one.breaks(it)
    found = it.ill(one.id)
    assert found, [(each.id, each.finding) for each in it.look() if each.state != OK]
    assert all(one.words in each.fix for each in found), found
    done = 0
    for each in found:
        if one.by_hand is not None:
            one.by_hand(it)
            done += 1
        else:
            done += it.apply(each.fix, {name: value.format(it=it) for name, value in one.given.items()})
    assert done, found
    assert not it.ill(one.id), it.ill(one.id)


def kata(text: str) -> Callable[[Installation], object]:
    return lambda it: it.handler(kata=text)


def _drop_in(it: Installation) -> None:
    it.handler(kata=RUST)
    it.write("etc/kata-containers/elsewhere.toml", RUST)
    place = it.write("etc/kata-containers/config.d/10-more.toml", "")
    place.unlink()
    place.symlink_to("../elsewhere.toml")


def _copy(it: Installation) -> None:
    place = it.root / "etc/kata-containers/config.d/10-more.toml"
    place.unlink()
    it.write("etc/kata-containers/config.d/10-more.toml", RUST)


def _guests(it: Installation, options: str | None) -> None:
    it.handler(kata=GO + 'kernel = "/opt/kata/share/vmlinux-6.12.47"\n')
    it.write("opt/kata/share/vmlinux-6.12.47", "ELF")
    if options is not None:
        it.write("opt/kata/share/config-6.12.47", options)


def _nri(text: str) -> Callable[[Installation], None]:
    def breaks(it: Installation) -> None:
        _guests(it, NFS_KERNEL)
        with it.containerd.open("a") as file:
            file.write(f'[plugins."io.containerd.nri.v1.nri"]\n{text.format(it=it)}')

    return breaks


def snapshotter(more: str = "", address: str = "", kata: bool = True) -> Callable[[Installation], None]:
    """A pool is described, so containerd's file has to have the snapshotter."""

    def breaks(it: Installation) -> None:
        pool = it.state / "snapshotter"
        backing.save(str(pool), backing.Description(
            name="pool", identity="0" * 16, kind="loop", data=f"{pool}/data", metadata=f"{pool}/metadata",
            metadata_bytes=1 << 20, block=65536,
        ))  # fmt: skip
        it.handler(**({"snapshotter": "runvol"} if kata else {}))
        with it.containerd.open("a") as file:
            if address != "none":
                file.write(ENTRY.format(address or f"{it.run}/snapshotter.sock"))
            file.write(more)
        it.set(snapshotter__endpoint=f"unix://{it.run}/snapshotter.sock")

    return breaks


IMAGES = '[plugins."io.containerd.cri.v1.images"]\n'
FILES = (
    Broken(id="kata.block-devices-disabled", breaks=kata(GO + "disable_block_device_use = true\n")),
    Broken(id="kata.block-devices-disabled", breaks=kata(RUST + "disable_block_device_use = true\n")),
    Broken(id="kata.block-driver-wrong", breaks=kata(GO + 'block_device_driver = "virtio-9p"\n')),
    Broken(id="kata.block-driver-wrong", breaks=kata(RUST + 'block_device_driver = "virtio-mmio"\n')),
    Broken(id="kata.aio-without-direct", breaks=kata(GO + 'block_device_aio = "native"\n')),
    Broken(id="kata.aio-without-direct", breaks=kata(RUST + 'block_device_aio = "native"\n')),
    Broken(id="kata.no-shared-directories", breaks=kata(GO + 'shared_fs = "virtio-9p"\n')),
    Broken(id="kata.no-shared-directories", breaks=kata(RUST + 'shared_fs = "none"\n')),
    Broken(id="kata.queues-wrong", breaks=kata(RUST + "queue_size = 100\n")),
    Broken(id="kata.queues-wrong", breaks=kata(RUST + "num_queues = 5000\n")),
    Broken(id="kata.drop-in-refused", breaks=_drop_in, by_hand=_copy, words="put a copy there"),
    Broken(id="kata.config-unreadable", breaks=kata("[hypervisor"), words="repair",
           by_hand=lambda it: it.write("etc/kata-containers/kata.toml", GO)),
    Broken(id="kata.config-missing", breaks=lambda it: it.handler().unlink(), words="ConfigPath",
           by_hand=lambda it: it.write("etc/kata-containers/kata.toml", GO)),
    Broken(id="kata.shim-missing", words="runtime_path",
           breaks=lambda it: (it.handler(), (it.root / "opt/kata/bin/containerd-shim-kata-v2").unlink()),
           by_hand=lambda it: it.write("opt/kata/bin/containerd-shim-kata-v2", "")),
    Broken(id="kata.shared-block-not-refused", given={"detect.kubeconfig": '"in-cluster"'}, breaks=kata(RUST)),
    Broken(id="kata.shared-block-not-refused", breaks=lambda it: (
        it.handler(kata=RUST), it.set(kata__rust_shared_block="allow", detect__kubeconfig="in-cluster"))),
    Broken(id="kata.guest-nfs-unknown", breaks=lambda it: _guests(it, None), words="config-VERSION",
           by_hand=lambda it: it.write("opt/kata/share/config-6.12.47", NFS_KERNEL)),
    Broken(id="kata.guest-nfs-missing", breaks=lambda it: _guests(it, "# CONFIG_NFS_FS is not set\n"),
           words="a guest kernel that has them", by_hand=lambda it: it.write("opt/kata/share/config-6.12.47", NFS_KERNEL)),
    Broken(id="containerd.nri-disabled", breaks=_nri("disable = true\n")),
    Broken(id="containerd.nri-socket-elsewhere", breaks=_nri('socket_path = "{it.root}/nri.sock"\n')),
    Broken(id="containerd.proxy-plugin-missing", breaks=snapshotter(address="none")),
    Broken(id="containerd.proxy-plugin-elsewhere", breaks=snapshotter(address="/run/other.sock")),
    Broken(id="containerd.no-handler-on-snapshotter", breaks=snapshotter(kata=False)),
    Broken(id="containerd.layers-discarded", breaks=snapshotter(IMAGES + "discard_unpacked_layers = true\n")),
    Broken(id="containerd.unpack-wrong", breaks=snapshotter()),
    Broken(id="containerd.platform-wrong", breaks=snapshotter(
        f'[plugins."io.containerd.cri.v1.images".runtime_platforms.kata]\nplatform = "{OTHER}"\n')),
    Broken(id="containerd.config-unreadable", breaks=lambda it: (snapshotter()(it), it.write(
        "etc/containerd/config.toml", "version = [\n")), words="repair",
        by_hand=lambda it: it.write("etc/containerd/config.toml", "version = 3\n")),
    Broken(id="containerd.not-found", breaks=lambda it: it.set(paths__containerd_config=f"{it.root}/none.toml"),
           given={"paths.containerd_config": '"{it.containerd}"'}),
)  # fmt: skip


@pytest.mark.parametrize("one", FILES, ids=[f"{one.id}-{number}" for number, one in enumerate(FILES)])
def test_configuration(one: Broken) -> None:
    with Installation() as it:
        if one.id == "containerd.not-found":
            it.handler()
        found_and_put_right(it, one)


def _pod_with(it: Installation, count: int, *, handler: str = "kata", pod: str = "a") -> None:
    claims = assembly.claims(it.loaded)
    for number in range(count):
        path = it.kubelet / f"pods/{pod}/volumes/kubernetes.io~csi/v{number}/mount"
        claim = Claim(
            volume=f"loop-{pod}{number}", source="/x", staging_path="/s", kind=VolumeKind.BLOCK,
            use=Use(mode="single_node_writer", fstype="ext4"),
            targets={str(path): Target(read_only=False, pod_uid=pod, pod_name=pod, pod_namespace="ns", handler=handler)},
        )  # fmt: skip
        with claims.locked(claim.volume, Deadline.after(5)) as cell:
            cell.write(claim)


def test_guest_without_a_place_for_one_more_disk() -> None:
    with Installation() as it:
        it.handler(kata=f'{GO}block_device_driver = "virtio-blk"\n')
        (found,) = it.ill("kata.disk-places")
        assert found.finding == "a guest has places for 30 disks, and no pod has a block volume"
        _pod_with(it, 3)
        _pod_with(it, 7, pod="b")
        _pod_with(it, 35, handler="runc", pod="others")
        (found,) = it.ill("kata.disk-places")
        assert "the fullest, of pod ns/b, has 7 block volumes: 23 are left" in found.finding
        found_and_put_right(it, Broken(id="kata.disk-places-used-up", breaks=lambda it: _pod_with(it, 30)))
        assert not it.ill("kata.disk-places")
