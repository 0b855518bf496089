"""Who watches a node whose NFS servers are dead: metrics, doctor and the listings tell of it, and of all else, in time."""

from __future__ import annotations

import json
import re
import signal
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

from tests.driver import POD, Driver, mount_capability
from tests.kernel.inside.nfs import Ganesha

RWX = mount_capability("MULTI_NODE_MULTI_WRITER")
_LOOKS = (("volumes",), ("volumes", "snapshots"), ("handoffs",), ("gc", "--dry-run"), ("doctor",))


def scraped(name: str) -> dict[str, float]:
    """What a volume has of that name, by volume."""
    started = time.monotonic()
    with urllib.request.urlopen("http://127.0.0.1:9810/metrics", timeout=20) as answer:
        lines = answer.read().decode().splitlines()
    assert time.monotonic() - started < 5
    of = re.compile(rf'{name}{{.*volume="([^"]*)".*}} (\S+)')
    return {found[1]: float(found[2]) for line in lines if (found := of.match(line))}


def until(ready: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.5)


def test_metrics_doctor_and_listings_beside_a_server_that_is_frozen(tmp_path: Path) -> None:
    server = Ganesha(tmp_path / "server")
    server.start()
    watched = {"RUNVOL_CSI_METRICS": "127.0.0.1:9810", "RUNVOL_METRICS_INTERVAL_SECONDS": "1"}
    try:
        with Driver(tmp_path / "d", watched) as driver:
            dead = driver.create("dies", capability=RWX, backend="nfs", server="127.0.0.1", path="/exp", vers="4.1")
            local = driver.create("local", backend="directory", quota="none")
            driver.stage(dead, RWX)
            driver.stage(local)
            driver.publish(dead, POD.format(1), runtime="runc", capability=RWX)
            driver.publish(local, POD.format(2), runtime="runc")
            both = {dead.volume_id, local.volume_id}
            until(lambda: both <= scraped("runvol_volume_measured_timestamp_seconds").keys())
            server.signal(signal.SIGSTOP)
            until(lambda: scraped("runvol_volume_unmeasured").get(dead.volume_id) == 1)
            assert scraped("runvol_volume_unmeasured").get(local.volume_id, 0) == 0
            since = scraped("runvol_volume_measured_timestamp_seconds")[local.volume_id]
            until(lambda: scraped("runvol_volume_measured_timestamp_seconds")[local.volume_id] > since)
            for words in _LOOKS:
                started = time.monotonic()
                done = driver.cli(*words, "--json", check=False)
                took = time.monotonic() - started
                assert done.returncode in (0, 1, 3) and "Traceback" not in done.stderr, (words, done.stderr)
                assert took < 60 and json.loads(done.stdout)["apiVersion"], (words, took)
                if words == ("volumes",):
                    assert local.volume_id in done.stdout
            server.signal(signal.SIGCONT)
            until(lambda: scraped("runvol_volume_unmeasured").get(dead.volume_id, 0) == 0)
            for volume, pod in ((dead, POD.format(1)), (local, POD.format(2))):
                driver.unpublish(volume, pod)
                driver.unstage(volume)
                driver.delete(volume)
    finally:
        server.close()
