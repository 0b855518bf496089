"""`python -m tests.monitoring`: docs/dashboard.png, the dashboard's own queries asked of a Prometheus that scraped a
driver with a guest, drawn by matplotlib."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

from tests.api_double import ApiDouble
from tests.csi.helpers import PODS
from tests.driver import Driver
from tests.monitoring.prometheus import Prometheus, free_port
from tests.monitoring.test_scraped import CONTAINERD, put_claim
from tests.sandbox.shim import GO, Sandbox, Settings, volume_mount, write_bundle
from tests.sandbox.vm import VM

ROOT = Path(__file__).resolve().parents[2]
_SPAN = 75.0
_WRITES = (
    "i=0; while true; do i=$((i+1)); yes | dd of=/mnt/data/f$((i%12)) bs=64k count=$((16 * (1 + i % 5))) iflag=fullblock; sync; "
    "cat /mnt/data/f$((i%12)) > /dev/null; done"
)


def main() -> None:
    api, port = ApiDouble(), free_port()
    driver = Driver(environment={
        "RUNVOL_CSI_METRICS": f"127.0.0.1:{port}", "RUNVOL_METRICS_INTERVAL_SECONDS": "2",
        "RUNVOL_METRICS_DOCTOR_SECONDS": "20", "RUNVOL_DETECT_API_SERVER": api.url,
    })  # fmt: skip
    (driver.directory / "containerd.toml").write_text(CONTAINERD)
    config = driver.directory / "kata/etc/kata-containers/node.toml"
    config.parent.mkdir(parents=True)
    config.write_text("[hypervisor.qemu]\nblock_device_cache_set = true\nblock_device_cache_direct = true\n")
    with driver, Prometheus({"runvol": [f"127.0.0.1:{port}"]}) as prometheus, VM() as vm:
        _live(driver, api, vm)
        _draw(prometheus, ROOT / "docs/dashboard.png")
    api.stop()


def _live(driver: Driver, api: ApiDouble, vm: VM) -> None:
    """A guest with a volume through a loop device, a runc pod with another, and pods that come and go."""
    guests, hosts = driver.create("db", 128 << 20), driver.create("web", 128 << 20)
    for volume, claim in ((guests, "data-db-0"), (hosts, "www")):
        put_claim(api, volume.volume_id, claim)
        driver.stage(volume)
    target = driver.publish(guests, PODS[0], runtime="kata-node", name="db-0")
    on_host = Path(driver.publish(hosts, PODS[1], runtime="runc", name="web-0"))
    settings = Settings(shim=GO, direct_volumes=driver.direct_volumes, shared=None, block_device_driver="virtio-blk",
                        cache_set=True, cache_direct=True)  # fmt: skip
    sandbox = Sandbox(vm=vm, settings=settings).start()
    sandbox.create_container(write_bundle(driver.directory / "b", [volume_mount(target)]), "c1")
    sandbox.spawn("c1", "sh", "-c", _WRITES)
    end, round_ = time.monotonic() + _SPAN, 0
    while time.monotonic() < end:
        round_ += 1
        (on_host / f"f{round_ % 20}").write_bytes(b"x" * (1 + round_ % 4 << 20))
        short = driver.create(f"short-{round_}", 64 << 20)
        driver.stage(short)
        driver.publish(short, PODS[2], runtime="kata" if round_ % 2 else "runc", name=f"job-{round_}")
        time.sleep(1.5)
        driver.unpublish(short, PODS[2])
        driver.unstage(short)
        driver.delete(short)
    sandbox.remove_container("c1")


def _draw(prometheus: Prometheus, place: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter

    panels = json.loads((ROOT / "deploy/monitoring/dashboard.json").read_text())["panels"]
    shown = [
        (panel, drawn) for panel in panels if panel["type"] == "timeseries" and (drawn := _asked(prometheus, panel))
    ]
    rows = -(-len(shown) // 3)
    figure, axes = pyplot.subplots(rows, 3, figsize=(18, 3.4 * rows), squeeze=False)
    for axis in axes.flat[len(shown) :]:
        axis.set_axis_off()
    for axis, (panel, drawn) in zip(axes.flat, shown, strict=False):
        for name, times, values in drawn[:6]:
            axis.plot(times, values, label=name[:46], linewidth=1.4)
        axis.set_title(panel["title"], fontsize=10)
        axis.yaxis.set_major_formatter(
            FuncFormatter(lambda value, _place, unit=panel["fieldConfig"]["defaults"]["unit"]: _text(value, unit))
        )
        axis.set_ylim(bottom=0)
        axis.tick_params(labelsize=7)
        axis.legend(fontsize=6, loc="upper left")
        axis.grid(alpha=0.3)
    figure.suptitle(
        "The panels of deploy/monitoring/dashboard.json that had data, seconds on the horizontal axis", fontsize=11
    )
    figure.tight_layout(rect=(0, 0, 1, 0.98))
    figure.savefig(place, dpi=70)
    print(f"{place}: {len(shown)} of {sum(panel['type'] == 'timeseries' for panel in panels)} panels")


def _asked(prometheus: Prometheus, panel: dict[str, Any]) -> list[tuple[str, list[float], list[float]]]:
    found = []
    for target in panel["targets"]:
        query = target["expr"].replace("$__rate_interval", "10s").replace("$instance", ".*").replace("$namespace", ".*")
        for series in prometheus.series(query, _SPAN):
            points = [(float(at), float(value)) for at, value in series["values"] if value != "NaN"]
            if points:
                last = points[-1][0]
                name = _named(target["legendFormat"], series["metric"])
                found.append((name, [at - last for at, _value in points], [value for _at, value in points]))
    # What lasted longest, and then what is largest: short-lived pods are many.
    return sorted(found, key=lambda one: (-len(one[1]) // 20, -max(one[2])))


def _named(legend: str, labels: dict[str, str]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda word: labels.get(word[1], ""), legend)


def _text(value: float, unit: str) -> str:
    if unit == "percentunit":
        return f"{value:.0%}"
    if unit in ("bytes", "Bps"):
        for prefix in ("", "Ki", "Mi", "Gi"):
            if abs(value) < 1024 or prefix == "Gi":
                return f"{value:.3g} {prefix}B{'/s' if unit == 'Bps' else ''}"
            value /= 1024
    return f"{value:.3g}{' s' if unit == 's' else ''}"


if __name__ == "__main__":
    main()
