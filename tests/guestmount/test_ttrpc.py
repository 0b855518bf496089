"""ttRPC: the wire's vectors, split and joined frames, and both sides' duties."""

from __future__ import annotations

import socket
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guestmount import ttrpc
from runvol_proto import kata_agent_pb2, kata_csi_pb2, kata_health_pb2, ttrpc_pb2

HEALTH, AGENT = "grpc.Health", "grpc.AgentService"


class Health:
    def Check(self, request):
        if request.service == "slow":
            time.sleep(0.5)
        if request.service == "bad":
            raise ttrpc.RpcError(5, "no such service")
        if request.service == "bug":
            raise KeyError("oops")
        return kata_health_pb2.HealthCheckResponse(status=1)

    def Version(self, request):
        return kata_health_pb2.VersionCheckResponse(grpc_version=request.service)


class Agent:
    def ResizeVolume(self, request):
        raise ttrpc.RpcError(ttrpc.UNIMPLEMENTED, "resize_volume is not implemented in kata-agent")


class SocketStream(ttrpc.FileStream):
    """One that hands out at most `most` bytes a read."""

    def __init__(self, end, most=1 << 16):
        super().__init__(end.detach())
        self.most = most

    def read(self, count):
        return super().read(min(count, self.most))


@pytest.fixture(params=[1 << 16, 3], ids=["whole", "in pieces"])
def wire(request):
    here, there = socket.socketpair()
    services = [
        ttrpc.Service(kata_health_pb2.DESCRIPTOR.services_by_name["Health"], Health()),
        ttrpc.Service(kata_agent_pb2.DESCRIPTOR.services_by_name["AgentService"], Agent()),
    ]
    server = ttrpc.Server(SocketStream(there, request.param), services)
    thread = threading.Thread(target=server.serve, daemon=True)
    thread.start()
    yield here
    try:
        here.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
    thread.join(5)
    assert not thread.is_alive()


@pytest.fixture
def client(wire):
    return ttrpc.Client(ttrpc.FileStream(wire.dup().detach()))


def check(client, service="", timeout=5.0):
    return client.call(
        HEALTH, "Check", kata_health_pb2.CheckRequest(service=service), kata_health_pb2.HealthCheckResponse, timeout
    )


def receive(wire, count):
    data = b""
    while len(data) < count:
        data += wire.recv(count - len(data))
    return data


def test_the_envelope_is_the_references():
    request = ttrpc_pb2.Request(
        service="grpc.TestServices", method="Test", payload=bytes(range(1, 10)), timeout_nano=20_000_000
    )
    request.metadata.add(key="test_key1", value="test_value1")
    assert request.SerializeToString().hex() == (
        "0a11677270632e5465737453657276696365731204546573741a090102030405060708092080dac4092a180a09746573745f6b657931120b746573745f76616c756531"
    )


def test_storage_messages_are_the_references():
    storage = kata_agent_pb2.Storage(driver="blk", source="02/03", fstype="ext4", options=["noatime"],
                                     mount_point="/run/kata-containers/sandbox/storage/MDIvMDM=")  # fmt: skip
    storage.fs_group.group_id, storage.fs_group.group_change_policy = 1000, 1
    assert storage.SerializeToString().hex() == (
        "0a03626c6b1a0530322f30332204657874342a076e6f6174696d65322d2f72756e2f6b6174612d636f6e7461696e6572732f73616e64626f782f73746f726167652f4d4449764d444d3d3a0510e8071801"
    )
    assert kata_agent_pb2.VolumeStatsRequest(volume_guest_path="/run/x").SerializeToString().hex() == "0a062f72756e2f78"
    answer = kata_csi_pb2.VolumeStatsResponse(volume_condition=kata_csi_pb2.VolumeCondition(message="OK"))
    answer.usage.add(available=6, total=10, used=4, unit=1)
    answer.usage.add(available=90, total=100, used=10, unit=2)
    assert answer.SerializeToString().hex() == "0a080806100a180420010a08085a1064180a2002120412024f4b"


def test_frames_on_the_wire_are_the_references(wire):
    wire.sendall(bytes.fromhex("000000140000000101000a0b677270632e4865616c74681205436865636b"))
    assert receive(wire, 14).hex() == "0000000400000001020012020801"
    wire.sendall(bytes.fromhex(
        "000000370000000301000a11677270632e4167656e7453657276696365120c526573697a65566f6c756d651a0e0a062f72756e2f781080808080042080e497d012"))  # fmt: skip
    assert receive(wire, 62).hex() == (
        "000000340000000302000a32080c122e726573697a655f766f6c756d65206973206e6f7420696d706c656d656e74656420696e206b6174612d6167656e74"
    )


def test_calls_run_beside_each_other_and_are_answered_in_any_order(client):
    started, order = time.monotonic(), []

    def call(service):
        check(client, service)
        order.append(service)

    threads = [threading.Thread(target=call, args=(service,)) for service in ("slow", "slow", "quick")]
    for thread in threads:
        thread.start()
        time.sleep(0.02)
    for thread in threads:
        thread.join()
    assert order[0] == "quick" and time.monotonic() - started < 0.9


@pytest.mark.parametrize(
    ("service", "method", "code", "words"),
    [("no.Such", "Check", 12, "service no.Such"), (HEALTH, "Nothing", 12, "method Nothing")],
)
def test_unknown_services_and_methods_are_unimplemented(client, service, method, code, words):
    with pytest.raises(ttrpc.RpcError, match=words) as caught:
        client.call(service, method, kata_health_pb2.CheckRequest(), kata_health_pb2.HealthCheckResponse, 5)
    assert caught.value.code == code


def test_errors_of_handlers_reach_the_caller(client):
    with pytest.raises(ttrpc.RpcError, match="no such service") as caught:
        check(client, "bad")
    assert caught.value.code == 5
    with pytest.raises(ttrpc.RpcError, match="KeyError") as caught:
        check(client, "bug")
    assert caught.value.code == ttrpc.INTERNAL
    check(client)


def test_a_caller_that_gives_up_is_not_confused_by_the_late_answer(client):
    with pytest.raises(ttrpc.RpcError, match="did not answer") as caught:
        check(client, "slow", timeout=0.1)
    assert caught.value.code == ttrpc.DEADLINE_EXCEEDED
    time.sleep(0.6)
    check(client)


@pytest.mark.parametrize(
    ("ids", "words"), [([2], "must be odd"), ([3, 3], "must increment"), ([5, 1], "must increment")]
)
def test_stream_ids_are_odd_and_increase(wire, ids, words):
    body = ttrpc_pb2.Request(service=HEALTH, method="Check").SerializeToString()
    answers = []
    for number in ids:
        wire.sendall(ttrpc.frame(number, ttrpc.REQUEST, body))
        length, _, _, _ = ttrpc.HEADER.unpack(receive(wire, 10))
        answers.append(ttrpc_pb2.Response.FromString(receive(wire, length)))
    assert answers[-1].status.code == 3 and words in answers[-1].status.message


def test_a_frame_that_is_too_large_is_refused_and_the_stream_goes_on(wire):
    wire.sendall(ttrpc.HEADER.pack(ttrpc.LARGEST + 1, 1, 1, 0))
    threading.Thread(target=lambda: wire.sendall(bytes(ttrpc.LARGEST + 1))).start()
    length, stream, kind, _ = ttrpc.HEADER.unpack(receive(wire, 10))
    assert (stream, kind) == (1, 2) and ttrpc_pb2.Response.FromString(receive(wire, length)).status.code == 8
    wire.sendall(ttrpc.frame(3, 1, ttrpc_pb2.Request(service=HEALTH, method="Check").SerializeToString()))
    assert receive(wire, 14)[4:8] == (3).to_bytes(4, "big")


def test_a_large_answer_comes_whole(client):
    text = "x" * (3 << 20)
    answer = client.call(
        HEALTH, "Version", kata_health_pb2.CheckRequest(service=text), kata_health_pb2.VersionCheckResponse, 20
    )
    assert answer.grpc_version == text
    with pytest.raises(ttrpc.RpcError, match="larger"):
        client.call(
            HEALTH,
            "Version",
            kata_health_pb2.CheckRequest(service="x" * (5 << 20)),
            kata_health_pb2.VersionCheckResponse,
            5,
        )


def test_a_closed_stream_fails_what_waits_and_what_comes():
    here, there = socket.socketpair()
    client = ttrpc.Client(ttrpc.FileStream(here.detach()))
    threading.Timer(0.2, there.close).start()
    with pytest.raises(ttrpc.Closed):
        check(client)
    with pytest.raises(ttrpc.Closed):
        check(client)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.one_of(st.binary(max_size=60), st.tuples(st.integers(0, 9), st.integers(0, 5), st.binary(max_size=40))),
        max_size=6,
    )
)
def test_no_bytes_bring_the_server_down(parts):
    here, there = socket.socketpair()
    service = ttrpc.Service(kata_health_pb2.DESCRIPTOR.services_by_name["Health"], Health())
    server = threading.Thread(target=ttrpc.Server(ttrpc.FileStream(there.detach()), [service]).serve, daemon=True)
    server.start()
    for part in parts:
        here.sendall(part if isinstance(part, bytes) else ttrpc.frame(*part))
    here.close()
    server.join(5)
    assert not server.is_alive()
