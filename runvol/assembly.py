"""The rooms, put together from the settings."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from blockdev import mounts
from guestmount import (
    Claims,
    ClaimSources,
    Detector,
    DetectSettings,
    KataDialect,
    KubernetesApi,
    Node,
    Reach,
    Rund2Dialect,
    Rund3Dialect,
    RunvDialect,
    boot,
    registration,
    repair,
)
from guestmount.containerd_places import Places
from guestmount.cri import Sandboxes
from guestmount.events import Events
from guestmount.known_pods import KnownPods
from guestmount.startup_taint import StartupTaint
from guestmount.written import Trust
from runvol.config import Config, ConfigError
from volumes import Catalog
from volumes.exports import Said
from volumes.jobs import PATIENCE
from volumes.registry import Settings

if TYPE_CHECKING:
    from guestmount.kubelet_pods import KubeletPods


def build(config: Config, *, check_patience: float = PATIENCE, looking: bool = False) -> Node:
    """A node's verbs over its real directories. `check_patience`: seconds that a call waits for a check. `looking`: who
    asks changes nothing and makes nothing, not even what an older release left."""
    run_dir, state_dir = config.text("paths.run_dir"), config.text("paths.state_dir")
    check_mounted(config)
    pods = api(config)
    node = Node(
        catalog=Catalog.open(
            Settings(
                state_dir=state_dir,
                reading=looking,
                capacity_limit=config.number("loop.capacity_bytes"),
                directory=config.text("directory.path"),
                directory_limit=config.number("directory.capacity_bytes"),
                given_directories=config.words("flexvolume.directories"),
                given_devices=config.words("flexvolume.devices"),
                nfs_exports=config.words("nfs.exports"),
                nfs_cluster=_cluster_exports(config, pods),
                held=os.path.join(run_dir, "given"),
            ),
            enabled=config.words("volumes.backends"),
        ),
        claims=Claims(run_dir, records(config)) if looking else claims(config),
        detector=detector(config, known_pods(config, pods)),
        dialects=(
            KataDialect(config.text("paths.direct_volumes"), nri_alive=partial(registration.is_alive, run_dir)),
            RunvDialect(config.words("node.roots")),
            Rund2Dialect(config.words("node.roots")),
            Rund3Dialect(config.words("node.roots")),
        ),
        roots=config.words("node.roots"),
        reach=reach(config),
        rust_shared_block=config.text("kata.rust_shared_block") == "allow",
        guest_filesystems=Trust(config.text("node.guest_filesystems")),
        check_patience=check_patience,
        copy_gives_way=config.number("loop.copy_gives_way_seconds"),
        max_volumes=config.number("csi.max_volumes"),
        sandboxes=Sandboxes(endpoint=lambda: places(config).taken().endpoints, roots=config.words("node.roots")),
        events=events(config, pods),
    )
    if not looking:
        node.claims.remake = partial(repair.remade, node)
    return node


def events(config: Config, pods: KubernetesApi | None) -> Events | None:
    """Who tells pods and claims what they have to know; None where nobody is to be told."""
    again = config.number("csi.events_seconds")
    return None if pods is None or not again else Events(pods, reporter=config.node_id, again=again)


def reach(config: Config) -> Reach:
    """Whether mounts reach kubelet, by its process."""
    return Reach(
        roots=config.words("node.roots"),
        process=config.text("node.kubelet_process"),
        unproved=config.text("node.unproved_mounts") == "allow",
    )


def warm(node: Node) -> None:
    """What the first publish would wait for is begun. For processes that stay."""
    node.detector.warm()


def check_mounted(config: Config) -> None:
    """ConfigError where the state directory has to be a mount and is none."""
    state_dir = config.text("paths.state_dir")
    if config.text("paths.state_dir_mounted") == "true" and not mounts.is_mount_point(state_dir):
        raise ConfigError(
            f"paths.state_dir = {state_dir!r}: nothing is mounted there, and paths.state_dir_mounted = true says that "
            "something has to be; mount its filesystem first"
        )


def records(config: Config) -> str:
    """Where what this boot's calls know lies."""
    return boot.directory(config.text("paths.state_dir"))


def claims(config: Config) -> Claims:
    """The node's claims, with those that an older release keeps in the run directory."""
    run_dir, place = config.text("paths.run_dir"), records(config)
    boot.take_over(run_dir, place)
    return Claims(run_dir, place)


def kata_root(config: Config) -> str:
    """Where the search for Kata's configuration starts, as this process sees it."""
    return os.path.join(config.text("paths.host_root"), config.text("paths.kata_root").lstrip("/"))


def places(config: Config) -> Places:
    """Where kubelet's containerd is, as far as it is set."""
    return Places(
        config=config.text("paths.containerd_config"),
        endpoint=config.text("cri.endpoint"),
        root=config.text("paths.host_root"),
    )


def kept_containerd(config: Config) -> str:
    """The file of what the running containerd said last."""
    return os.path.join(config.text("paths.run_dir"), "containerd.json")


def known_pods(config: Config, pods: KubernetesApi | None) -> KnownPods | None:
    """All that can tell of this node's pods, which follows them once it is started; None without an API."""
    if pods is None:
        return None
    kept, follows = os.path.join(config.text("paths.state_dir"), "answers"), "node" in config.words("csi.services")
    return KnownPods(
        pods, node=config.node_id, kept=kept, follows=follows, roots=config.words("node.roots"),
        kubelet=kubelet_pods(config, pods),
    )  # fmt: skip


def kubelet_pods(config: Config, pods: KubernetesApi) -> KubeletPods | None:
    """Kubelet's own list of its pods; None if it is not to be asked."""
    if not config.text("detect.kubelet"):
        return None
    from guestmount.kubelet_pods import KubeletPods

    said = config.text("detect.kubelet_ca")
    own = [os.path.join(root, "pki", name) for root in config.words("node.roots")
           for name in ("kubelet-server-current.pem", "kubelet.crt")]  # fmt: skip
    authority = own if said in ("", "auto") else [said]
    address, is_beside = config.text("detect.kubelet"), reach(config).is_beside
    return KubeletPods(address, pods, node=config.node_id, authority=authority, is_beside=is_beside)


def detector(config: Config, known: KnownPods | None = None) -> Detector:
    """Who tells which runtime runs a pod; `known`: of this node's pods, if somebody has it already."""
    return Detector(
        DetectSettings(
            containerd_config=config.text("paths.containerd_config"),
            cri_endpoint=config.text("cri.endpoint"),
            kept=kept_containerd(config),
            roots=config.words("node.roots"),
            sandbox_handlers=config.words("detect.sandbox_handlers"),
            host_handlers=config.words("detect.host_handlers"),
            default_runtime=config.text("detect.default_runtime"),
            sandbox_handler=config.text("detect.sandbox_handler"),
            rund=config.text("detect.rund"),
            root=kata_root(config),
            host_root=config.text("paths.host_root"),
        ),
        known or known_pods(config, api(config)),
    )


def _cluster_exports(config: Config, pods: KubernetesApi | None) -> Callable[[], Sequence[Said]] | None:
    """Who says which exports the cluster names; None for what only has a node's services, which never needs that."""
    if pods is None or "controller" not in config.words("csi.services"):
        return None

    def ask() -> Sequence[Said]:
        from guestmount import cluster_exports

        return cluster_exports.said(pods)

    return ask


def startup_taint(config: Config, registered: Callable[[], int]) -> StartupTaint | None:
    """Who takes the node's taint off; None where none is configured, or nobody to ask."""
    pods, key = api(config), config.text("csi.startup_taint")
    if pods is None or not key:
        return None
    return StartupTaint(pods, node_id=config.node_id, key=key, registered=registered)


def claim_sources(config: Config) -> ClaimSources | None:
    """Who knows on which node a claim's source is; None without an API."""
    from csi import topology

    pods = api(config)
    return None if pods is None else ClaimSources(pods, node_id=config.node_id, key=topology.KEY)


def api(config: Config) -> KubernetesApi | None:
    """The Kubernetes API, if one is configured."""
    kubeconfig, server = config.text("detect.kubeconfig"), config.text("detect.api_server")
    if not kubeconfig and not server:
        return None
    return KubernetesApi(kubeconfig="" if kubeconfig == "in-cluster" else kubeconfig, server=server)
