"""Three controllers on one share, killed at random and started empty: every answer stays true, and nothing is left."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.driver import Driver, mount_capability
from tests.kernel.inside.nfs import ROOT, KernelNfs

RWX = mount_capability("MULTI_NODE_MULTI_WRITER")
MIB = 1 << 20
SHARE = ROOT / "controllers"
CONTROLLER = {"RUNVOL_CSI_SERVICES": "identity,controller", "RUNVOL_VOLUMES_BACKENDS": "nfs"}
# What a sidecar asks again after.
AGAIN = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.ABORTED, grpc.StatusCode.DEADLINE_EXCEEDED)


class Controllers:
    """`asked`: what was answered, by call and code."""

    def __init__(self, directory: Path, count: int, seed: int) -> None:
        self._drivers = [Driver(directory / f"d{number}", CONTROLLER) for number in range(count)]
        self.chance, self.asked, self.kills = random.Random(seed), Counter[str](), 0
        self._over = threading.Event()
        for one in self._drivers:
            one.start(repaired=False, names=("nfs",))
        self._killer = threading.Thread(target=self._kill, daemon=True)
        self._killer.start()

    def _kill(self) -> None:
        dice = random.Random(self.chance.random())
        while not self._over.wait(dice.uniform(0.2, 2.0)):
            one = dice.choice(self._drivers)
            one.kill()
            self.kills += 1
            shutil.rmtree(one.state, ignore_errors=True)
            with contextlib.suppress(RuntimeError):
                one.start(repaired=False, names=("nfs",))

    def until_done(self, what: str, call: Callable[[Any], Any]) -> Any:
        """Asked of one after the other, as sidecars with a leader election do."""
        until = time.monotonic() + 120
        while True:
            client = self.chance.choice(self._drivers).client
            try:
                answer = call(client)
                self.asked[f"{what} OK"] += 1
                return answer
            except (grpc.RpcError, AttributeError, ValueError) as error:  # a client is away while its driver starts
                code = error.code() if isinstance(error, grpc.RpcError) else grpc.StatusCode.UNAVAILABLE
                self.asked[f"{what} {code.name}"] += 1
                told = error.details() if isinstance(error, grpc.RpcError) else ""
                assert code in (*AGAIN, grpc.StatusCode.CANCELLED), f"{what}: {code} {told}"
                assert time.monotonic() < until, f"{what}: {code} {told}"
                time.sleep(0.1)

    def close(self) -> None:
        self._over.set()
        self._killer.join()
        for one in self._drivers:
            one.stop()
            one.remove()


def test_three_controllers_killed_and_started_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rounds, seed = int(os.environ.get("RUNVOL_ROUNDS", "3")), 20261127
    server = KernelNfs(tmp_path / "exported")
    server.start()
    SHARE.mkdir(mode=0o777)
    SHARE.chmod(0o777)
    many = Controllers(tmp_path, 3, seed)
    began = time.monotonic()
    parameters = {"server": "127.0.0.1", "path": str(SHARE), "archiveOnDelete": "false", "vers": "4.2"}
    try:
        for number in range(rounds):
            _round(many, number, parameters)
            left = [name for name in _names() if name != ".runvol/lock"]
            assert not left, f"after round {number}: {left}"
    finally:
        many.close()
        server.close()
    with capsys.disabled():
        told = ", ".join(f"{what}: {count}" for what, count in sorted(many.asked.items()))
        print(
            f"\n  {rounds} rounds, {many.kills} kills, {time.monotonic() - began:.0f} s, seed {seed}: {told} ", end=""
        )


def _round(many: Controllers, number: int, parameters: dict[str, str]) -> None:
    def create(name: str, **source: Any) -> Any:
        size = {"required_bytes": 4 * MIB}
        return many.until_done("create", lambda client: client.CreateVolume(
            name=name, capacity_range=size, volume_capabilities=[RWX], parameters=parameters,
            timeout=20, **({"volume_content_source": source} if source else {})).volume)  # fmt: skip

    first = create(f"first-{number}")
    place = Path(first.volume_context["path"])
    content = os.urandom(2 * MIB)
    (place / "data").write_bytes(content)
    assert create(f"first-{number}").volume_id == first.volume_id
    grown = many.until_done("expand", lambda client: client.ControllerExpandVolume(
        volume_id=first.volume_id, capacity_range={"required_bytes": 8 * MIB}, timeout=20))  # fmt: skip
    assert grown.capacity_bytes == 8 * MIB
    while True:
        taken = many.until_done("snapshot", lambda client: client.CreateSnapshot(
            name=f"s-{number}", source_volume_id=first.volume_id, timeout=20).snapshot)  # fmt: skip
        if taken.ready_to_use:
            break
    restored = create(f"restored-{number}", snapshot={"snapshot_id": taken.snapshot_id})
    cloned = create(f"cloned-{number}", volume={"volume_id": first.volume_id})
    for volume in (first, restored, cloned):
        assert (Path(volume.volume_context["path"]) / "data").read_bytes() == content
        found = many.until_done("get", lambda client, volume=volume: client.ControllerGetVolume(
            volume_id=volume.volume_id, timeout=20).volume)  # fmt: skip
        assert found.volume_id == volume.volume_id
        assert found.capacity_bytes == 8 * MIB
    listed = many.until_done("list", lambda client: _made_known(client, parameters))
    assert {first.volume_id, restored.volume_id, cloned.volume_id} <= listed
    gone = [("delete", lambda client, volume=volume: client.DeleteVolume(volume_id=volume.volume_id, timeout=20))
            for volume in (first, restored, cloned)]  # fmt: skip
    gone.append(("delete snapshot", lambda client: client.DeleteSnapshot(snapshot_id=taken.snapshot_id, timeout=20)))
    many.chance.shuffle(gone)
    for what, call in gone:
        many.until_done(what, call)


def _made_known(client: Any, parameters: dict[str, str]) -> set[str]:
    """A controller that was started empty lists an export once it has worked there."""
    made = client.CreateVolume(
        name="known",
        capacity_range={"required_bytes": MIB},
        volume_capabilities=[RWX],
        parameters=parameters,
        timeout=20,
    )
    found = {one.volume.volume_id for one in client.ListVolumes(timeout=20).entries}
    client.DeleteVolume(volume_id=made.volume.volume_id, timeout=20)
    return found


def _names() -> list[str]:
    return [str(path.relative_to(SHARE)) for path in SHARE.rglob("*") if path.name != ".runvol"]
