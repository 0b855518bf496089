"""A load of whole volume lives, and kill -9 of the server in the middle of it."""

from __future__ import annotations

import hashlib
import os
import random
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from tests.driver import Driver, mount_capability

# The life of a volume; a step that was interrupted is taken again, as kubelet and the sidecars would.
LIFE = (
    "create",
    "stage",
    "publish-runc",
    "unpublish",
    "publish-kata",
    "unpublish",
    "expand",
    "publish-runc",
    "unpublish",
    "snapshot",
    "delete-snapshot",
    "unstage",
    "delete",
)
_TRANSIENT = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
}


class Lost(AssertionError):
    """Data that was written and synced is not there."""


@dataclass
class Worker:
    """One volume after the other, step by step, across any number of servers."""

    driver: Driver
    number: int
    generation: int = 0
    step: int = 0
    volume: Any = None
    written: bool = False
    taken: Any = None
    lives: int = 0
    interrupted: Counter[str] = field(default_factory=Counter)
    failure: BaseException | None = None

    @property
    def name(self) -> str:
        return f"w{self.number}-g{self.generation}"

    @property
    def pod(self) -> str:
        digest = hashlib.sha256(self.name.encode()).hexdigest()
        return f"{digest[:8]}-{digest[8:12]}-{digest[12:16]}-{digest[16:20]}-{digest[20:32]}"

    @property
    def capability(self) -> Any:
        return mount_capability(fstype="xfs" if self.number % 3 == 2 else "ext4")

    @property
    def size(self) -> int:
        return (320 if self.number % 3 == 2 else 32) << 20

    def work(self, stop: threading.Event) -> None:
        """Until told to stop or until the server is gone."""
        try:
            while not stop.is_set():
                self.one_step()
        except grpc.RpcError as error:
            if error.code() not in _TRANSIENT:
                self.failure = error
            self.interrupted[LIFE[self.step]] += 1
        except BaseException as error:
            self.failure = error

    def finish(self) -> None:
        """Take the life that was begun to its end: nothing may be refused for good."""
        until = time.monotonic() + 60
        while self.step:
            try:
                self.one_step()
            except grpc.RpcError as error:
                if error.code() not in _TRANSIENT or time.monotonic() > until:
                    raise AssertionError(
                        f"{self.name} {LIFE[self.step]}: {error.code().name}: {error.details()}"
                    ) from error
                time.sleep(0.02)

    def one_step(self) -> None:
        getattr(self, LIFE[self.step].replace("-", "_"))()
        self.step = (self.step + 1) % len(LIFE)
        if self.step == 0:
            self.generation, self.volume, self.written, self.lives = self.generation + 1, None, False, self.lives + 1

    def create(self) -> None:
        self.volume = self.driver.create(self.name, self.size, self.capability)

    def stage(self) -> None:
        self.driver.stage(self.volume, self.capability)

    def publish_runc(self) -> None:
        target = Path(self.driver.publish(self.volume, self.pod, runtime="runc", capability=self.capability))
        file, text = target / "data", self.name * 1000
        if self.written:
            if not file.exists() or file.read_text() != text:
                raise Lost(f"{self.name}: {file} is {'wrong' if file.exists() else 'gone'}")
        else:
            with file.open("w") as out:
                out.write(text)
                out.flush()
                os.fsync(out.fileno())
            self.written = True

    def publish_kata(self) -> None:
        self.driver.publish(self.volume, self.pod, runtime="kata", capability=self.capability)

    def unpublish(self) -> None:
        self.driver.unpublish(self.volume, self.pod)

    def expand(self) -> None:
        """As kubelet does for a volume that is staged only."""
        self.driver.client.NodeExpandVolume(
            volume_id=self.volume.volume_id, volume_path=self.driver.staging(self.volume.volume_id),
            capacity_range={"required_bytes": self.size + (16 << 20)},
        )  # fmt: skip

    def snapshot(self) -> None:
        self.taken = self.driver.client.CreateSnapshot(source_volume_id=self.volume.volume_id, name=self.name).snapshot

    def delete_snapshot(self) -> None:
        self.driver.client.DeleteSnapshot(snapshot_id=self.taken.snapshot_id)

    def unstage(self) -> None:
        self.driver.unstage(self.volume)

    def delete(self) -> None:
        self.driver.delete(self.volume)


@dataclass(frozen=True)
class Result:
    rounds: int
    lives: int
    interrupted: Counter[str]


def rounds(driver: Driver, count: int, seed: int, workers: int = 4) -> Result:
    """`count` times: run the load, kill the server at a random moment, start it again. Then finish every life."""
    chance = random.Random(seed)
    crew = [Worker(driver, number) for number in range(workers)]
    for _ in range(count):
        stop = threading.Event()
        threads = [threading.Thread(target=worker.work, args=(stop,)) for worker in crew]
        for thread in threads:
            thread.start()
        time.sleep(chance.uniform(0.02, 0.8))
        driver.process.kill()
        stop.set()
        for thread in threads:
            thread.join()
        for worker in crew:
            if worker.failure is not None:
                log = driver.log.read_text()
                raise AssertionError(
                    f"{worker.name} {LIFE[worker.step]}: {worker.failure}\n{log[-6000:]}"
                ) from worker.failure
        driver.kill()
        driver.start()
    for worker in crew:
        worker.finish()
    return Result(count, sum(worker.lives for worker in crew), sum((worker.interrupted for worker in crew), Counter()))


if __name__ == "__main__":
    import argparse

    options = argparse.ArgumentParser()
    options.add_argument("--rounds", type=int, default=200)
    options.add_argument("--seed", type=int, default=int(time.time()))
    arguments = options.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    with Driver() as running:
        result = rounds(running, arguments.rounds, arguments.seed)
        left = running.left_over()
    print(f"{result.rounds} rounds, {result.lives} whole lives, interrupted in {dict(result.interrupted)}")
    assert not any(left.values()), left
    print("nothing left: 0 mounts, 0 loop devices, 0 hand-offs, 0 claims, 0 files, 0 rows; no data lost")
