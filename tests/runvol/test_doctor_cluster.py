"""`runvol doctor` about the cluster: what cannot be read, a CSIDriver that says the wrong thing, another containerd."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from guestmount import KubernetesApi
from runvol import config, doctor_cluster, doctor_containerd
from tests.api_double import ApiDouble

CSIDRIVERS = "csidrivers"
GOOD = {"attachRequired": False, "podInfoOnMount": True, "fsGroupPolicy": "None"}
NAMES = ("csi.runvol.io", "nfs.csi.runvol.io")


@pytest.fixture
def api() -> Iterator[ApiDouble]:
    one = ApiDouble()
    one.objects |= {CSIDRIVERS: {}, "nodes": {}}
    for name in NAMES:
        one.objects[CSIDRIVERS][name] = {"spec": GOOD}
    one.objects["nodes"]["n"] = {"status": {"runtimeHandlers": [{"name": ""}, {"name": "runc"}, {"name": "kata"}]}}
    yield one
    if not one.stopped:
        one.stop()


def lines(
    api: ApiDouble, tmp_path: Path, *, url: str = "", nfs: str = "unix:///run/n.sock"
) -> dict[str, tuple[str, str]]:
    containerd = tmp_path / "config.toml"
    containerd.write_text(
        "version = 3\n"
        + "".join(
            f'[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.{name}]\nruntime_type = "io.containerd.x.v2"\n'
            for name in ("runc", "kata")
        )
    )
    flags = {"paths.containerd_config": str(containerd), "node.id": "n", "csi.nfs_endpoint": nfs}
    loaded = config.load(file=None, flags=flags, environment={})
    asked = doctor_containerd.asked(loaded)
    found = doctor_cluster.examine(loaded, KubernetesApi(server=url or api.url, account=str(tmp_path)), asked)
    return {one.subject: (one.state, f"{one.finding}; {one.fix}") for one in found}


def test_a_cluster_as_it_should_be(api, tmp_path):
    found = lines(api, tmp_path)
    assert {state for state, _ in found.values()} == {"ok"}, found
    assert {"Kubernetes API", "runtime handlers", *(f"CSIDriver {name}" for name in NAMES)} == {*found}


def test_without_an_api_there_is_one_line():
    loaded = config.load(file=None, flags={}, environment={})
    (only,) = doctor_cluster.examine(loaded, None, doctor_containerd.asked(loaded))
    assert (only.state, only.subject) == ("warning", "Kubernetes API")


def test_a_central_controller_is_asked_for_nothing_of_nodes(api, tmp_path):
    api.denied = {"pods", "runtimeclasses", "nodes"}
    loaded = config.load(file=None, flags={"csi.nfs_endpoint": "unix:///run/n.sock"}, environment={})
    asked = KubernetesApi(server=api.url, account=str(tmp_path))
    found = {one.subject: one.state for one in doctor_cluster.examine(loaded, asked, None)}
    assert found == {"Kubernetes API": "ok", **{f"CSIDriver {name}": "ok" for name in NAMES}}
    (only,) = doctor_cluster.examine(loaded, None, None)
    assert "nfs.exports" in only.finding


def test_a_server_that_is_away_is_told_for_each_question(api, tmp_path):
    api.stop()
    found = lines(api, tmp_path)
    assert {state for state, _ in found.values()} == {"broken"} and len(found) == 4
    assert "which runtime a pod has" in found["pods"][1]


@pytest.mark.parametrize(("nfs", "state"), [("", "warning"), ("unix:///run/n.sock", "broken")])
def test_a_nodes_own_credentials_are_enough_without_nfs(api, tmp_path, nfs, state):
    """kubelet's: they list the node's pods and the RuntimeClasses, and neither volumes nor StorageClasses."""

    def refuses(path: str, query: dict[str, str]) -> bool:
        others_pods = path == "/api/v1/pods" and query.get("fieldSelector") != "spec.nodeName=n"
        return others_pods or path.endswith(("/persistentvolumes", "/storageclasses"))

    api.refuses = refuses
    found = lines(api, tmp_path, nfs=nfs)
    assert "pods" not in found and "RuntimeClasses" not in found
    assert {found[what][0] for what in ("PersistentVolumes", "StorageClasses")} == {state}


@pytest.mark.parametrize(
    ("spec", "words"),
    [({**GOOD, "podInfoOnMount": False}, "podInfoOnMount is False instead of True"), ({}, "attachRequired is None"),
     ({**GOOD, "fsGroupPolicy": "File"}, "owners of files"), (None, "hang without any event")],
)  # fmt: skip
def test_a_csidriver_that_is_wrong_or_missing(api, tmp_path, spec, words):
    if spec is None:
        del api.objects[CSIDRIVERS][NAMES[0]]
    else:
        api.objects[CSIDRIVERS][NAMES[0]] = {"spec": spec}
    state, finding = lines(api, tmp_path)[f"CSIDriver {NAMES[0]}"]
    assert state == "broken" and words in finding


@pytest.mark.parametrize(
    ("running", "words"), [(["runc"], "restart containerd"), (["runc", "kata", "more"], "if it reads another file")]
)
def test_another_containerd_than_its_file_says(api, tmp_path, running, words):
    api.objects["nodes"]["n"] = {"status": {"runtimeHandlers": [{"name": name} for name in running]}}
    state, finding = lines(api, tmp_path)["runtime handlers"]
    assert state == "warning" and words in finding


def test_a_class_that_binds_before_its_pods_are_known(api, tmp_path):
    def of(provisioner: str, mode: str) -> dict[str, object]:
        return {"provisioner": provisioner, "volumeBindingMode": mode}

    api.objects["storageclasses"] = {
        "at-once": {"metadata": {"name": "at-once"}, **of(NAMES[0], "Immediate")},
        "later": {"metadata": {"name": "later"}, **of(NAMES[0], "WaitForFirstConsumer")},
        "nfs": {"metadata": {"name": "nfs"}, **of(NAMES[1], "Immediate")},
        "others": {"metadata": {"name": "others"}, **of("others.example.com", "Immediate")},
    }
    found = {subject: said for subject, said in lines(api, tmp_path).items() if subject.startswith("StorageClass ")}
    ((subject, (state, finding)),) = found.items()
    assert (subject, state) == ("StorageClass at-once", "warning")
    assert "'Immediate' instead of 'WaitForFirstConsumer'" in finding and "make the class anew" in finding
