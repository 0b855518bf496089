"""Each sentence that docs/troubleshooting.md quotes is still said by the code."""

from __future__ import annotations

import functools
import json
import re
import subprocess

import grpc
import pytest

from runvol_proto import csi_pb2
from tests.documents import ROOT, said_by_the_code
from tests.driver import Driver

PAGE = (ROOT / "docs/troubleshooting.md").read_text()
ROWS = [re.split(r"(?<!\\) \| ", line.strip("| ")) for line in PAGE.splitlines() if line.startswith("| ")][2:]
QUOTES = sorted(
    {quote for row in ROWS for quote in re.findall(r"`` (.+?) ``|`([^`]+)`", row[0]) for quote in quote if quote}
)
# Not runvol's own words: who says them.
OTHERS = {
    "Scheduled": "kubelet", "did not have enough free storage": "the scheduler", "Last State": "kubectl",
    "dial unix /run/runvol/csi.sock: connect: …": "kubelet", "no volume plugin matched": "kubelet",
    "driver name csi.runvol.io not found in the list of registered CSI drivers": "kubelet",
    "Read-only file system": "the kernel", "401": "the API server", "403": "the API server", "RUNVOL-PLACEHOLDER": "a file", "runvol nri": "a command",
    "runvol images": "a command", "doctor": "a command", "unable to open database file": "SQLite",
    "inSandbox: share": "a parameter", "cri.endpoint": "a setting",
}  # fmt: skip


@functools.cache
def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"[A-Za-z]{3,}", text))


def _alike(fragment: str, template: str) -> int:
    """How many letters of `fragment` stand in `template`, whose `…` may be anything; 0 if it does not fit."""
    best: dict[int, int] = dict.fromkeys(range(len(template) + 1), 0)
    for letter in fragment:
        following: dict[int, int] = {}
        for place, count in best.items():
            at = place
            while at < len(template) and template[at] == "…":
                following[at] = max(following.get(at, -1), count)  # eats it
                at += 1
            if at < len(template) and template[at] == letter:
                following[at + 1] = max(following.get(at + 1, -1), count + 1)
        best = following
        if not best:
            return 0
    return max(best.values())


@functools.cache
def _all() -> str:
    return "\n".join(said_by_the_code())


def _in_runs(fragment: str) -> bool:
    """Three of five of its words stand in the code in runs of three: a sentence that is put together of several texts."""
    words, covered = fragment.split(), set[int]()
    for start in range(len(words) - 2):
        if " ".join(words[start : start + 3]) in _all():
            covered |= {start, start + 1, start + 2}
    return len(covered) * 5 >= len(words) * 3


def is_said(fragment: str) -> bool:
    """It stands in a text of the code but for a value in it (two fifths of its letters), or is put together of some."""
    if _in_runs(fragment):
        return True
    wanted = _words(fragment)
    for template in said_by_the_code():
        if fragment in template:
            return True
        if len(wanted & _words(template)) * 3 >= len(wanted) * 2 and _alike(fragment, template) >= 0.6 * len(fragment):
            return True
    return False


def fragments(quote: str) -> list[str]:
    """What stands between the variable parts, where it is more than a word."""
    parts = [part.strip(" ,;:()='") for part in quote.split("…")]
    return [part for part in parts if len(part.split()) > 3] or [max(parts, key=len)]


@pytest.mark.parametrize("quote", [quote for quote in QUOTES if quote not in OTHERS])
def test_a_quoted_sentence_is_said(quote: str) -> None:
    assert [part for part in fragments(quote) if not is_said(part)] == []


def test_what_was_never_said_is_not_taken_for_said() -> None:
    assert not is_said("volume pvc-1 sleeps, since nobody of its pods came")
    assert not is_said("is not blank, and formatted all the same")


@pytest.mark.kernel
def test_the_wiping_that_is_told_makes_a_volume_blank(driver: Driver) -> None:
    """As the row of `is not blank` has it."""
    (command,) = re.findall(r"`(truncate [^`]+)`", PAGE)
    image = driver.directory / "old.img"
    image.write_bytes(b"data" + bytes((16 << 20) - 4))
    (row,) = json.loads(driver.cli("volumes", "adopt", str(image), "--name", "old", "--json").stdout)["items"]
    volume = csi_pb2.Volume(volume_id=row["volume"])
    with pytest.raises(grpc.RpcError) as refused:
        driver.stage(volume)
    (path,) = re.findall(r"^(/\S+) is not blank", refused.value.details())
    subprocess.run(["sh", "-c", command.replace("FILE", path).replace("BYTES", str(16 << 20))], check=True)
    driver.stage(volume)
    driver.unstage(volume)
