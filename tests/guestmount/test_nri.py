"""The NRI plugin against the protocol's vectors, and against a runtime's side that splits, joins, dies and comes back."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from blockdev import Deadline
from guestmount import Claims, Detector, DetectSettings, nri, placeholder, registration, ttrpc
from guestmount.claims import HOST, SANDBOX, Claim, NfsMount, Owner, Target, Use
from guestmount.nri_mux import PLUGIN, RUNTIME, Mux
from runvol_proto import nri_pb2 as pb
from tests.nri_runtime import RuntimeSide
from volumes import VolumeKind

TARGET = "/var/lib/kubelet/pods/u/volumes/kubernetes.io~csi/pv/mount"
SERVICE = "nri.pkg.api.v1alpha1.Plugin"


def claim(*, dialect: str = "kata", version: str = "4.2", read_only: bool = False, **more) -> Claim:
    mount = NfsMount(server="nas", path="/e", version=version, options=("nconnect=2",), address="10.0.0.5", **more)
    return Claim(
        volume="nfs-1", source="nas:/e", staging_path="/s", kind=VolumeKind.FILES, nfs=mount,
        use=Use(mode="multi_node_multi_writer", mount_flags=("noatime", "ro")),
        targets={TARGET: Target(read_only=read_only, pod_uid="u", pod_namespace="d", handler="kata", dialect=dialect)},
    )  # fmt: skip


@pytest.fixture
def claims(tmp_path: Path) -> Claims:
    return Claims(str(tmp_path / "run"))


def write(claims: Claims, one: Claim) -> None:
    with claims.locked(one.volume, Deadline.after(5)) as cell:
        cell.write(one)


def asked(*mounts: pb.Mount, ips: tuple[str, ...] = ("10.1.1.1",), **pod: str) -> pb.CreateContainerRequest:
    known = {"uid": "u", "name": "p", "namespace": "d", "runtime_handler": "kata"}
    return pb.CreateContainerRequest(
        pod=pb.PodSandbox(**(known | pod), ips=ips),
        container=pb.Container(name="c", mounts=mounts),
    )


def bind(source: str = TARGET, *options: str) -> pb.Mount:
    return pb.Mount(
        destination="/data", type="bind", source=source, options=["rbind", "rprivate", *(options or ("rw",))]
    )


@pytest.fixture
def runtime(tmp_path: Path) -> Iterator[RuntimeSide]:
    side = RuntimeSide(tmp_path / "nri.sock")
    yield side
    side.close()


@pytest.fixture
def plugin(tmp_path: Path, claims: Claims) -> Iterator[threading.Thread]:
    stop = threading.Event()
    arguments = (nri.Plugin(claims), str(tmp_path / "run"), str(tmp_path / "nri.sock"), stop)
    thread = threading.Thread(target=nri.serve, args=arguments)
    thread.start()
    yield thread
    stop.set()
    thread.join(15)
    assert not thread.is_alive()


def test_the_vectors_of_the_protocol() -> None:
    request = pb.RegisterPluginRequest(plugin_name="runvol", plugin_idx="10")
    from runvol_proto import ttrpc_pb2

    envelope = ttrpc_pb2.Request(
        service="nri.pkg.api.v1alpha1.Runtime", method="RegisterPlugin", payload=request.SerializeToString()
    )
    data = ttrpc.frame(1, ttrpc.REQUEST, envelope.SerializeToString())
    assert (struct.pack(">II", RUNTIME, len(data)) + data).hex() == (
        "00000002000000460000003c0000000101000a1c6e72692e706b672e6170692e7631616c706861312e52756e74696d65120e5265676973746572506c75"
        "67696e1a0c0a0672756e766f6c12023130"
    )
    assert pb.ConfigureResponse(events=15).SerializeToString().hex() == "100f"
    mount = pb.Mount(destination="/data", type="nfs4", source="10.0.0.5:/e", options=["vers=4.2"])
    adjust = pb.CreateContainerResponse(adjust=pb.ContainerAdjustment(mounts=[mount]))
    assert (
        adjust.SerializeToString().hex()
        == "0a261a240a052f6461746112046e6673341a0b31302e302e302e353a2f652208766572733d342e32"
    )
    removal = pb.CreateContainerResponse(adjust=pb.ContainerAdjustment(mounts=[pb.Mount(destination="-/data")]))
    assert removal.SerializeToString().hex() == "0a0a1a080a062d2f64617461"


def test_the_placeholders_bind_becomes_the_guests_own_mount(claims):
    write(claims, claim())
    response = nri.Plugin(claims).CreateContainer(
        asked(bind(), bind("/other/path"), pb.Mount(destination="/proc", type="proc", source="proc"))
    )
    (mount,) = response.adjust.mounts
    assert (mount.destination, mount.type, mount.source) == ("/data", "nfs4", "nas:/e")
    assert list(mount.options) == ["vers=4.2", "addr=10.0.0.5", "clientaddr=10.1.1.1", "nconnect=2", "noatime", "rw"]
    assert not {"bind", "rbind", "rprivate"} & set(mount.options)


def test_security_and_transport_options_reach_the_guest_as_they_stand(claims):
    options = ("sec=krb5p", "xprtsec=mtls", "nconnect=8")
    one = claim()
    write(claims, one.but(nfs=NfsMount(server="nas", path="/e", version="4.2", options=options, address="10.0.0.5")))
    (mount,) = nri.Plugin(claims).CreateContainer(asked(bind())).adjust.mounts
    assert set(options) <= set(mount.options)


def test_a_guest_is_told_no_label_of_the_nodes_policy(claims):
    label = 'context="system_u:object_r:container_file_t:s0:c10,c20"'
    one = claim()
    use = msgspec.structs.replace(one.use, mount_flags=("noatime", label))
    nfs = NfsMount(server="nas", path="/e", version="4.2", options=(label, "nconnect=2"), address="10.0.0.5")
    write(claims, one.but(use=use, nfs=nfs))
    (mount,) = nri.Plugin(claims).CreateContainer(asked(bind())).adjust.mounts
    assert not [option for option in mount.options if "context" in option]
    assert {"noatime", "nconnect=2"} <= set(mount.options)


def test_recursive_read_only_is_read_only_in_a_guest(claims):
    write(claims, claim())
    (mount,) = nri.Plugin(claims).CreateContainer(asked(bind(TARGET, "rro"))).adjust.mounts
    assert mount.options[-1] == "ro" and "rro" not in mount.options


@pytest.mark.parametrize(
    ("address", "ips", "client"),
    [("10.0.0.5", ("fd00::7", "10.1.1.1"), "10.1.1.1"), ("fd00::5", ("10.1.1.1", "fd00::7"), "fd00::7"),
     ("10.0.0.5", ("fd00::7",), "0.0.0.0"), ("fd00::5", (), "::")],
)  # fmt: skip
def test_the_clients_address_is_of_the_servers_family(claims, address, ips, client):
    write(claims, claim().but(nfs=NfsMount(server="nas", path="/e", version="4.0", address=address)))
    (mount,) = nri.Plugin(claims).CreateContainer(asked(bind(), ips=ips)).adjust.mounts
    assert f"clientaddr={client}" in mount.options
    assert f"addr={address}" in mount.options


@pytest.mark.parametrize(("options", "read_only"), [(("ro",), False), (("rw",), True)])
def test_read_only_is_carried_over(claims, options, read_only):
    write(claims, claim(read_only=read_only))
    (mount,) = nri.Plugin(claims).CreateContainer(asked(bind(TARGET, *options))).adjust.mounts
    assert mount.options[-1] == "ro"


def test_version_3_knows_what_no_helper_finds_out_in_a_guest(claims):
    write(claims, claim(version="3", mount_port=20048))
    (mount,) = nri.Plugin(claims).CreateContainer(asked(bind())).adjust.mounts
    assert mount.type == "nfs"
    for word in ("mountaddr=10.0.0.5", "mountport=20048", "proto=tcp", "nolock", "addr=10.0.0.5"):
        assert word in mount.options


def test_mounts_that_are_not_ours_are_left_alone(claims):
    write(claims, claim(dialect=""))
    assert not nri.Plugin(claims).CreateContainer(asked(bind(), bind(TARGET + "/sub"))).adjust.mounts
    write(claims, claim())
    assert not nri.Plugin(claims).CreateContainer(asked(bind(TARGET + "/sub"))).adjust.mounts
    assert not nri.Plugin(claims).CreateContainer(asked()).HasField("adjust")


@pytest.mark.parametrize(
    ("pod", "why"),
    [({"uid": "v"}, "'v'"), ({"uid": ""}, "''"), ({"namespace": "e"}, "'e'"),
     ({"uid": "v", "namespace": "e", "runtime_handler": "runc"}, "'v'")],
)  # fmt: skip
@pytest.mark.parametrize("below", ["", "/sub/directory"])
def test_a_container_of_another_pod_is_refused(claims, caplog, pod, why, below):
    """By a hostPath, or below it: under Kata's shims it would get the victim's disk as well."""
    write(claims, claim())
    with pytest.raises(ttrpc.RpcError, match="which only that pod's guest may have") as caught:
        nri.Plugin(claims).CreateContainer(asked(bind(TARGET + below), **pod))
    assert why in str(caught.value) and caught.value.code == ttrpc.FAILED_PRECONDITION
    (said,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert why in said.why and said.target == TARGET


def test_block_volumes_of_guests_are_no_other_pods_either(claims):
    block = Claim(
        volume="loop-1", source="/x", staging_path="/s", use=Use(mode="single_node_writer", fstype="ext4"),
        owner=Owner(kind=SANDBOX, pod_uid="u", handler="kata", dialect="kata"),
        targets={TARGET: Target(read_only=False, pod_uid="u", way="guest-device")},
    )  # fmt: skip
    write(claims, block)
    plugin = nri.Plugin(claims)
    assert not plugin.CreateContainer(asked(bind())).HasField("adjust")
    with pytest.raises(ttrpc.RpcError, match="loop-1"):
        plugin.CreateContainer(asked(bind(), uid="v"))
    # The directories above it are many pods'; whoever may bind them sees a placeholder there.
    assert not plugin.CreateContainer(asked(bind(os.path.dirname(TARGET)), bind("/"), uid="v")).HasField("adjust")
    with_owner = block.but(
        owner=Owner(kind=HOST), targets={TARGET: Target(read_only=False, pod_uid="u", way="mounted")}
    )
    write(claims, with_owner)
    assert not plugin.CreateContainer(asked(bind(), uid="v")).HasField("adjust"), "what host pods have is no concern"


@pytest.mark.parametrize(("handler", "why"), [("runc", "'runc'"), ("", "''")])
def test_a_container_of_its_own_pod_under_another_runtime_keeps_what_it_asked_for(claims, caplog, handler, why):
    write(claims, claim())
    response = nri.Plugin(claims).CreateContainer(asked(bind(), runtime_handler=handler))
    assert not response.HasField("adjust")
    (said,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert why in said.why


def test_a_target_whose_pod_nobody_named_is_of_the_pod_in_its_path(claims):
    nameless = Target(read_only=False, pod_uid=TARGET, handler="kata", dialect="kata")
    write(claims, claim().but(targets={TARGET: nameless}))
    plugin = nri.Plugin(claims)
    assert plugin.CreateContainer(asked(bind())).adjust.mounts
    for uid in ("v", "", "volumes"):
        with pytest.raises(ttrpc.RpcError):
            plugin.CreateContainer(asked(bind(), uid=uid))


@pytest.mark.kernel
def test_a_guest_whose_claim_cannot_be_read_is_not_started_on_a_placeholder(claims, tmp_path, soon):
    """Its volume would never come; a runc pod of the same name is untouched."""
    (Path(claims.directory)).mkdir(parents=True)
    (Path(claims.directory) / "other.json").write_bytes(b"{")
    target = tmp_path / "pods/u/volumes/kubernetes.io~csi/pvc/mount"
    target.mkdir(parents=True)
    placeholder.be_placed(str(target), soon)
    try:
        plugin = nri.Plugin(claims, detector(tmp_path).of_handler)
        with pytest.raises(ttrpc.RpcError, match="cannot be read"):
            plugin.CreateContainer(asked(bind(str(target)), runtime_handler="kata-qemu"))
        assert not plugin.CreateContainer(asked(bind(str(target)), runtime_handler="runc")).HasField("adjust")
        assert not plugin.CreateContainer(asked(bind("/somewhere"), runtime_handler="kata-qemu")).HasField("adjust")
    finally:
        subprocess.run(["umount", target], check=True)


def test_only_claims_that_changed_are_read_again(claims, monkeypatch):
    from guestmount import claims as room

    read, real = [], room._read
    monkeypatch.setattr(room, "_read", lambda path: read.append(path) or real(path))
    for number in range(50):
        write(claims, claim().but(volume=f"nfs-{number}", targets={f"{TARGET}{number}": claim().targets[TARGET]}))
    plugin = nri.Plugin(claims)
    read.clear()
    for _ in range(3):
        plugin.CreateContainer(asked(bind("/other")))
    assert len(read) == 50
    write(claims, claim().but(volume="nfs-7"))
    read.clear()
    assert plugin.CreateContainer(asked(bind())).adjust.mounts and len(read) == 1


def detector(tmp_path: Path, default: str = "kata-qemu") -> Detector:
    path = tmp_path / "containerd.toml"
    tables = "".join(
        f'[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.{name}]\nruntime_type = "{kind}"\n'
        for name, kind in (("runc", "io.containerd.runc.v2"), ("kata-qemu", "io.containerd.kata-qemu.v2"),
                           ("rund", "io.containerd.rund.v2"))
    )  # fmt: skip
    text = f'[plugins."io.containerd.cri.v1.runtime".containerd]\ndefault_runtime_name = "{default}"\n'
    path.write_text(text + tables)
    return Detector(DetectSettings(containerd_config=str(path), root=str(tmp_path)))


@pytest.mark.parametrize(
    ("handler", "default", "mounted"),
    [("kata-qemu", "runc", True), ("", "kata-qemu", True), ("", "runc", False), ("runc", "kata-qemu", False),
     ("rund", "kata-qemu", False), ("nobody-knows", "kata-qemu", False)],
)  # fmt: skip
def test_the_claims_own_pod_is_served_under_whatever_handler_starts_kata(claims, tmp_path, handler, default, mounted):
    """`runtime: sandbox` and a default name one handler, and the pod may run with another."""
    write(claims, claim())
    plugin = nri.Plugin(claims, detector(tmp_path, default).of_handler)
    assert bool(plugin.CreateContainer(asked(bind(), runtime_handler=handler)).adjust.mounts) is mounted
    with pytest.raises(ttrpc.RpcError):
        plugin.CreateContainer(asked(bind(), runtime_handler=handler, uid="v"))


def test_an_untrusted_pod_has_the_handler_of_its_annotation(claims, tmp_path):
    target = Target(read_only=False, pod_uid="u", handler="untrusted", dialect="kata")
    write(claims, claim().but(targets={TARGET: target}))
    request = asked(bind(), runtime_handler="")
    assert not nri.Plugin(claims).CreateContainer(request).adjust.mounts
    request.pod.annotations["io.kubernetes.cri.untrusted-workload"] = "true"
    assert nri.Plugin(claims).CreateContainer(request).adjust.mounts


def test_only_the_targets_own_pod_is_told_to_have_the_placeholder(claims, caplog):
    write(claims, claim())
    pods = [pb.PodSandbox(id=uid, uid=uid, namespace="d", runtime_handler="kata") for uid in ("u", "v")]
    containers = [pb.Container(id=f"c-{pod}", pod_sandbox_id=pod, mounts=[bind()]) for pod in ("u", "v", "gone")]
    nri.Plugin(claims).Synchronize(pb.SynchronizeRequest(pods=pods, containers=containers))
    assert [record.id for record in caplog.records if record.levelname == "ERROR"] == ["c-u", "c-gone"]


def test_it_comes_back_after_whatever_ends_a_connection(runtime, claims, tmp_path, monkeypatch):
    """A thread that cannot be started is no OSError."""
    failing = iter([RuntimeError("can't start new thread"), ValueError("no varint"), KeyError("x")])
    connected = nri._connected

    def fails_at_first(*arguments):
        for error in failing:
            raise error
        connected(*arguments)

    monkeypatch.setattr(nri, "_connected", fails_at_first)
    stop = threading.Event()
    arguments = (nri.Plugin(claims), str(tmp_path / "run"), str(tmp_path / "nri.sock"), stop)
    thread = threading.Thread(target=nri.serve, args=arguments)
    thread.start()
    try:
        runtime.accept()
        assert runtime.registered.wait(5)
    finally:
        stop.set()
        thread.join(15)
    assert not thread.is_alive()


def test_a_damaged_claim_stops_no_container(claims, tmp_path):
    write(claims, claim())
    (Path(claims.directory) / "other.json").write_bytes(b"\xff{")
    (mount,) = nri.Plugin(claims).CreateContainer(asked(bind())).adjust.mounts
    assert mount.type == "nfs4"


def test_it_is_fast_among_many_claims(claims):
    for number in range(200):
        write(
            claims,
            claim().but(
                volume=f"nfs-{number}",
                targets={f"{TARGET}{number}": Target(read_only=False, pod_uid="u", handler="kata", dialect="kata")},
            ),
        )
    write(claims, claim().but(volume="nfs-x"))
    started = time.monotonic()
    assert nri.Plugin(claims).CreateContainer(asked(bind())).adjust.mounts
    assert time.monotonic() - started < 0.5


def test_a_life_with_a_runtime(plugin, runtime, claims, tmp_path):
    write(claims, claim())
    client = runtime.accept()
    # As the real runtime does at times: Configure before the registration is answered.
    events = client.call(
        SERVICE, "Configure", pb.ConfigureRequest(runtime_name="containerd"), pb.ConfigureResponse, 5
    ).events
    assert events == 1 << 3
    assert runtime.registered.wait(5)
    first = client.call(SERVICE, "Synchronize", pb.SynchronizeRequest(more=True), pb.SynchronizeResponse, 5)
    last = client.call(SERVICE, "Synchronize", pb.SynchronizeRequest(), pb.SynchronizeResponse, 5)
    assert (first.more, last.more) == (True, False)
    assert client.call(SERVICE, "CreateContainer", asked(bind()), pb.CreateContainerResponse, 5).adjust.mounts
    client.call(SERVICE, "StateChange", pb.StateChangeEvent(event=1), pb.Empty, 5)
    with pytest.raises(ttrpc.RpcError) as caught:
        client.call(SERVICE, "RunPodSandbox", pb.Empty(), pb.Empty, 5)
    assert caught.value.code == ttrpc.UNIMPLEMENTED


def test_it_says_when_it_is_registered_and_comes_back_for_ever(plugin, runtime, tmp_path):
    run = str(tmp_path / "run")
    for _ in range(3):
        assert not registration.is_alive(run)
        runtime.accept()
        assert runtime.registered.wait(5)
        until = time.monotonic() + 5
        while not registration.is_alive(run):
            assert time.monotonic() < until
            time.sleep(0.02)
        runtime.hang_up()
        while registration.is_alive(run):
            assert time.monotonic() < until + 5
            time.sleep(0.02)


def test_who_asks_in_that_moment_does_not_refuse_the_registration(tmp_path) -> None:
    run = str(tmp_path)
    with registration.opened(run) as fd:
        held = os.open(os.path.join(run, os.listdir(run)[0]), os.O_RDWR)
        fcntl.flock(held, fcntl.LOCK_SH)
        threading.Timer(0.1, fcntl.flock, (held, fcntl.LOCK_UN)).start()
        registration.begun(fd)
        assert registration.is_alive(run)
        with registration.opened(run) as other, pytest.raises(BlockingIOError):
            registration.begun(other)
        os.close(held)


def test_large_messages_go_in_frames_that_a_go_peer_takes_and_come_in_any() -> None:
    mine, theirs = socket.socketpair()
    mux = Mux(mine)
    sent = bytes(range(256)) * 100
    threading.Thread(target=mux.stream(PLUGIN).write, args=(sent,), daemon=True).start()
    got, largest = b"", 0
    while len(got) < len(sent):
        header = theirs.recv(8, socket.MSG_WAITALL)
        number, length = struct.unpack(">II", header)
        assert number == PLUGIN
        largest = max(largest, length)
        got += theirs.recv(length, socket.MSG_WAITALL)
    assert got == sent
    assert largest <= 4096
    # Split in the middle of headers, joined with frames of an unknown connection, and one of a megabyte.
    data = (
        struct.pack(">II", 9, 3)
        + b"xyz"
        + struct.pack(">II", RUNTIME, 1 << 20)
        + b"a" * (1 << 20)
        + struct.pack(">II", RUNTIME, 2)
        + b"bc"
    )

    def dribble() -> None:
        for at in range(0, len(data), 70_001):
            theirs.sendall(data[at : at + 70_001])
        theirs.close()

    threading.Thread(target=dribble, daemon=True).start()
    assert ttrpc.read_exactly(mux.stream(RUNTIME), (1 << 20) + 2) == b"a" * (1 << 20) + b"bc"
    assert mux.stream(RUNTIME).read(1) == b""
    assert mux.stream(PLUGIN).read(1) == b""


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 64, b"\0" * 7])
def test_what_is_no_multiplexer_ends_the_connection(garbage):
    mine, theirs = socket.socketpair()
    mux = Mux(mine)
    theirs.sendall(garbage)
    theirs.close()
    assert mux.stream(PLUGIN).read(1) == b""
