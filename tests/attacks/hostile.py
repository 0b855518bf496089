"""The attackers: what pods, guests, operators, time and scarcity do to a node, each as a context manager or a call.

Whoever tests a room takes them from here; none of them knows a volume.
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

# -- scarcity


@contextlib.contextmanager
def small_disk(place: Path, size: str = "256m") -> Iterator[None]:
    """A filesystem of its own at `place`, which can then be filled or made read-only."""
    place.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "attack", str(place)], check=True)
    try:
        yield
    finally:
        if os.path.ismount(place):
            subprocess.run(["umount", "-l", str(place)], check=False)


@contextlib.contextmanager
def full(*places: Path) -> Iterator[None]:
    """Not one byte is left in any of the places."""
    fillers = [place / ".attack-filler" for place in places]
    try:
        for filler in fillers:
            for piece in (b"x" * 65536, b"x"):
                with filler.open("ab", buffering=0) as file, contextlib.suppress(OSError):
                    while True:
                        file.write(piece)
        yield
    finally:
        for filler in fillers:
            filler.unlink(missing_ok=True)


@contextlib.contextmanager
def read_only(*places: Path) -> Iterator[None]:
    """Nothing can be written in any of the places, as after an I/O error below them."""
    done = []
    try:
        for place in places:
            subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
            done.append(place)
        yield
    finally:
        for place in done:
            subprocess.run(["mount", "-o", "remount,rw", str(place)], check=True)


@contextlib.contextmanager
def few_descriptors(pid: int, more: int) -> Iterator[None]:
    """The process can open `more` files besides those that it has, and then gets EMFILE."""
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    used = max(int(name) for name in os.listdir(f"/proc/{pid}/fd")) + 1
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (used + more, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


@contextlib.contextmanager
def short_writes(pid: int, size: int) -> Iterator[None]:
    """write(2) of the process ends at `size` bytes of each file: first short, then EFBIG."""
    before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, before)


# -- time


def emptied(place: Path) -> None:
    """All that lies in the place is gone, as after somebody cleaned up `/run`; the place itself stays."""
    for one in place.iterdir():
        if one.is_dir() and not one.is_symlink():
            shutil.rmtree(one)
        else:
            one.unlink()


def emptied_around_mounts(place: Path) -> None:
    """As `emptied`; what is mounted in it stays as it is, and so do the directories above."""
    for one in list(place.iterdir()) if place.is_dir() else []:
        if os.path.ismount(one):
            continue
        with contextlib.suppress(OSError):
            if one.is_dir() and not one.is_symlink():
                emptied_around_mounts(one)
                one.rmdir()
            else:
                one.unlink()


@contextlib.contextmanager
def restored(place: Path, copy: Path) -> Iterator[None]:
    """After the block the place is as it was before it: a backup was played back."""
    shutil.copytree(place, copy, symlinks=True)
    yield
    emptied(place)
    shutil.copytree(copy, place, symlinks=True, dirs_exist_ok=True)
    shutil.rmtree(copy)


# -- names that a pod or a share holds


def traps(root: Path, outside: Path) -> None:
    """All that a tree can hold against whoever walks it as root: links out, FIFOs, sockets, nodes, setuid, odd names."""
    (root / "link-to-file").symlink_to(outside)
    (root / "link-to-directory").symlink_to(outside.parent)
    (root / "link-to-itself").symlink_to("link-to-itself")
    os.mkfifo(root / "fifo", 0o600)
    os.mknod(root / "node", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as one:
        here = os.open(root, os.O_PATH | os.O_DIRECTORY)
        try:
            one.bind(f"/proc/self/fd/{here}/socket")
        finally:
            os.close(here)
    (root / "setuid").write_text("x")
    (root / "setuid").chmod(0o4711)
    for name in (b"-rf", b"new\nline", b"\xff\xfe", b"..."):
        os.close(os.open(os.fsencode(root) + b"/" + name, os.O_WRONLY | os.O_CREAT, 0o600))


def deep(root: Path, levels: int) -> None:
    """A directory in a directory in a directory, longer than any path may be."""
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    for _ in range(levels):
        os.mkdir("d", dir_fd=fd)
        inner = os.open("d", os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)
        os.close(fd)
        fd = inner
    os.close(fd)


@contextlib.contextmanager
def swapped(one: Path, link_to: Path) -> Iterator[None]:
    """`one` is the file or directory that it was and, in turn, a link, as fast as it can be changed."""
    aside, ended = one.with_name(f"{one.name}.aside"), threading.Event()

    def swap() -> None:
        while not ended.is_set():
            with contextlib.suppress(OSError):
                one.rename(aside)
                one.symlink_to(link_to)
                one.unlink()
            with contextlib.suppress(OSError):
                aside.rename(one)

    thread = threading.Thread(target=swap, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        if aside.exists():
            with contextlib.suppress(OSError):
                one.unlink()
            aside.rename(one)


# -- peers


@contextlib.contextmanager
def deaf_server() -> Iterator[int]:
    """The port of a server on loopback that takes connections and never says a word."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        yield listener.getsockname()[1]


@contextlib.contextmanager
def deaf_socket(path: Path) -> Iterator[Path]:
    """The same on a unix socket."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(64)
        yield path
    path.unlink()


@contextlib.contextmanager
def dripping_server() -> Iterator[int]:
    """The port of a server that answers every connection with a byte each third of a second, for ever."""
    ended = threading.Event()

    def drip(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.sendall(b"HTTP/1.1 200 OK\r\n")
            while not ended.wait(0.3):
                connection.sendall(b"X")

    def accept(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=drip, args=(listener.accept()[0],), daemon=True).start()

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        threading.Thread(target=accept, args=(listener,), daemon=True).start()
        try:
            yield listener.getsockname()[1]
        finally:
            ended.set()
            listener.shutdown(socket.SHUT_RDWR)


# -- who does not let go


@contextlib.contextmanager
def held_open(path: Path) -> Iterator[int]:
    """A process has the file or device open, without any lock, as a VMM has it; its pid."""
    script = "import os,sys,time; os.open(sys.argv[1], os.O_RDWR); print('open', flush=True); time.sleep(1000)"
    with _running(sys.executable, "-c", script, str(path)) as pid:
        yield pid


@contextlib.contextmanager
def private_mounts() -> Iterator[int]:
    """A process keeps a private copy of the node's mounts, as an agent's container with `/` bound does; its pid."""
    with _running("unshare", "-m", "--propagation", "private", "sh", "-c", "echo ready; exec sleep 1000") as pid:
        yield pid


@contextlib.contextmanager
def _running(*command: str) -> Iterator[int]:
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


# -- bytes that a guest writes


def scribbled(path: Path, chance: random.Random) -> bytes:
    """The filesystem's superblock with some of its fields changed; what it was before."""
    with path.open("r+b") as file:
        before = file.read(2048)
        head, xfs = bytearray(before), before[:4] == b"XFSB"
        first, length = (0, 512) if xfs else (1024, 1024)
        for _ in range(chance.randint(1, 6)):
            width = chance.choice((1, 2, 4, 8))
            at = first + chance.randrange(length - width)
            value = chance.choice((0, 1, (1 << 8 * width) - 1, 1 << 8 * width - 1, chance.getrandbits(8 * width)))
            head[at : at + width] = value.to_bytes(width, "little")
        file.seek(0)
        file.write(head)
    return before
