"""`make bench`: what publish costs as volumes grow in number, what create and stage cost, and the plugin's memory.

Ratios are against the empty call of the same server in the same run, so that a slow machine shows as one.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from tests.demo.report import machine
from tests.driver import Driver, mount_capability

console = Console(width=None if os.isatty(1) else 110)
SAMPLES = 300


def times(call: Callable[[int], Any], count: int) -> list[float]:
    """Milliseconds of each call."""
    taken = []
    for number in range(count):
        started = time.perf_counter()
        call(number)
        taken.append((time.perf_counter() - started) * 1000)
    return taken


def summary(taken: list[float]) -> dict[str, float]:
    ordered = sorted(taken)
    at = lambda share: round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 2)  # noqa: E731
    return {"p50_ms": at(0.5), "p99_ms": at(0.99), "max_ms": round(ordered[-1], 2), "samples": len(ordered)}


def resident(driver: Driver) -> dict[str, float]:
    """MiB, now and at its highest."""
    with open(f"/proc/{driver.process.pid}/status") as status:
        facts = dict(line.split(":", 1) for line in status)
    return {
        key: round(int(facts[name].split()[0]) / 1024, 1) for key, name in (("rss_mib", "VmRSS"), ("peak_mib", "VmHWM"))
    }


def pod(number: int) -> str:
    return f"{number:08x}-0000-0000-0000-000000000000"


def a_publish(driver: Driver, volume: Any, uid: str) -> Any:
    """The request, made before the clock runs."""
    return driver.client.request(
        "NodePublishVolume",
        volume_id=volume.volume_id,
        staging_target_path=driver.staging(volume.volume_id),
        target_path=driver.target(volume.volume_id, uid),
        volume_capability=mount_capability(),
        volume_context={
            "runtime": "kata",
            "csi.storage.k8s.io/pod.name": "probe",
            "csi.storage.k8s.io/pod.namespace": "default",
            "csi.storage.k8s.io/pod.uid": uid,
        },
    )


def publishing(driver: Driver, others: int, staged: list[Any]) -> dict[str, Any]:
    """Publish and unpublish of one sandbox while `others` volumes are published."""
    while len(staged) < others:
        for number in track(
            range(len(staged), others), description=f"  publishing {others} volumes", console=console, transient=True
        ):
            volume = driver.create(f"v{number}", 8 << 20)
            driver.stage(volume)
            driver.publish(volume, pod(number), runtime="kata", name=f"pod-{number}")
            staged.append(volume)
    volume = driver.create(f"probe-{others}", 8 << 20)
    driver.stage(volume)
    publish, unpublish = [], []
    ask = a_publish(driver, volume, pod(1 << 20))
    take = driver.client.request("NodeUnpublishVolume", volume_id=ask.volume_id, target_path=ask.target_path)
    for _ in range(SAMPLES):
        publish += times(lambda n: driver.client.call("NodePublishVolume", ask), 1)
        unpublish += times(lambda n: driver.client.call("NodeUnpublishVolume", take), 1)
    driver.unstage(volume)
    driver.delete(volume)
    empty = times(lambda n: driver.client.NodeGetInfo(), SAMPLES)
    result = {"publish": summary(publish), "unpublish": summary(unpublish), "both": summary([a + b for a, b in zip(publish, unpublish, strict=True)]),
              "empty_call": summary(empty)}  # fmt: skip
    return result | {
        "publish_to_empty": round(result["publish"]["p50_ms"] / result["empty_call"]["p50_ms"], 1),
        "memory": resident(driver),
    }


def life(driver: Driver) -> dict[str, Any]:
    """CreateVolume and the first NodeStage of 10 GiB volumes."""
    volumes: list[Any] = []
    create = times(lambda n: volumes.append(driver.create(f"big-{n}", 10 << 30)), 5)
    stage = times(lambda n: driver.stage(volumes[n]), 5)
    again = times(lambda n: driver.stage(volumes[n]), 5)
    delete = []
    for volume in volumes:
        driver.unstage(volume)
        delete += times(lambda n, volume=volume: driver.delete(volume), 1)
    return {
        "create_10g": summary(create),
        "stage_10g": summary(stage),
        "stage_again": summary(again),
        "delete_10g": summary(delete),
    }


def show(result: dict[str, Any]) -> None:
    table = Table(
        title="NodePublishVolume and NodeUnpublishVolume for a sandbox, by a client on the socket", title_justify="left"
    )
    for column in (
        "volumes published",
        "publish p50 ms",
        "p99",
        "unpublish p50 ms",
        "p99",
        "empty call p50",
        "publish / empty",
        "RSS MiB",
    ):
        table.add_column(column, justify="right")
    for count, one in result["publishing"].items():
        table.add_row(count, *(str(one[part][key]) for part in ("publish", "unpublish") for key in ("p50_ms", "p99_ms")),
                      str(one["empty_call"]["p50_ms"]), str(one["publish_to_empty"]), str(one["memory"]["rss_mib"]))  # fmt: skip
    console.print(table)
    table = Table(title="A volume of 10 GiB, ext4", title_justify="left")
    table.add_column("call")
    table.add_column("p50 ms", justify="right")
    table.add_column("max ms", justify="right")
    for name, one in result["life"].items():
        table.add_row(name, str(one["p50_ms"]), str(one["max_ms"]))
    console.print(table)


def plot(path: Path, result: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    counts = [int(count) for count in result["publishing"]]
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for part, colour in (("publish", "#4477aa"), ("unpublish", "#ee7733")):
        for key, style in (("p50_ms", "-o"), ("p99_ms", "--s")):
            axes.plot(
                counts,
                [one[part][key] for one in result["publishing"].values()],
                style,
                color=colour,
                label=f"{part} {key[:3]}",
            )
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("volumes published on the node")
    axes.set_ylabel("milliseconds")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    options = argparse.ArgumentParser(prog="make bench")
    options.add_argument("--volumes", default="1,100,1000")
    options.add_argument("--results", type=Path, default=Path("bench-results"))
    arguments = options.parse_args()
    result: dict[str, Any] = {"machine": machine() | {"command": "make bench"}, "publishing": {}}
    with Driver() as driver:
        result["life"] = life(driver)
        result["memory_idle"] = resident(driver)
        staged: list[Any] = []
        for count in map(int, arguments.volumes.split(",")):
            result["publishing"][str(count)] = publishing(driver, count, staged)
        for number, volume in enumerate(track(staged, description="  taking back", console=console, transient=True)):
            driver.unpublish(volume, pod(number))
            driver.unstage(volume)
            driver.delete(volume)
        left = driver.left_over()
        result["memory_after"] = resident(driver)
    assert not any(left.values()), left
    show(result)
    arguments.results.mkdir(parents=True, exist_ok=True)
    (arguments.results / "publish.json").write_text(json.dumps(result, indent=2) + "\n")
    plot(arguments.results / "publish.png", result)
    console.print(
        f"resident memory: {result['memory_after']}; figures: {arguments.results}/publish.json, plot: publish.png"
    )


main()
