"""Where the source of a claim lies, a snapshot or another claim, and that the scheduler looks for a node there.

A volume of a node is made from another one only on that node. The scheduler does not know that: it may choose another
node, whose plugin refuses, and then the same one again, for ever. What it obeys is the annotation that it writes.
Needs what external-provisioner's role has: get and update of claims, get of nodes, volumes, snapshots, their contents.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from typing import Any

from blockdev import Deadline, WaitExpired
from guestmount.kubernetes_api import KubernetesApi
from guestmount.pods import NotThere, PodUnknown

log = logging.getLogger(__name__)

SELECTED_NODE = "volume.kubernetes.io/selected-node"
# external-snapshotter's, where each node takes its own snapshots.
_MANAGED_BY = "snapshot.storage.kubernetes.io/managed-by"
_SNAPSHOTS = "/apis/snapshot.storage.k8s.io/v1"
_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?\Z")
# For all questions of one call.
_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class Found:
    """`node`: the name of the node that has the source, empty if nobody says; `gone`: the cluster has no such node;
    `told`: the claim is meant for it now."""

    node: str = ""
    gone: bool = False
    told: bool = False


class ClaimSources:
    """Asks the cluster, for the plugin of the node `node_id`; `key`: of the topology that its volumes have."""

    def __init__(self, api: KubernetesApi, *, node_id: str, key: str) -> None:
        self._api, self._node_id, self._key = api, node_id, key

    def sent_there(self, namespace: str, name: str, source_id: str) -> Found:
        """Where the source of this claim is, by the objects that name `source_id`; a claim for which this node was
        chosen is given to that one. What cannot be found out or done is logged, and left."""
        try:
            return self._sent_there(namespace, name, source_id, Deadline.after(_SECONDS))
        except (PodUnknown, WaitExpired) as error:
            log.warning("where a claim's source is was not found out", extra={"source": source_id, "why": str(error)})
            return Found()

    def _sent_there(self, namespace: str, name: str, source_id: str, deadline: Deadline) -> Found:
        path = _path("/api/v1", "persistentvolumeclaims", name, namespace)
        claim = self._api.one(f"the claim {namespace}/{name}", path, deadline)
        spec = _dict(claim, "spec")
        source = _dict(spec, "dataSourceRef") or _dict(spec, "dataSource")
        if source.get("namespace") not in (None, namespace):
            return Found()
        find = {"VolumeSnapshot": self._of_snapshot, "PersistentVolumeClaim": self._of_claim}.get(
            str(source.get("kind"))
        )
        node = find(namespace, str(source.get("name")), source_id, deadline) if find is not None else ""
        if not node or node == self._node_id or spec.get("volumeName"):
            return Found(node=node)
        try:
            return self._sent(claim, path, node, deadline)
        except (PodUnknown, WaitExpired) as error:
            log.warning("a claim stays with the wrong node", extra={"claim": f"{namespace}/{name}", "why": str(error)})
            return Found(node=node)

    def _sent(self, claim: dict[str, Any], path: str, node: str, deadline: Deadline) -> Found:
        try:
            self._api.one(f"node {node}", _path("/api/v1", "nodes", node), deadline)
        except NotThere:
            return Found(node=node, gone=True)
        annotations = _dict(_dict(claim, "metadata"), "annotations")
        if annotations.get(SELECTED_NODE) != self._node_id:
            return Found(node=node)
        annotations[SELECTED_NODE] = node
        self._api.replace("the claim", path, claim, deadline)
        log.info("a claim goes to the node of its source", extra={"claim": path, "node": node})
        return Found(node=node, told=True)

    def _of_snapshot(self, namespace: str, name: str, source_id: str, deadline: Deadline) -> str:
        snapshot = self._api.one(
            f"the snapshot {namespace}/{name}", _path(_SNAPSHOTS, "volumesnapshots", name, namespace), deadline
        )
        content_name = str(_dict(snapshot, "status").get("boundVolumeSnapshotContentName"))
        content = self._api.one(
            f"the snapshot content {content_name}", _path(_SNAPSHOTS, "volumesnapshotcontents", content_name), deadline
        )
        if _dict(content, "status").get("snapshotHandle") != source_id:
            return ""
        return str(_dict(_dict(content, "metadata"), "labels").get(_MANAGED_BY, ""))

    def _of_claim(self, namespace: str, name: str, source_id: str, deadline: Deadline) -> str:
        what = f"the claim {namespace}/{name}"
        claim = self._api.one(what, _path("/api/v1", "persistentvolumeclaims", name, namespace), deadline)
        volume_name = str(_dict(claim, "spec").get("volumeName"))
        volume = self._api.one(
            f"PersistentVolume {volume_name}", _path("/api/v1", "persistentvolumes", volume_name), deadline
        )
        spec = _dict(volume, "spec")
        if _dict(spec, "csi").get("volumeHandle") != source_id:
            return ""
        for term in _dicts(_dict(_dict(spec, "nodeAffinity"), "required"), "nodeSelectorTerms"):
            for one in _dicts(term, "matchExpressions"):
                values = one.get("values")
                if one.get("key") == self._key and one.get("operator") == "In" and isinstance(values, list) and values:
                    return str(values[0])
        return ""


def _path(group: str, kind: str, name: str, namespace: str = "") -> str:
    for part in (name, namespace) if namespace else (name,):
        if not _NAME.match(part):
            raise PodUnknown(f"{part!r} is no name that an object can have")
    return f"{group}/namespaces/{namespace}/{kind}/{name}" if namespace else f"{group}/{kind}/{name}"


def _dicts(of: dict[str, Any], key: str) -> list[dict[str, Any]]:
    found = of.get(key)
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def _dict(of: dict[str, Any], key: str) -> dict[str, Any]:
    found = of.get(key)
    return found if isinstance(found, dict) else {}
