"""`runvol doctor` for the runtime handlers: what each one's shim makes of a volume."""

from __future__ import annotations

import os
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from blockdev import toml_files
from guestmount import guest_kernel, kata_config, preflight
from guestmount.claims import Claim
from guestmount.kata_config import KataConfig
from guestmount.runtimes import Handler, in_root
from guestmount.ways import disk_slots
from runvol import assembly
from runvol.config import Config
from runvol.diagnosis import Diagnosis, broken, good, unknown, warning

# Where containerd looks for a shim whose path nobody has said: its own PATH, by systemd's default and Kata's place.
_SHIMS = ("/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin", "/opt/kata/bin")
_SCSI = "virtio-scsi"
# QEMU's virtio-blk takes no other sizes of a queue.
_SMALLEST_QUEUE, _LARGEST_QUEUE = 4, 1024


def examine(config: Config, handlers: Iterable[Handler], claims: Sequence[Claim] = ()) -> Iterator[Diagnosis]:
    """`claims`: who has the node's volumes, for what the guests' places are taken by."""
    for handler in handlers:
        subject = f"handler {handler.name}"
        if not handler.is_sandbox:
            yield good("kata.host", subject, "runs pods on the host's kernel")
            continue
        yield from _shim(config, handler)
        kata = kata_config.read(handler, root=assembly.kata_root(config))
        if kata is None:
            yield _without(config, handler)
            continue
        yield _blocks(subject, kata)
        yield from _places(handler.name, kata, claims)
        yield from _queues(subject, kata)
        if kata.shim == kata_config.RUST:
            yield from _rust_shared_block(config, subject)
        if kata.kernel and "nfs" in config.words("volumes.backends"):
            yield _guest_nfs(subject, kata.kernel)
        if not preflight.shares_by_virtio_fs(kata.shared_fs):
            yield warning("kata.no-shared-directories", subject, "gets no directories of the host by virtio-fs: "
                          f"shared_fs is {kata.shared_fs!r}", _set(kata, 'shared_fs = "virtio-fs"'))  # fmt: skip


def _set(kata: KataConfig, *lines: str) -> str:
    """A fix: lines of a table of the shim's configuration."""
    return f"set {' and '.join(f'`{line}`' for line in lines)} in {kata.table} of {kata.path}"


def _without(config: Config, handler: Handler) -> Diagnosis:
    subject, path = f"handler {handler.name}", kata_config.found(handler, root=assembly.kata_root(config))
    if path is None:
        named = f": its ConfigPath {handler.config_path} is not there" if handler.config_path else ""
        return unknown("kata.config-missing", subject, f"is a sandbox whose configuration was not found{named}")
    try:
        toml_files.read(path)
        why = "one of its drop-ins (config.d) is no TOML, or cannot be read"
    except (OSError, tomllib.TOMLDecodeError) as error:
        why = str(error)
    return broken("kata.config-unreadable", subject, f"{path}: {why}", f"repair {path}, or put the package's own there")


def _shim(config: Config, handler: Handler) -> Iterator[Diagnosis]:
    """Where it can be told: by a path that the configuration names, else by containerd's rule for `runtime_type`."""
    subject, root = f"handler {handler.name}", config.text("paths.host_root")
    named = handler.runtime_path or (handler.runtime_type if handler.runtime_type.startswith("/") else "")
    if named:
        if not os.path.exists(in_root(named, root)):
            yield broken("kata.shim-missing", subject, f"its shim {named} is not there",
                         f"install Kata's shim as {named}, or name another as the handler's runtime_path")  # fmt: skip
        return
    parts = handler.runtime_type.split(".")
    if len(parts) < 2:
        return
    program = f"containerd-shim-{parts[-2]}-{parts[-1]}"
    if not any(os.path.exists(in_root(os.path.join(place, program), root)) for place in _SHIMS):
        yield warning("kata.shim-missing", subject, f"its shim {program} is at none of {', '.join(_SHIMS)}",
                      f"install Kata, or name the shim as the handler's runtime_path: containerd finds {program} in "
                      "its own PATH only")  # fmt: skip


def _blocks(subject: str, kata: KataConfig) -> Diagnosis:
    if kata.blocks_disabled({}):
        what = "its containers fail" if kata.shim == kata_config.RUST else "its pods would write to the host's disk"
        return broken("kata.block-devices-disabled", subject, f"ignores block volumes, and {what}: "
                      f"disable_block_device_use is true in {kata.path}",
                      _set(kata, "disable_block_device_use = false"))  # fmt: skip
    trouble = kata.block_trouble({})
    if not trouble:
        nodes = " through loop devices, as block_device_cache_set is true" if kata.wants_node({}) else ""
        return good("kata.handler", subject, f"takes block volumes{nodes} ({kata.shim} shim, {kata.path})")
    finding = f"its containers fail: {trouble.partition('; ')[0]}"
    if kata.trouble:
        return broken("kata.drop-in-refused", subject, finding, trouble.partition("; ")[2])
    if trouble.startswith("block_device_driver"):
        return broken("kata.block-driver-wrong", subject, finding, _set(kata, f'block_device_driver = "{_SCSI}"'))
    lines = ["block_device_cache_direct = true"]
    if kata.shim == kata_config.GO:
        lines.insert(0, "block_device_cache_set = true")
    return broken("kata.aio-without-direct", subject, finding, _set(kata, *lines))


def _places(handler: str, kata: KataConfig, claims: Sequence[Claim]) -> Iterator[Diagnosis]:
    """Places for disks in the guest that has the most of our volumes; a pod's own annotations are not known here."""
    places = kata.disk_slots({})
    if not places or kata.blocks_disabled({}):
        return
    pods = {target.pod_uid: target.pod for one in claims for target in one.targets.values()
            if (target.handler or (one.owner.handler if one.owner else "")) == handler}  # fmt: skip
    taken = Counter({pod: len(disk_slots.taken(claims, pod)) for pod in pods})
    subject, limit = f"disks of handler {handler}", f"a guest has places for {places} disks"
    most = taken.most_common(1)
    if not most:
        yield good("kata.disk-places", subject, f"{limit}, and no pod has a block volume")
        return
    ((pod, has),) = most
    said = f"{limit}, and the fullest, of pod {pods[pod]}, has {has} block volumes: {max(0, places - has)} are left"
    if has < places:
        yield good("kata.disk-places", subject, said)
        return
    more = _set(kata, f'block_device_driver = "{_SCSI}"') + ", or more `default_bridges`; or "
    yield warning("kata.disk-places-used-up", subject, said,
                  f"{'' if kata.hypervisor == 'firecracker' else more}give the pod fewer volumes")  # fmt: skip


def _queues(subject: str, kata: KataConfig) -> Iterator[Diagnosis]:
    """The Rust shim hands both to QEMU as they are (`num_queues`, `queue_size`), which starts with no others."""
    if kata.shim != kata_config.RUST or kata.hypervisor != "qemu":
        return
    size, number = kata.settings.get("queue_size"), kata.settings.get("num_queues")
    if isinstance(size, int) and size and (size & (size - 1) or not _SMALLEST_QUEUE <= size <= _LARGEST_QUEUE):
        yield warning("kata.queues-wrong", subject, f"queue_size is {size} in {kata.path}: QEMU takes a power of two "
                      f"from {_SMALLEST_QUEUE} to {_LARGEST_QUEUE}", _set(kata, "queue_size = 128"))  # fmt: skip
    if isinstance(number, int) and not 0 <= number <= _LARGEST_QUEUE:
        yield warning("kata.queues-wrong", subject, f"num_queues is {number} in {kata.path}: QEMU takes 1 to "
                      f"{_LARGEST_QUEUE}", _set(kata, "num_queues = 1"))  # fmt: skip


def _rust_shared_block(config: Config, subject: str) -> Iterator[Diagnosis]:
    """Whether pods are refused that the Rust shim would lose data of."""
    if config.text("kata.rust_shared_block") == "allow":
        why, fix = 'kata.rust_shared_block is "allow"', '`kata.rust_shared_block = "refuse"`'
    elif not config.text("detect.kubeconfig") and not config.text("detect.api_server"):
        why = "no Kubernetes API is configured, so nobody knows the pods' containers"
        fix = "set `detect.kubeconfig` to a kubeconfig file, or to in-cluster"
    else:
        return
    what = "two containers of a pod that write to one block volume lose data under its Rust shim, and are not refused"
    yield warning("kata.shared-block-not-refused", subject, f"{what}: {why}", fix)


def _guest_nfs(subject: str, kernel: str) -> Diagnosis:
    """Whether the guests of a handler can mount NFS themselves."""
    lacking = {version: guest_kernel.missing(kernel, version) for version in guest_kernel.NEEDED}
    can = [version for version, options in lacking.items() if options == []]
    if any(options is None for options in lacking.values()):
        finding = f"whether its guests can mount NFS is not known: {kernel} has no configuration in it nor beside it"
        return warning("kata.guest-nfs-unknown", subject, finding)
    if can:
        return good("kata.guest-nfs", subject, f"its guests can mount NFS {', '.join(can)} ({kernel})")
    options = sorted({option for found in lacking.values() for option in found or ()})
    finding = f"its guests cannot mount NFS: {kernel} has no {', '.join(options)}"
    return warning("kata.guest-nfs-missing", subject, finding,
                   "use a guest kernel that has them, or `inSandbox: share` in classes on NFS")  # fmt: skip
