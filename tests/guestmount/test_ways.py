"""The table of sources and runtimes is one place: a claim names its way, and nobody derives it again."""

from __future__ import annotations

import ast
from pathlib import Path

import msgspec
import pytest

import guestmount
from guestmount import ways
from guestmount.claims import HOST, SANDBOX, Claim, NfsMount, Owner, Target, Use
from guestmount.detect import Runtime
from guestmount.requests import PublishRequest
from volumes import AccessMode, BlockSource, Capability, DirectorySource, NfsSource, VolumeKind

ROOM = Path(guestmount.__file__).parent
RWO = Capability(mode=AccessMode.SINGLE_NODE_WRITER)
NFS = NfsSource(server="nas", path="/", version="4.1")
# source, raw, context: the way for a runc pod and for a sandbox
TABLE = [
    (BlockSource(path="/a"), False, {}, "mounted", "guest-device"),
    (BlockSource(path="/a"), True, {}, "device-node", "device-node"),
    (DirectorySource(path="/a"), False, {}, "shared", "shared"),
    (NFS, False, {}, "shared", "guest-mount"),
    (NFS, False, {"inSandbox": "share"}, "shared", "shared"),
]


@pytest.mark.parametrize(("source", "raw", "context", "host", "sandbox"), TABLE)
def test_each_cell_of_the_table_is_one_way(source, raw, context, host, sandbox):
    row = ways.of_source(source, raw=raw)
    claim = Claim(volume="v", source="/a", staging_path="/s", use=Use.of(RWO, ""))
    request = PublishRequest(volume_id="v", staging_path="/s", target="/t", capability=RWO, context=context)
    for kind, way in ((HOST, host), (SANDBOX, sandbox)):
        assert row.way(claim, request, Runtime(kind=kind, handler="h", source="test")).name == way


@pytest.mark.parametrize(
    ("changes", "target", "way"),
    [
        ({"owner": Owner(kind=HOST)}, {}, "mounted"),
        ({"owner": Owner(kind=SANDBOX, dialect="kata")}, {}, "guest-device"),
        ({"owner": Owner(kind=SANDBOX, dialect="kata"), "use": Use(mode="single_node_writer", raw=True)}, {},
         "device-node"),
        ({"kind": VolumeKind.FILES}, {}, "shared"),
        ({"kind": VolumeKind.FILES, "nfs": NfsMount(server="nas", path="/", version="3")}, {}, "shared"),
        ({"kind": VolumeKind.FILES, "nfs": NfsMount(server="nas", path="/", version="3")}, {"dialect": "kata"},
         "guest-mount"),
    ],
)  # fmt: skip
def test_a_claim_of_an_older_release_says_its_way_by_what_it_holds(changes, target, way):
    claim = Claim(volume="v", source="/a", staging_path="/s", use=Use(mode="single_node_writer"))
    claim = claim.but(targets={"/t": Target(read_only=False, pod_uid="u", **target)}, **changes)
    assert ways.way_at(claim, "/t").name == way
    # What it says itself counts, whatever else has become of the claim.
    said = msgspec.structs.replace(claim.targets["/t"], way="shared")
    assert ways.way_at(claim.but(targets={"/t": said}), "/t").name == "shared"


WORDS = {"kind", "raw", "nfs", "dialect"}
DECIDERS = ("node.py", "usage.py", "repair.py", "witnesses.py", "agreement.py")


@pytest.mark.parametrize("module", DECIDERS)
def test_nothing_outside_the_ways_decides_by_what_a_volume_is(module):
    found = []
    for node in ast.walk(ast.parse((ROOM / module).read_text())):
        asked = getattr(node, "test", None) if isinstance(node, ast.If | ast.IfExp | ast.While) else None
        if isinstance(node, ast.Compare | ast.BoolOp):
            asked = node
        # What an error is says nothing of a volume.
        told = isinstance(node, ast.Call) and node.args and getattr(node.args[0], "id", "") == "error"
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance" and not told:
            found.append(node.lineno)
        for part in ast.walk(asked) if asked is not None else ():
            if isinstance(part, ast.Attribute) and part.attr in WORDS:
                found.append(part.lineno)
    assert not found, f"{module}, lines {sorted(set(found))}: ask the row or the way"
