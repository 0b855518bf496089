"""What cannot work for a pod, said in words before anything is handed over."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence

from guestmount import guest_kernel
from guestmount.claims import SANDBOX
from guestmount.detect import Runtime
from guestmount.errors import Refused
from guestmount.kata_config import RUST
from guestmount.pods import MountFacts, PodFacts

log = logging.getLogger("runvol.preflight")


def check(runtime: Runtime, *, pv_name: str, read_only: bool = False, rust_shared_block: bool = False) -> None:
    """Refused, naming the setting or the container, if this sandbox cannot have a filesystem of its own.

    Where only the handler is known, the pod's mounts cannot be looked at; the read-only placeholder then turns a
    subPath into an error in the pod instead of a silent write to the host's disk. `read_only`: nobody can write to
    the volume. `rust_shared_block`: several containers may, although the Rust shim loses data by it.
    """
    config = runtime.kata
    if config is not None and config.blocks_disabled(annotations_of(runtime)):
        raise Refused(
            f"the runtime handler {runtime.handler!r} ignores block devices: disable_block_device_use is true in "
            f"{config.path}. Set it to false in {config.table}; until then its "
            + ("containers fail" if config.shim == RUST else "pods would write to the host's disk")
        )
    _check_plugged(runtime)
    check_users(runtime)
    check_mounts(runtime, pv_name=pv_name)
    if config is not None and config.shim == RUST:
        _check_rust(runtime, pv_name=pv_name, shared=read_only or rust_shared_block)


def check_raw(runtime: Runtime) -> None:
    """Refused, naming the setting, if this sandbox plugs in no device node at all."""
    config = runtime.kata
    if config is not None and config.shim == RUST and config.blocks_disabled(annotations_of(runtime)):
        raise Refused(
            f"the runtime handler {runtime.handler!r} takes no block devices: disable_block_device_use is true in "
            f"{config.path}. Set it to false in {config.table}; until then its containers fail"
        )
    _check_plugged(runtime)
    check_users(runtime)


def _check_plugged(runtime: Runtime) -> None:
    if runtime.kata is not None and (why := runtime.kata.block_trouble(annotations_of(runtime))):
        raise Refused(f"the containers of the runtime handler {runtime.handler!r} would fail: {why}")


def annotations_of(runtime: Runtime) -> Mapping[str, str]:
    """The pod's, if it is known."""
    return runtime.pod.annotations if runtime.pod is not None else {}


def check_mounts(runtime: Runtime, *, pv_name: str) -> None:
    """Refused, naming the container, if it mounts a volume that only the guest has in a way that needs the host."""
    if runtime.pod is None:
        log.warning("pod not known: its mounts were not checked", extra={"handler": runtime.handler, "volume": pv_name})
        return
    for mount in _mounts_of_claims(runtime.pod):
        if mount.sub_path:
            raise Refused(
                f"container {mount.container!r} mounts volume {mount.volume!r} with subPath {mount.sub_path!r}: the "
                "host would have to mount the volume for that, but it belongs to the guest. Mount the whole volume"
            )
        if mount.propagation not in ("", "None"):
            raise Refused(
                f"container {mount.container!r} asks for mountPropagation {mount.propagation} on volume "
                f"{mount.volume!r}; mounts do not propagate out of a guest. Remove mountPropagation"
            )


def check_users(runtime: Runtime) -> None:
    """Refused for a sandboxed pod that wants a user namespace of the host's as well.

    No shim of Kata's, nor its agent, maps the owners of a volume's files for one, and kubelet starts no such pod: their
    runtimes do not say that they can.
    """
    if runtime.kind == SANDBOX and runtime.pod is not None and not runtime.pod.host_users:
        raise Refused(
            f"the pod has hostUsers: false under the runtime handler {runtime.handler!r}, whose pods run in a guest "
            "with users of its own: nothing would map the owners of a volume's files. Remove hostUsers from the pod, "
            "whose users are none of the host's already"
        )


def unmapped(volume: str, what: str) -> str:
    """The sentence for a volume that a pod with a user namespace cannot have. `what`: what it is, and who fails."""
    return (
        f"volume {volume} is {what} cannot map the owners of its files, as a pod with hostUsers: false needs it "
        "(idmapped mounts): its containers would not start. Remove hostUsers from the pod, or use a volume of the "
        "backend loop"
    )


def check_guest_nfs(runtime: Runtime, version: str, *, pv_name: str) -> None:
    """Refused, naming what is missing, if the guest's kernel certainly cannot mount this version of NFS."""
    config = runtime.kata
    if config is None or not config.kernel:
        return
    missing = guest_kernel.missing(config.kernel, version)
    if missing:
        raise Refused(
            f"volume {pv_name}: the guest's kernel of the runtime handler {runtime.handler!r} ({config.kernel}) cannot "
            f"mount NFS {version}: it has no {', '.join(missing)}. Build it with them, or set inSandbox: share in the "
            "StorageClass, which shares a mount of the host"
        )


# Values of Kata's `shared_fs` that are virtio-fs, whoever serves it.
_VIRTIO_FS = frozenset({"virtio-fs", "virtio-fs-nydus", "inline-virtio-fs"})


def shares_by_virtio_fs(shared_fs: str) -> bool:
    """Whether this value of Kata's `shared_fs` shares the host's directories, and not by 9p."""
    return shared_fs in _VIRTIO_FS


def check_share(runtime: Runtime, *, pv_name: str) -> None:
    """Refused, naming the setting, if a directory of the host would not reach this sandbox by virtio-fs."""
    config = runtime.kata
    if config is None:
        log.warning("the runtime's configuration was not found: how it shares directories is not known",
                    extra={"handler": runtime.handler, "volume": pv_name})  # fmt: skip
        return
    shared_fs = config.shared_by(annotations_of(runtime))
    if not shares_by_virtio_fs(shared_fs):
        how = (
            "does not share the host's directories"
            if shared_fs == "none"
            else f"shares directories through {shared_fs}"
        )
        raise Refused(
            f"the runtime handler {runtime.handler!r} {how}: shared_fs is {shared_fs!r} in {config.path}. Set it to "
            f'"virtio-fs" in {config.table}, or use a volume of the backend loop'
        )


def _mounts_of_claims(pod: PodFacts) -> list[MountFacts]:
    """Those of the volume in question. Where the pod's names of it are not known, those of the only volume that it can
    be, else none: others are other drivers'."""
    own = pod.own
    if own is None:
        own = frozenset(pod.disks) if len(set(pod.disks.values())) == 1 else frozenset()
    return [mount for mount in pod.mounts if mount.volume in own]


def _check_rust(runtime: Runtime, *, pv_name: str, shared: bool) -> None:
    """What the Rust shim cannot do with a block volume; NFS, which the guest mounts, knows none of it."""
    if runtime.pod is None:
        log.warning("pod not known: whether several containers write to its volume was not checked; Kata's Rust shim "
                    "loses data by it", extra={"handler": runtime.handler, "volume": pv_name})  # fmt: skip
        return
    mounts = _mounts_of_claims(runtime.pod)
    _refuse_mixed(runtime.pod, mounts)
    _refuse_under_dev(mounts)
    if not shared:
        _refuse_several_writers(runtime)


def _refuse_under_dev(mounts: list[MountFacts]) -> None:
    """The Rust shim takes what begins with /dev for a device node and has its agent bind the disk, which fails."""
    for mount in mounts:
        if mount.path.startswith("/dev"):
            raise Refused(
                f"container {mount.container!r} mounts volume {mount.volume!r} at {mount.path!r}; Kata's Rust shim "
                "takes what begins with /dev for a device node. Use another mountPath"
            )


def _at_once(mounts: Sequence[MountFacts]) -> Iterator[tuple[MountFacts, MountFacts]]:
    """Pairs of mounts that may exist at the same time: not those of a container that ends before the other starts."""
    for one, other in itertools.combinations(mounts, 2):
        if one.container == other.container or not one.ends:
            yield one, other


def _refuse_mixed(pod: PodFacts, mounts: Sequence[MountFacts]) -> None:
    """The Rust shim mounts the device once a container; read-only after read-write is EBUSY in the guest."""
    for one, other in _at_once(mounts):
        if pod.claims.get(one.volume) == pod.claims.get(other.volume) and one.read_only != other.read_only:
            raise Refused(
                f"containers {one.container!r} and {other.container!r} mount volume {one.volume!r} read-only and "
                "read-write; Kata's Rust shim cannot mix them. Use one readOnly value for all containers"
            )


def _refuse_several_writers(runtime: Runtime) -> None:
    """The Rust shim forgets a device with the first of its containers that ends, and plugs it in again for the next.

    The guest then has two disks on one file, each with a page cache of its own. (`try_remove_device` in
    hypervisor/src/device/device_manager.rs drops the record when a detach has only counted down.)
    """
    pod = runtime.pod
    if pod is None:
        return
    # Where the pod's names of this volume are not known, any may be it: data would be lost.
    own = {pod.disks[name] for name in pod.own if name in pod.disks} if pod.own is not None else set(pod.disks.values())
    writing = [mount for mount in pod.mounts if pod.disks.get(mount.volume) in own and mount.writes]
    for one, other in _at_once(writing):
        disk = pod.disks[one.volume]
        if one.container != other.container and disk == pod.disks[other.volume]:
            volumes = f"volume {one.volume!r}" if one.volume == other.volume else (
                f"volumes {one.volume!r} and {other.volume!r}")  # fmt: skip
            raise Refused(
                f"containers {one.container!r} and {other.container!r} both write to {volumes} ({disk}) under the "
                f"runtime handler {runtime.handler!r}: when one of them restarts, Kata's Rust shim gives the guest the "
                "disk a second time while the other one still writes to the first, and data is lost. Let one container "
                "write, take a volume of the backend directory or nfs, or a handler of Kata's Go shim; if it is no "
                'block volume, or the shim is mended, set kata.rust_shared_block = "allow"'
            )
