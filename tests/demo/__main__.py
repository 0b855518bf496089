"""`make demo`: a volume goes from CreateVolume into a guest's kernel, is measured, and survives the guest."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
from rich.console import Console
from rich.markup import escape

from blockdev import superblocks
from tests.demo import kata, report
from tests.demo.measure import ROUNDS, Figure, Run, lay_out, measure, measure_beside, on_host
from tests.driver import Driver
from tests.sandbox.guest import build
from tests.sandbox.shim import Sandbox, Settings, volume_mount, write_bundle
from tests.sandbox.vm import VM, accelerator

POD_A, POD_B, POD_C = (f"11111111-2222-3333-4444-55555555555{n}" for n in "abc")
JOBS = ("randread", "randwrite")
console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)


class Failed(SystemExit):
    """A step did not do what it should."""


def expect(condition: bool, what: str) -> None:
    if not condition:
        console.print(f"[bold red]✗ {what}[/]")
        raise Failed(1)


@contextmanager
def step(text: str) -> Iterator[None]:
    started = time.monotonic()
    console.print(f"[bold]●[/] {text} …")
    yield
    console.print(f"  [green]✓[/] [dim]{time.monotonic() - started:.1f} s[/]")


def say(text: str) -> None:
    console.print(f"    {text}")


class Demo:
    """The main job, step by step, against the real driver."""

    def __init__(self, driver: Driver, seconds: int, size: str) -> None:
        self.driver, self.seconds, self.size = driver, seconds, size
        self.figures: list[Figure] = []
        self.shared, self.bundles = driver.directory / "shared", driver.directory / "bundles"
        self.shared.mkdir()

    def run(self) -> None:
        volume = self.create_and_stage()
        status_quo = self.mount_for_runc()
        target = self.publish(volume)
        self.in_a_guest(volume, target, status_quo)
        self.in_a_new_guest(target)
        self.refuse_a_second_pod(volume)
        self.finish_sandbox(volume)
        self.bare_qemu(volume)
        self.same_class_for_runc(volume)
        self.remove_all(volume)

    def create_and_stage(self) -> Any:
        with step("CreateVolume over gRPC: 1 GiB, backend loop"):
            volume = self.volume = self.driver.create("pvc-demo", 1 << 30)
            say(f"volume {volume.volume_id}")
        with step("NodeStageVolume: formatted, and mounted nowhere on the host"):
            self.driver.stage(volume)
            block = superblocks.read(str(self.source(volume)))
            expect(block is not None and block.fstype == "ext4", "the volume holds an ext4")
            expect(
                not self.driver.mounts() and not self.driver.loop_devices(),
                "nothing is mounted, no loop device is bound",
            )
            say("ext4 made; mounts of it on the host: 0; loop devices: 0")
        return volume

    def source(self, volume: Any) -> Path:
        return self.driver.state / "volumes" / f"{volume.volume_id}.img"

    def mount_for_runc(self) -> str:
        with step(
            "For comparison: a second volume, mounted on the host as kubelet does it, to be shared by 9p and virtio-fs"
        ):
            self.other = self.driver.create("pvc-compare", 1 << 30)
            self.driver.stage(self.other)
            target = self.driver.publish(self.other, POD_C, runtime="runc")
            lay_out(on_host, target, self.size)
        return target

    def publish(self, volume: Any) -> str:
        with step("NodePublishVolume for a sandboxed pod: a read-only placeholder on the host, the hand-off for Kata"):
            target = self.driver.publish(volume, POD_A, runtime="kata", name="db-0")
            try:
                (Path(target) / "x").touch()
                expect(False, "the placeholder refuses writes")
            except OSError as error:
                say(f"writing to the target on the host: {error.strerror}")
            console.print(self.driver.cli("handoffs").stdout, end="")
        return target

    def sandbox(self, vm: VM, setup: kata.Setup = kata.RECOMMENDED) -> Sandbox:
        shared = self.shared if vm.has_virtiofs else None
        settings = Settings(direct_volumes=self.driver.direct_volumes, shared=shared, **setup.double)
        return Sandbox(vm=vm, settings=settings)

    def in_a_guest(self, volume: Any, target: str, status_quo: str) -> None:
        with step(f"A guest boots (QEMU, {accelerator()})"):
            vm = VM(virtiofs=self.shared, shares={"hostmount": Path(status_quo)})
            vm.__enter__()
        try:
            with step(
                "The shim finds the hand-off by the mount's source, hot-plugs the device, and the agent mounts it"
            ):
                sandbox = self.sandbox(vm).start()
                nine = {"destination": "/mnt/9p", "type": "9p", "source": "hostmount",
                        "options": ["trans=virtio", "version=9p2000.L", "msize=512000", "cache=none"]}  # fmt: skip
                mounts = [volume_mount(target), nine, volume_mount(status_quo, "/mnt/virtiofs")]
                sandbox.create_container(write_bundle(self.bundles / "a", mounts), "db-0")
                for command, arguments in vm.commands:
                    if command in ("blockdev-add", "device_add"):
                        say(f"QMP {command} {arguments.get('driver')}")
                _, text = sandbox.run("db-0", "grep", "-E", " /mnt/", "/proc/self/mountinfo")
                for line in text.splitlines():
                    fields = line.split()
                    say(
                        f"in the guest: {fields[4]} is {fields[fields.index('-') + 1]} on {fields[fields.index('-') + 2]}"
                    )
            with step("A file is written in the guest"):
                code, text = sandbox.run(
                    "db-0", "sh", "-c", "echo 'still here' > /mnt/data/file && sync && cat /mnt/data/file"
                )
                expect(code == 0 and text == "still here\n", f"the guest can write: {text}")
            self.measure_in(sandbox)
            sandbox.remove_container("db-0")
            self.measure_setups(vm, volume)
        finally:
            with step("The guest is killed (SIGKILL, as a power cut)"):
                vm.kill()
                sandbox.destroy()

    def measure_in(self, sandbox: Sandbox) -> None:
        run = self.runner(sandbox, "db-0")
        with step("fio in the guest lays out its file on the block device"):
            lay_out(run, "/mnt/data", self.size)
        for path, directory in (("9p", "/mnt/9p"), ("virtio-fs", "/mnt/virtiofs"), ("runvol", "/mnt/data")):
            with step(f"fio in the guest: {report.NAMES[path]}"):
                for job in JOBS:
                    self.add(measure(run, path, job, directory, seconds=self.seconds, size=self.size))

    def measure_setups(self, vm: VM, volume: Any) -> None:
        """The same file in the same guest, as each shim plugs it in with Kata's defaults and as recommended."""
        with step(f"A pod of a handler with the Go shim as it is shipped ({kata.GO_SHIPPED.handler})"):
            self.driver.unpublish(volume, POD_A)
            try:
                self.driver.publish(volume, POD_A, runtime=kata.GO_SHIPPED.handler, name="db-0")
                expect(False, "a shim that ignores block devices is refused")
            except grpc.RpcError as error:
                say(f"[yellow]{escape(error.details())}[/]")
        for setup in kata.MEASURED:
            with step(f"fio in the guest: {setup.name} ({setup.plugs})"):
                target = self.driver.publish(volume, POD_A, runtime=setup.handler, name="db-0")
                sandbox, name = self.sandbox(vm, setup), f"db-{setup.handler}"
                sandbox.create_container(write_bundle(self.bundles / setup.handler, [volume_mount(target)]), name)
                self.measure_pair(sandbox, name, setup.handler)
                sandbox.remove_container(name)
                sandbox.destroy()
                self.driver.unpublish(volume, POD_A)
        with step("The pod of before again"):
            self.driver.publish(volume, POD_A, runtime="kata", name="db-0")

    @staticmethod
    def runner(sandbox: Sandbox, container: str) -> Run:
        def run(command: list[str]) -> str:
            code, output = sandbox.run(container, *command)
            expect(code == 0, f"{command[0]} in the guest: {output[-500:]}")
            return output

        return run

    def add(self, figure: Figure) -> None:
        self.figures.append(figure)
        say(
            f"{figure.path} {figure.job}: {figure.iops:,.0f} IOPS, {figure.mib_s:.1f} MiB/s, p99 {figure.lat_p99_ms:.1f} ms"
        )

    def in_a_new_guest(self, target: str) -> None:
        with step("A new guest: the file is still there, and the filesystem is clean"):
            with VM(virtiofs=self.shared) as vm:
                sandbox = self.sandbox(vm).start()
                sandbox.create_container(write_bundle(self.bundles / "b", [volume_mount(target)]), "db-0-again")
                _, text = sandbox.run("db-0-again", "cat", "/mnt/data/file")
                expect(text == "still here\n", f"the file survived: {text!r}")
                say(f"the file says: {text.strip()!r}")
                sandbox.remove_container("db-0-again")
            checked = subprocess.run(
                ["e2fsck", "-f", "-n", str(self.image)], capture_output=True, text=True, check=False
            )
            expect(checked.returncode == 0, f"the filesystem is clean: {checked.stdout}")
            say("e2fsck -f -n finds nothing to repair")

    @property
    def image(self) -> Path:
        return self.source(self.volume)

    def refuse_a_second_pod(self, volume: Any) -> None:
        with step("A second sandboxed pod wants the volume while the first has it"):
            try:
                self.driver.publish(volume, POD_B, runtime="kata", name="db-1")
                expect(False, "the second pod is refused")
            except grpc.RpcError as error:
                expect(
                    error.code() is grpc.StatusCode.FAILED_PRECONDITION, f"refused with the right code: {error.code()}"
                )
                say(f"[yellow]{escape(error.details())}[/]")

    def finish_sandbox(self, volume: Any) -> None:
        with step("NodeUnpublishVolume: the hand-off is withdrawn, the claim released"):
            self.driver.unpublish(volume, POD_A)

    def bare_qemu(self, volume: Any) -> None:
        """Two equal volumes in one guest, one plugged in before the boot with the best options known, one by runvol."""
        with step("For comparison: an equal volume, cold-plugged into a bare QEMU (virtio-blk, iothread, native AIO)"):
            bare = self.driver.create("pvc-bare", 1 << 30)
            self.driver.stage(bare)
            vm = VM(drives=[self.source(bare)])
            vm.__enter__()
        try:
            with step("… and the volume by runvol in the same guest, in turn with it"):
                sandbox = self.sandbox(vm).start()
                mount = {"destination": "/mnt/data", "type": "ext4", "source": "/dev/vda", "options": ["rw"]}
                sandbox.create_container(write_bundle(self.bundles / "c", [mount]), "bare")
                target = self.driver.publish(volume, POD_A, runtime="kata")
                sandbox.create_container(write_bundle(self.bundles / "d", [volume_mount(target)]), "again")
                runs = {"bare QEMU": self.runner(sandbox, "bare"), "runvol, same guest": self.runner(sandbox, "again")}
                for run in runs.values():
                    lay_out(run, "/mnt/data", self.size)
                for job in JOBS:
                    beside = {path: (run, "/mnt/data") for path, run in runs.items()}
                    for figure in measure_beside(beside, job, seconds=self.seconds, size=self.size):
                        self.add(figure)
                for name in ("bare", "again"):
                    sandbox.remove_container(name)
                self.driver.unpublish(volume, POD_A)
        finally:
            vm.kill()
        self.driver.unstage(bare)
        self.driver.delete(bare)

    def measure_pair(self, sandbox: Sandbox, container: str, path: str) -> None:
        run = self.runner(sandbox, container)
        for job in JOBS:
            self.add(measure(run, path, job, "/mnt/data", seconds=self.seconds, size=self.size))

    def same_class_for_runc(self, volume: Any) -> None:
        with step("The same volume for a runc pod, without an unstage between: mounted on the host as ever"):
            target = self.driver.publish(volume, POD_B, runtime="runc", name="web-0")
            text = (Path(target) / "file").read_text()
            expect(text == "still here\n", "the runc pod sees the guest's file")
            say(f"on the host: {target.split('/')[-1]} is a mount, the file says {text.strip()!r}")
            for job in JOBS:
                self.add(measure(on_host, "host", job, target, seconds=self.seconds, size=self.size))
            self.driver.unpublish(volume, POD_B)

    def remove_all(self, volume: Any) -> None:
        with step("Everything is removed, and counted"):
            self.driver.unpublish(self.other, POD_C)
            for one in (volume, self.other):
                self.driver.unstage(one)
                self.driver.delete(one)
            for kind, found in self.driver.left_over().items():
                say(f"{kind} left: {len(found)}")
                expect(not found, f"no {kind} are left: {found}")


def main() -> None:
    options = argparse.ArgumentParser(prog="make demo")
    options.add_argument(
        "--seconds", type=int, default=int(os.environ.get("DEMO_SECONDS", "2")), help="of each fio round"
    )
    options.add_argument("--size", default="256M", help="of fio's file")
    options.add_argument("--results", type=Path, default=Path("demo-results"))
    arguments = options.parse_args()
    started = time.monotonic()
    if os.geteuid() != 0:
        sys.exit("make demo: needs root for loop devices and mounts; run it with sudo")
    with step("The guest: Debian's kernel, an initramfs of Debian's programs"):
        build()
    node = Driver()
    kata.write(node.directory / "containerd.toml", node.directory / "kata")
    with node as driver:
        demo = Demo(driver, arguments.seconds, arguments.size)
        try:
            demo.run()
        except grpc.RpcError as error:
            console.print(f"[bold red]✗ {error.code().name}: {error.details()}[/]\n{driver.log.read_text()[-3000:]}")
            raise Failed(1) from error
    console.print()
    report.table(demo.figures, console)
    console.print()
    report.setups(demo.figures, console)
    facts = {"accelerator": accelerator(), "job": f"4k, iodepth 32, direct, median of {ROUNDS} rounds of {arguments.seconds} s, file {arguments.size}",
             "command": "make demo"}  # fmt: skip
    report.save(arguments.results, demo.figures, facts)
    for name, ratio in report.ratios(demo.figures).items():
        say(f"{name}: {ratio:.2f}")
    console.print(f"\nRaw figures: {arguments.results}/figures.json, plot: {arguments.results}/iops.png "
                  f"({time.monotonic() - started:.0f} s in all)")  # fmt: skip


main()
