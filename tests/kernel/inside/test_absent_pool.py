"""A pool that is not assembled: `pool status` and doctor say what is missing, and not to ask the other."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from blockdev import Deadline
from blockdev.devicemapper import Mapper
from snapshotter import assembly
from tests.kernel.inside.server import Server


def status(server: Server) -> str:
    done = subprocess.run([sys.executable, "-m", "runvol", "pool", "status"], env=server.environment, capture_output=True,
                          text=True, timeout=60, check=False)  # fmt: skip
    assert done.returncode == 1
    return done.stdout


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with Server(tmp_path, data=256 << 20) as server:
        server.stop()
        with Mapper() as mapper:
            pool, below = assembly.assemble(mapper, str(server.state), Deadline.after(60))
            assembly.disassemble(mapper, pool, below, Deadline.after(60))
        said = status(server)
        assert (
            f"pool {server.pool_name} is not assembled: all that it stands on is there, and nobody has assembled it; `syst"
            in said
        )
        assert "pool status` tells" not in said
        data = tmp_path / "pool" / f"{server.pool_name}.data"
        data.rename(data.with_suffix(".away"))
        assert f"{data} does not exist; bring it back, {server.state}/pool.json names it" in status(server)
        found = {one["subject"]: one for one in json.loads(server.runvol("doctor", "--json", ok=(0, 1, 3)))["items"]}
        assert found["pool"]["state"] == "broken"
        assert f"{data} does not exist" in found["pool"]["finding"]
        data.with_suffix(".away").rename(data)
        with Mapper() as mapper:
            mapper.create(server.pool_name, "OTHER")
            assert "exists that is not this pool (its UUID is OTHER)" in status(server)
            mapper.remove(server.pool_name)
