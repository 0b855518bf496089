"""`runvol doctor` for the Kubernetes sidecars on this node: do their arguments suit the driver that they serve?"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

from guestmount import drivers
from runvol.config import Config
from runvol.diagnosis import BROKEN, WARNING, Diagnosis, good

_ONE_NODE = "serves one node: of several, the one that wins the election asks its own for all"
_SIDECARS = ("csi-provisioner", "csi-snapshotter", "csi-resizer")


def examine(config: Config, proc: str = "/proc") -> Iterator[Diagnosis]:
    """A line for each that has one of this plugin's sockets."""
    ours = {config.text(key).removeprefix("unix://"): key for key in ("csi.endpoint", "csi.nfs_endpoint")}
    for name, flags in _running(proc):
        key = ours.get(flags.get("csi-address", "").removeprefix("unix://"))
        if not key or "node" not in config.words("csi.services"):
            continue
        of_nodes = key == "csi.endpoint"
        subject = f"{name} of {drivers.NODES if of_nodes else drivers.NFS}"
        wrong = _wrong(name, flags, of_nodes=of_nodes)
        if wrong is None:
            yield good("sidecars.arguments", subject, "has the arguments that the driver needs")
        else:
            yield Diagnosis(state=WARNING if name == "csi-resizer" else BROKEN, id=wrong[0], subject=subject,
                            finding=wrong[1])  # fmt: skip


def _wrong(name: str, flags: Mapping[str, str], *, of_nodes: bool) -> tuple[str, str] | None:
    """Id and finding."""
    on_nodes = flags.get("node-deployment", "false") != "false"
    if name == "csi-resizer":
        return ("sidecars.resizer-on-node", _ONE_NODE) if of_nodes else None
    if of_nodes and not on_nodes:
        finding = "runs without --node-deployment: it takes every node's claims, and finds no other node's volumes"
        return "sidecars.not-per-node", finding
    if not of_nodes and on_nodes:
        return "sidecars.per-node-for-nfs", "runs with --node-deployment: volumes on NFS belong to no node"
    if name == "csi-provisioner" and of_nodes and flags.get("strict-topology", "false") == "false":
        return ("sidecars.topology-not-strict",
                "runs without --strict-topology: a claim may be made on another node than its pod's")  # fmt: skip
    return None


def _running(proc: str) -> Iterator[tuple[str, Mapping[str, str]]]:
    """Programs of those names, with their arguments (`--name=value`, `--name` or `-name`)."""
    for entry in sorted(os.listdir(proc)):
        if not entry.isdigit():
            continue
        try:
            with open(f"{proc}/{entry}/cmdline", "rb") as file:
                words = os.fsdecode(file.read(1 << 16)).split("\0")
        except OSError:
            continue
        if os.path.basename(words[0]) in _SIDECARS:
            split = [word.lstrip("-").partition("=") for word in words[1:] if word.startswith("-")]
            yield os.path.basename(words[0]), {name: value or "true" for name, _, value in split}
