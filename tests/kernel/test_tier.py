"""The short round of the kernel tier, in the kernel that it needs."""

from __future__ import annotations

import re

import pytest

from tests.kernel.__main__ import INSIDE, run


@pytest.mark.kernel
def test_a_short_round_of_the_kernel_tier(capsys: pytest.CaptureFixture[str]) -> None:
    code, output = run(["-m", "short", "-q", "--no-header", INSIDE], show=False)
    assert code == 0, output[-6000:]
    lines = [line for line in output.splitlines() if re.search(r"\d+ passed", line)]
    passed = sum(int(number) for line in lines for number in re.findall(r"(\d+) passed", line))
    assert passed >= 100, f"only {passed} tests ran: {output[-2000:]}"
    with capsys.disabled():
        print(f"\n  in the kernel that has device-mapper: {'; and '.join(line.strip('= ') for line in lines)}")
