"""A look at the node's volumes goes on past whatever one of them does."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from blockdev import Deadline
from guestmount import Claims, survey, ways
from guestmount.claims import HOST, SANDBOX, Claim, Owner, Target, Use
from guestmount.survey import Survey
from guestmount.ways import Usage
from guestmount.ways.base import of_mount

USE = Use(mode="single_node_writer")


def node(tmp_path: Path, *claims: Claim, backends: tuple[object, ...] = ()) -> SimpleNamespace:
    records = Claims(str(tmp_path))
    for claim in claims:
        with records.locked(claim.volume, Deadline.after(5)) as cell:
            cell.write(claim)
    catalog = SimpleNamespace(backends=backends, of=lambda _id: SimpleNamespace(name="loop"))
    return SimpleNamespace(claims=records, detector=SimpleNamespace(pods=None), catalog=catalog, dialects=())


def claim(name: str, kind: str = HOST, **more: object) -> Claim:
    target = Target(read_only=False, pod_uid=name, pod_namespace="n", pod_name=name, way="mounted")
    return Claim(volume=name, source=f"/nowhere/{name}", staging_path="/s", use=USE, owner=Owner(kind=kind),
                 targets={f"/t/{name}": target}, **more)  # fmt: skip


def look(one: Survey) -> dict[str, survey.Surveyed]:
    one.look()
    return {volume.volume: volume for volume in one.seen.volumes}


def test_one_volume_that_nobody_expected_costs_no_other_its_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(claim: Claim, _path: str, _deadline: Deadline) -> Usage:
        if claim.volume == "odd":
            raise ValueError("of nobody's making")
        return Usage(total_bytes=10, used_bytes=1, available_bytes=9)

    class Backend:
        name, multi_node = "loop", False

        def list(self) -> list[object]:
            raise KeyError("x")

    monkeypatch.setattr(survey.usage, "measure", measured)
    found = look(Survey(node(tmp_path, claim("odd"), claim("well"), backends=(Backend(),)), interval=30, most=10))
    assert found["well"].usage == Usage(total_bytes=10, used_bytes=1, available_bytes=9)
    assert found["odd"].trouble == "ValueError: of nobody's making" and found["odd"].usage is None


def test_a_file_on_a_server_that_is_dead_costs_its_volume_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(survey, "_ONE", 0.2)
    monkeypatch.setattr(survey, "_LIST", 0.2)
    monkeypatch.setattr(survey.usage, "measure", lambda *_: Usage(total_bytes=1, used_bytes=0, available_bytes=1))
    monkeypatch.setattr(survey.ioctls, "is_block", lambda path: "dead" in path and time.sleep(20))
    monkeypatch.setattr(survey.holders, "openers", lambda _paths: time.sleep(20))
    one = Survey(node(tmp_path, claim("dead", SANDBOX), claim("well", SANDBOX)), interval=30, most=10)
    began = time.monotonic()
    assert look(one).keys() == look(one).keys() == {"dead", "well"}
    assert time.monotonic() - began < 5


def test_what_a_server_says_of_itself_fits_into_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    most, huge = (1 << 63) - 1, (1 << 64) - 1
    said = os.statvfs_result((4096, 1 << 20, huge, 0, huge, 5, 9, huge, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda _path: said)
    found = of_mount("/x", Deadline.after(5))
    assert (found.total_bytes, found.used_bytes, found.available_bytes) == (most, most, most)
    assert (found.inodes, found.used_inodes, found.free_inodes) == (5, 0, most), "more free than there are"
    assert ways.Usage is Usage
