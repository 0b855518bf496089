"""csi-sanity for volumes on NFS, against the kernel's own server: everything that the driver says it can do."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.kernel.inside.nfs import ROOT, KernelNfs
from tests.sanity import skips, wrapper


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KernelNfs]:
    one = KernelNfs(tmp_path_factory.mktemp("nfs") / "exported")
    one.start()
    (ROOT / "share").mkdir(exist_ok=True)
    yield one
    one.close()


# Two minutes each: `make test-long` has all. Under the driver's own name, and under that of all volumes.
OWN_NAME = [("sandbox", "nfs")]
ALL = [*OWN_NAME, ("runc", "nfs"), ("sandbox", "nodes")]


@pytest.mark.parametrize(("runtime", "driver"), ALL if int(os.environ.get("RUNVOL_SUITES", "1")) > 1 else OWN_NAME)
def test_csi_sanity(server: KernelNfs, runtime: str, driver: str, capsys: pytest.CaptureFixture[str]) -> None:
    report = wrapper.run(wrapper.Configuration(runtime, "mount", "nfs", driver))
    assert sorted(report.outcomes) == sorted(wrapper.must_run())
    states = {spec: outcome for spec, outcome in report.outcomes.items() if skips.reason(spec, "nfs") is None}
    wrong = {spec: outcome.message[:500] for spec, outcome in states.items() if outcome.state != "passed"}
    assert not wrong, f"{wrong}\n{report.log[-3000:]}"
    left = {what: found for what, found in report.left_over.items() if found}
    assert not left
    assert [name for name in os.listdir(ROOT / "share") if name != ".runvol"] == []
    assert os.listdir(ROOT / "share/.runvol") == ["lock"]
    with capsys.disabled():
        print(
            f"\n  {runtime}, driver of {driver}: {len(states)} specs passed, {len(report.outcomes) - len(states)} have no meaning ",
            end="",
        )
