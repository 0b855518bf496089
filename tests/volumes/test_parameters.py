"""StorageClass parameters: known by name, checked by value."""

from __future__ import annotations

import pytest

from volumes import InvalidParameter, parameters


@pytest.mark.parametrize(
    "given",
    [{}, {"backend": "loop"}, {"runtime": "kata-qemu", "preallocate": "true"}, {"csi.storage.k8s.io/fstype": "xfs"}],
)
def test_known_parameters_pass(given):
    assert parameters.check(given) == given


@pytest.mark.parametrize(
    ("key", "value"),
    [("fstype", "ext4"), ("Backend", "loop"), ("backend", "cephfs"), ("runtime", ""), ("runtime", "Kata"), ("runtime", "a b"),
     ("runtime", "x" * 64), ("runtime", "../x"), ("preallocate", "yes"), ("csi.storage.k8s.io/fstype", "ntfs"), ("", "")],
)  # fmt: skip
def test_others_are_refused_by_name(key, value):
    with pytest.raises(InvalidParameter, match=repr(key)[1:-1] or "''"):
        parameters.check({"backend": "loop", key: value})


def test_kubernetes_own_keys_are_passed_over():
    assert parameters.check({"csi.storage.k8s.io/pvc/name": "x"}) == {}
    context = {
        "csi.storage.k8s.io/pod.name": "p",
        "storage.kubernetes.io/csiProvisionerIdentity": "1",
        "runtime": "runc",
    }
    assert parameters.check_context(context) == {"runtime": "runc"}
    with pytest.raises(InvalidParameter, match="colour"):
        parameters.check_context({"colour": "red"})


def test_the_context_holds_only_what_the_node_needs():
    assert parameters.context_of({"backend": "loop", "preallocate": "true", "runtime": "runc"}) == {"runtime": "runc"}


def test_an_exports_context_says_what_it_is_and_local_ones_leave_it_out():
    export = {"backend": "nfs", "server": "nas", "path": "/a", "mode": "0700"}
    assert parameters.context_of(export) == {"backend": "nfs", "server": "nas", "path": "/a"}
    assert parameters.check_context(parameters.context_of(export))
    assert parameters.context_of({"backend": "directory", "quota": "none"}) == {}


@pytest.mark.parametrize(
    ("key", "value"),
    [("server", "a b"), ("server", "-x"), ("server", "a;b"), ("path", "x"), ("path", "/a/../b"), ("path", "/a,b"),
     ("options", "addr=1.1.1.1"), ("options", "a,,b"), ("options", "vers=5"), ("options", "nfsvers=4"), ("subDir", "/a"), ("subDir", "a/../b"),
     ("subDir", ".runvol"), ("subDir", "a//b"), ("subDir", "archived-x"), ("mode", "9"), ("vers", "4"), ("inSandbox", "refuse")],
)  # fmt: skip
def test_an_exports_parameters_are_checked(key, value):
    with pytest.raises(InvalidParameter, match=repr(key)):
        parameters.check({"backend": "nfs", "server": "nas", "path": "/a"} | {key: value})


@pytest.mark.parametrize("server", ["nas", "nas.example.com", "10.0.0.1", "fd00::1"])
def test_servers_are_names_or_addresses(server):
    assert parameters.check({"backend": "nfs", "server": server, "share": "/a"}) == {
        "backend": "nfs", "server": server, "path": "/a",
    }  # fmt: skip


def test_every_parameter_is_documented():
    for parameter in parameters.TABLE:
        assert parameter.meaning.endswith(".") and parameter.values and parameter.default


def test_short_forms_of_other_drivers_are_spelled_out():
    asked = {"backend": "nfs", "server": "nas.example.com:/k8s/", "subDir": "${pvc.metadata.namespace}/${pvc.metadata.name}",
             "csi.storage.k8s.io/pvc/name": "data", "csi.storage.k8s.io/pvc/namespace": "team-a"}  # fmt: skip
    assert parameters.check(asked) == {
        "backend": "nfs", "server": "nas.example.com", "path": "/k8s", "subDir": "team-a/data"
    }  # fmt: skip
    with pytest.raises(InvalidParameter, match="contradicts path"):
        parameters.check({"backend": "nfs", "server": "nas:/a", "path": "/b"})
    with pytest.raises(InvalidParameter, match="extra-create-metadata"):
        parameters.check({"backend": "nfs", "server": "nas", "path": "/b", "subDir": "${pv.metadata.name}"})
    with pytest.raises(InvalidParameter, match="relative path"):
        parameters.check(asked | {"csi.storage.k8s.io/pvc/name": "../x"})
