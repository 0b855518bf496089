"""Locks between processes that serve a pool, change it, or make it larger."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from blockdev import Deadline, WaitExpired
from snapshotter import server, turns
from snapshotter.errors import BadRequest, PoolRefused


@pytest.fixture(autouse=True)
def locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "_LOCKS", str(tmp_path / "run"))
    monkeypatch.setattr(turns, "_PATIENCE", 0.05)


def test_a_change_of_the_whole_pool_excludes_every_other(tmp_path: Path) -> None:
    state, copy = str(tmp_path / "state"), str(tmp_path / "copy")
    with turns.whole(state, "ab"):
        with pytest.raises(PoolRefused, match="another process serves or changes"), turns.whole(state):
            pass
        with pytest.raises(PoolRefused, match="pool ab"), turns.whole(copy, "ab"):
            pass
        with pytest.raises(WaitExpired), turns.beside(state, Deadline.after(0.05)):
            pass
        # A copied state, and this one.
        for directory in (copy, state):
            with pytest.raises(BadRequest):
                server.alone(f"unix://{tmp_path}/s.sock", directory, "ab")
        # What the pool is made larger with needs none of that.
        with turns.extension(state, Deadline.after(1)):
            pass
    with turns.whole(copy, "ab"):
        pass


def test_a_server_lets_in_what_may_be_done_beside_it(tmp_path: Path) -> None:
    state = str(tmp_path / "state")
    os.makedirs(state)
    held = server.alone(f"unix://{tmp_path}/s.sock", state, "ab")
    with pytest.raises(PoolRefused, match="systemctl stop"), turns.whole(state, "ab"):
        pass
    with turns.beside(state, Deadline.after(1)), turns.extension(state, Deadline.after(1)):
        pass
    for fd in held:
        os.close(fd)
    with turns.whole(state, "ab"):
        pass


def test_a_lock_goes_with_its_process(tmp_path: Path) -> None:
    state = str(tmp_path / "state")
    os.makedirs(state)
    code = (f"import time\nfrom snapshotter import turns\nfrom blockdev import Deadline\nturns._LOCKS = {state!r}\n"
            f"with turns.whole({state!r}, 'ab'), turns.extension({state!r}, Deadline.after(9)):\n"
            " print('held', flush=True)\n time.sleep(60)")  # fmt: skip
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(WaitExpired, match="another extension of the pool"), turns.extension(state, Deadline.after(0.1)):
        pass
    began = time.monotonic()
    holder.kill()
    holder.wait()
    with turns.extension(state, Deadline.after(5)), turns.whole(state):
        assert time.monotonic() - began < 5
