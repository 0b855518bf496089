"""The short round of the kernel tier, in the kernel that it needs."""

from __future__ import annotations

import re

import pytest

from tests.kernel.__main__ import INSIDE, run


@pytest.mark.kernel
def test_a_short_round_of_the_kernel_tier(capsys: pytest.CaptureFixture[str]) -> None:
    code, output = run(["-m", "short", "-q", "--no-header", INSIDE], show=False)
    assert code == 0, output[-6000:]
    passed = re.search(r"(\d+) passed", output)
    assert passed, output[-2000:]
    assert int(passed[1]) >= 60, f"only {passed[1]} tests ran"
    with capsys.disabled():
        print(f"\n  in the kernel that has device-mapper: {output.strip().splitlines()[-1]}")
