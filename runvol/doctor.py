"""`runvol doctor`: what this node can do, what it cannot, and what to change."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator

from blockdev import Deadline, confined
from guestmount import Node, guest_kernel, kata_config, preflight, registration, repair
from guestmount.errors import TROUBLE
from guestmount.runtimes import Handler
from guestmount.usage import problems
from runvol import assembly, doctor_cluster, doctor_containerd, doctor_kubelet, doctor_sidecars, doctor_snapshots
from runvol.config import Config
from runvol.diagnosis import BROKEN, OK, WARNING, Diagnosis
from volumes import VolumeError

_CAP_SYS_ADMIN, _CAP_SYS_RESOURCE = 21, 24


def examine(config: Config, node: Node) -> Iterator[Diagnosis]:
    """Every check, one after the other; none of them changes anything. What only a node has is looked at where the
    node's service is (csi.services): a central controller has neither kubelet nor containerd."""
    on_node = "node" in config.words("csi.services")
    yield from _programs()
    yield from _kernel(on_node)
    if on_node:
        yield from _directories(config)
        yield from _reach(node)
    yield from doctor_kubelet.examine(config)
    yield from doctor_sidecars.examine(config)
    if on_node:
        containerd = doctor_containerd.asked(config)
        yield from doctor_cluster.examine(config, assembly.api(config), containerd)
        yield from doctor_containerd.examine(containerd)
        yield from _runtimes(config, containerd.handlers.values())
    else:
        yield from doctor_cluster.examine(config, assembly.api(config), None)
    yield from _backends(node)
    yield from _volumes(node)
    if on_node:
        yield from doctor_snapshots.examine(config)


def _programs() -> Iterator[Diagnosis]:
    wanted = (
        ("mkfs.ext4", True),
        ("e2fsck", True),
        ("blkid", True),
        ("mkfs.xfs", False),
        ("xfs_logprint", False),
        ("tar", False),
        ("du", False),
    )
    for program, needed in wanted:
        found = shutil.which(program, path="/usr/sbin:/sbin:/usr/bin:/bin")
        state = OK if found else (BROKEN if needed else WARNING)
        yield Diagnosis(
            state=state,
            subject=program,
            finding=found or "not installed; install e2fsprogs, util-linux, xfsprogs, tar, coreutils",
        )


def _kernel(on_node: bool) -> Iterator[Diagnosis]:
    if on_node:
        control = os.path.exists("/dev/loop-control")
        yield Diagnosis(
            state=OK if control else BROKEN,
            subject="loop devices",
            finding="/dev/loop-control is there"
            if control
            else "no /dev/loop-control: modprobe loop, or mount the host's /dev",
        )
    with open("/proc/self/status") as status:
        effective = next(int(line.split()[1], 16) for line in status if line.startswith("CapEff"))
    for number, name, needed, cost in (
        (_CAP_SYS_ADMIN, "CAP_SYS_ADMIN", True, "nothing can be mounted"),
        (
            _CAP_SYS_RESOURCE,
            "CAP_SYS_RESOURCE",
            False,
            "a mounted ext4 cannot grow (XFS can, and both can while unmounted)",
        ),
    ):
        has = bool(effective >> number & 1)
        state = OK if has else (BROKEN if needed else WARNING)
        yield Diagnosis(state=state, subject=name, finding="granted" if has else f"missing: {cost}")
    doubt = confined.doubt("/")
    yield Diagnosis(
        state=WARNING if doubt else OK,
        subject="confined copies",
        finding=f"volumes with the content of others cannot be made here: {doubt} (it takes Linux 5.14 and "
        "CAP_SYS_ADMIN)"
        if doubt
        else "tar is held in the directory that it writes to",
    )


def _directories(config: Config) -> Iterator[Diagnosis]:
    for root in config.words("node.roots"):
        there = os.path.isdir(root)
        missing = "does not exist: no kubelet has run here, or its --root-dir is another one (setting node.roots)"
        yield Diagnosis(
            state=OK if there else WARNING, subject=root, finding="kubelet's directory" if there else missing
        )


def _runtimes(config: Config, handlers: Iterable[Handler]) -> Iterator[Diagnosis]:
    for handler in handlers:
        if not handler.is_sandbox:
            yield Diagnosis(state=OK, subject=f"handler {handler.name}", finding="runs pods on the host's kernel")
            continue
        kata = kata_config.read(handler, root=assembly.kata_root(config))
        if kata is None:
            yield Diagnosis(
                state=WARNING, subject=f"handler {handler.name}", finding="a sandbox whose configuration was not found"
            )
        elif kata.blocks_disabled({}):
            yield Diagnosis(
                state=BROKEN,
                subject=f"handler {handler.name}",
                finding=f"ignores block volumes: set disable_block_device_use = false in {kata.path}",
            )
        elif trouble := kata.block_trouble({}):
            yield Diagnosis(state=BROKEN, subject=f"handler {handler.name}", finding=f"its containers fail: {trouble}")
        else:
            yield Diagnosis(
                state=OK,
                subject=f"handler {handler.name}",
                finding=f"takes block volumes{_as_nodes(kata)} ({kata.shim} shim, {kata.path})",
            )
        if kata is not None and kata.shim == kata_config.RUST:
            yield from _rust_shared_block(config, handler.name)
        if kata is not None and kata.kernel and "nfs" in config.words("volumes.backends"):
            yield _guest_nfs(handler.name, kata.kernel, config.text("paths.run_dir"))
        if kata is not None and not preflight.shares_by_virtio_fs(kata.shared_fs):
            yield Diagnosis(
                state=WARNING,
                subject=f"handler {handler.name}",
                finding=f'gets no directories of the host: set shared_fs = "virtio-fs" in {kata.path} (it is '
                f"{kata.shared_fs!r})",
            )


def _as_nodes(kata: kata_config.KataConfig) -> str:
    return " through loop devices, as block_device_cache_set is true" if kata.wants_node({}) else ""


def _rust_shared_block(config: Config, handler: str) -> Iterator[Diagnosis]:
    """Whether pods are refused that the Rust shim would lose data of."""
    if config.text("kata.rust_shared_block") == "allow":
        why = 'kata.rust_shared_block is "allow"'
    elif not config.text("detect.kubeconfig") and not config.text("detect.api_server"):
        why = "no Kubernetes API is configured (detect.kubeconfig), so nobody knows the pods' containers"
    else:
        return
    what = "two containers of a pod that write to one block volume lose data under its Rust shim, and are not refused"
    yield Diagnosis(state=WARNING, subject=f"handler {handler}", finding=f"{what}: {why}")


def _guest_nfs(handler: str, kernel: str, run_dir: str) -> Diagnosis:
    """Whether the guests of a handler can mount NFS themselves."""
    lacking = {version: guest_kernel.missing(kernel, version) for version in guest_kernel.NEEDED}
    can = [version for version, options in lacking.items() if options == []]
    subject = f"handler {handler}"
    if any(options is None for options in lacking.values()):
        finding = f"whether its guests can mount NFS is not known: {kernel} has no configuration in it nor beside it"
        return Diagnosis(state=WARNING, subject=subject, finding=finding)
    if can:
        finding = f"its guests can mount NFS {', '.join(can)} ({kernel})"
        if not registration.is_alive(run_dir):
            finding += "; for that `runvol nri` has to run here, and does not (nri.enabled of the chart)"
        return Diagnosis(state=OK, subject=subject, finding=finding)
    options = sorted({option for found in lacking.values() for option in found or ()})
    finding = f"its guests cannot mount NFS: {kernel} has no {', '.join(options)}; classes need inSandbox: share"
    return Diagnosis(state=WARNING, subject=subject, finding=finding)


def _reach(node: Node) -> Iterator[Diagnosis]:
    """Of this command's own mount namespace; the plugin says the same of its own in its health and its log."""
    doubt = node.reach.doubt() if node.reach is not None else None
    if doubt is None:
        yield Diagnosis(state=OK, subject="mounts", finding="what is mounted here is seen by kubelet")
    else:
        yield Diagnosis(state=BROKEN if doubt.certain else WARNING, subject="mounts", finding=doubt.why)


def _backends(node: Node) -> Iterator[Diagnosis]:
    """What the backends of files need of this node's kernel."""
    for backend in node.catalog.backends:
        for need in backend.needs():
            yield Diagnosis(state=OK if need.met else WARNING, subject=f"backend {backend.name}", finding=need.finding)


def _volumes(node: Node) -> Iterator[Diagnosis]:
    left_out: list[str] = []
    try:
        listed = node.catalog.list(trouble=left_out.append)
        yield Diagnosis(state=OK, subject="volumes", finding=f"{len(listed)} on this node")
    except VolumeError as error:
        yield Diagnosis(state=BROKEN, subject="volumes", finding=str(error))
        listed = []
    for sentence in left_out:
        yield Diagnosis(state=WARNING, subject="volumes", finding=f"not listed: {sentence}")
    for _seq, volume in listed:
        yield from _problems(node, volume.volume_id)
    for one in node.catalog.unfinished():
        yield Diagnosis(state=WARNING, subject="left over: volume", finding=f"{one.name}: {one.why}; `runvol gc`")
    yield from _left_over(node)


def _problems(node: Node, volume_id: str) -> Iterator[Diagnosis]:
    try:
        for problem in problems(node, volume_id):
            state = BROKEN if problem.lost else WARNING
            yield Diagnosis(state=state, subject=volume_id, finding=problem.message)
    except TROUBLE as error:
        yield Diagnosis(state=WARNING, subject=volume_id, finding=f"cannot be looked at: {error}")


def _left_over(node: Node) -> Iterator[Diagnosis]:
    try:
        for finding in repair.collect(node, Deadline.after(20), dry_run=True):
            yield Diagnosis(state=WARNING, subject=f"left over: {finding.kind}",
                            finding=f"{finding.place}: {finding.why}; `runvol gc`")  # fmt: skip
    except TROUBLE as error:
        yield Diagnosis(state=BROKEN, subject="left over", finding=f"cannot be looked for: {error}")
