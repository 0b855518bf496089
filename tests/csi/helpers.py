"""Words for what gRPC answers, and a process that holds a volume as a VMM does."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

PODS = [f"11111111-2222-3333-4444-55555555555{n}" for n in "0123456789"]
_VMM = "import os,sys,time; os.open(sys.argv[1], os.O_RDWR); print('open', flush=True); time.sleep(300)"


@contextlib.contextmanager
def refused(code: str, *words: str) -> Iterator[pytest.ExceptionInfo[grpc.RpcError]]:
    """The call inside is answered with `code` and a message that holds every one of `words`."""
    with pytest.raises(grpc.RpcError) as caught:
        yield caught
    error = caught.value
    assert error.code().name == code, f"{error.code().name}: {error.details()}"
    for word in words:
        assert word in error.details(), f"{word!r} is not in: {error.details()}"


@contextlib.contextmanager
def vmm(path: str | Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has the volume open, without O_EXCL and without any lock, as QEMU with share-rw has."""
    process = subprocess.Popen([sys.executable, "-c", _VMM, str(path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def image(driver, volume) -> Path:
    return driver.state / "volumes" / f"{volume.volume_id}.img"


def has_resource() -> bool:
    """CAP_SYS_RESOURCE, without which the kernel grows no mounted ext4."""
    with open("/proc/self/status") as status:
        effective = next(int(line.split()[1], 16) for line in status if line.startswith("CapEff"))
    return bool(effective >> 24 & 1)
