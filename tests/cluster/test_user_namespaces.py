"""Pods of today with a real kubelet and containerd, and a runc that makes idmapped mounts: users of their own
(`hostUsers: false`), `recursiveReadOnly: Enabled`, and how many volumes the scheduler may count."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import runc
from tests.cluster.cluster import Cluster, claim, pod
from tests.cluster.installed import ROOT
from tests.cluster.node import Node, Settings
from tests.cluster.units import PROVISIONER, in_tree, know_provisioner, storage_class

pytestmark = pytest.mark.kernel

MOST = 7
SHARE = """
apiVersion: v1
kind: PersistentVolume
metadata: {name: share}
spec:
  capacity: {storage: 1Gi}
  accessModes: [ReadWriteMany]
  storageClassName: none
  csi: {driver: csi.runvol.io, volumeHandle: share-1, volumeAttributes: {backend: nfs, server: 192.0.2.1, share: /srv}}
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: share}
spec:
  storageClassName: none
  volumeName: share
  accessModes: [ReadWriteMany]
  resources: {requests: {storage: 1Gi}}
---
apiVersion: node.k8s.io/v1
kind: RuntimeClass
metadata: {name: kata}
handler: kata
"""
OWNERS = "echo x > /v/made; stat -c 'made %u:%g' /v/made; sed 's/^/users /' /proc/self/uid_map"


def _without_seccomp(path: Path, program: Path) -> Path:
    """A runc that is built without libseccomp refuses a container that has a profile, and kubelet gives each sandbox
    one: so this runc's containers have none."""
    path.write_text(f"""#!{sys.executable} -IS
import json, os, sys
words = sys.argv[1:]
if "create" in words:
    bundle = words[words.index("--bundle") + 1] + "/config.json"
    with open(bundle, "r+") as file:
        spec = json.load(file)
        spec["linux"].pop("seccomp", None)
        file.seek(0)
        json.dump(spec, file)
        file.truncate()
os.execv({str(program)!r}, ["runc", *words])
""")
    path.chmod(0o755)
    return path


@pytest.fixture(scope="module")
def node(built: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A node whose runc is 1.2 or later, and whose containerd has a sandbox that nobody starts."""
    directory = tmp_path_factory.mktemp("users")
    containerd = f"""BinaryName = '{_without_seccomp(directory / "runc", runc.program())}'
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.kata]
runtime_type = 'io.containerd.kata.v2'
"""
    with Cluster(directory, nodes=()) as cluster:
        one = Node(cluster, 1, Settings(containerd=containerd))
        cluster.nodes.append(one)
        plugin = ["env", f"RUNVOL_NODE_ID={one.name}", f"RUNVOL_DETECT_KUBECONFIG={cluster.kubeconfig}",
                  f"RUNVOL_CSI_MAX_VOLUMES={MOST}", sys.executable, "-m", "runvol", "csi"]  # fmt: skip
        one.launched("runvol", in_tree(plugin), keep=True)
        one.on(units=["runvol"])
        # Whoever has users of its own may mount proc only where one is whole, and the node's has files in its place.
        one.run(["sh", "-ec", "mkdir /run/whole; mount -t proc proc /run/whole"])
        cluster.apply((ROOT / "deploy/kubernetes/csidrivers.yaml").read_text(), SHARE)
        cluster.apply(
            storage_class("loop", backend="loop"),
            storage_class("xfs", backend="loop", **{"csi.storage.k8s.io/fstype": "xfs"}),
        )
        cluster.apply(storage_class("directory", backend="directory", quota="none"))
        know_provisioner(one)
        cluster.start(PROVISIONER)
        yield one
        cluster.wait(
            "the volumes are gone", lambda: [one["metadata"]["name"] for one in cluster.list("pv")] == ["share"]
        )
    assert cluster.left() == []


def with_volume(
    name: str, script: str, *, of: str = "", mount: dict[str, Any] | None = None, **spec: Any
) -> dict[str, Any]:
    mounts = {"volumeMounts": [{"name": "v", "mountPath": "/v", **(mount or {})}]}
    claimed = [{"name": "v", "persistentVolumeClaim": {"claimName": of or name}}]
    return pod(name, f"{script}; sleep 1000 & wait", main=mounts, volumes=claimed, **spec)


@pytest.mark.parametrize("kind", ["loop", "xfs", "directory"])
def test_a_pod_with_users_of_its_own_owns_what_it_writes(node: Node, kind: str) -> None:
    cluster, size = node.cluster, "320Mi" if kind == "xfs" else "64Mi"
    cluster.apply(
        claim(kind, size, storageClassName=kind),
        with_volume(kind, OWNERS, hostUsers=False, securityContext={"fsGroup": 2000}),
    )
    uid = cluster.wait_ready(kind, seconds=120)["metadata"]["uid"]
    said = cluster.kubectl("logs", kind).splitlines()
    assert said[0] == "made 0:2000"
    inside, outside, count = map(int, said[1].removeprefix("users ").split())
    assert inside == 0 and outside >= 65536 and count == 65536
    volume = (cluster.find("pvc", kind) or {})["spec"]["volumeName"]
    place = f"{node.root}/pods/{uid}/volumes/kubernetes.io~csi/{volume}/mount/made"
    assert node.run(["stat", "-c", "%u:%g", place]).strip() == "0:2000", "on the disk are the container's own numbers"
    cluster.delete("pod", kind)
    cluster.delete("pvc", kind)


@pytest.mark.parametrize(
    ("more", "words"), [({}, "the kernel's NFS client cannot map"), ({"runtimeClassName": "kata"}, "a guest with users of its own")],
    ids=["NFS", "a sandbox"],
)  # fmt: skip
def test_what_cannot_be_mapped_is_refused_in_the_pods_events(node: Node, more: dict[str, str], words: str) -> None:
    cluster = node.cluster
    cluster.apply(with_volume("refused", "true", of="share", hostUsers=False, **more))
    cluster.wait("the pod is told", lambda: any(words in event for event in cluster.events("refused")),
                 about=("pod", "refused", "default"))  # fmt: skip
    cluster.delete("pod", "refused")


def test_recursive_read_only_is_what_kubelet_and_the_runtime_agree_on(node: Node) -> None:
    cluster = node.cluster
    mount = {"readOnly": True, "recursiveReadOnly": "Enabled"}
    cluster.apply(
        claim("reads", storageClassName="loop"),
        with_volume("reads", "echo x > /v/f || echo refused", mount=mount, hostUsers=False),
    )
    found = cluster.wait_ready("reads", seconds=90)
    (said,) = (one for one in found["status"]["containerStatuses"][0]["volumeMounts"] if one["name"] == "v")
    assert (said["readOnly"], said["recursiveReadOnly"]) == (True, "Enabled")
    assert "refused" in cluster.kubectl("logs", "reads")
    cluster.delete("pod", "reads")
    cluster.delete("pvc", "reads")


def test_the_scheduler_may_count_as_many_volumes_as_the_setting_says(node: Node) -> None:
    (driver,) = (node.cluster.find("csinode", node.name) or {})["spec"]["drivers"]
    assert (driver["name"], driver["allocatable"]) == ("csi.runvol.io", {"count": MOST})
