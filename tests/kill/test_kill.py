"""kill -9 at random points under load: every call can be repeated to its end, nothing is lost, nothing leaks."""

from __future__ import annotations

import time

import pytest

from tests.driver import Driver
from tests.kill.load import rounds

pytestmark = [pytest.mark.kill, pytest.mark.kernel]


def test_twenty_rounds_of_kill_minus_nine():
    seed = int(time.time())
    print(f"seed {seed}")
    with Driver() as driver:
        result = rounds(driver, 20, seed)
        left = driver.left_over()
        log = driver.log.read_text()
    assert not any(left.values()), left
    assert result.lives >= 4 and sum(result.interrupted.values()) >= 20, result
    assert "Traceback" not in log, log[log.index("Traceback") - 500 :][:3000]
