"""A snapshotter on a small pool of loop files, with the questions that tests ask of the kernel behind its back."""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from blockdev import Deadline, loops
from blockdev.devicemapper import Mapper, MapperError, node
from blockdev.dm_targets import PoolStatus
from snapshotter import assembly, backing, recovery
from snapshotter.assembly import Extender, Wish
from snapshotter.backing import Backing
from snapshotter.model import Kind, Mount, Snapshot
from snapshotter.node import Node, Settings
from snapshotter.pool import Limits

MIB = 1 << 20


def soon() -> Deadline:
    return Deadline.after(60)


@contextlib.contextmanager
def mounted(mounts: list[Mount]) -> Iterator[Path]:
    """The filesystem, mounted as containerd would."""
    (mount,) = mounts
    with tempfile.TemporaryDirectory() as place:
        options = ["-o", ",".join(mount.options)] if mount.options else []
        subprocess.run(["mount", "-t", mount.fstype, *options, mount.source, place], check=True, capture_output=True)
        try:
            yield Path(place)
        finally:
            subprocess.run(["umount", place], check=True, capture_output=True)


class Lab:
    """One pool and one store; `start` opens them as a process would, `stop` leaves them as a killed one does."""

    def __init__(
        self, directory: Path, *, data: int = 256 * MIB, metadata: int = 8 * MIB, size: int = 32 * MIB,
        fstype: str = "ext4", limits: Limits | None = None, by_namespace: dict[str, int] | None = None,
        discard: bool = True, images: str = "", made: bool = False, verity: bool = False,
        image_keys: tuple[str, ...] = (), image_roots: str = "", images_unsigned: bool = False,
    ) -> None:  # fmt: skip
        self.directory = directory
        self.state = str(directory / "state")
        self.settings = Settings(state_dir=self.state, fstype=fstype, size=size, by_namespace=by_namespace or {},
                                 limits=limits or Limits(extend_by=0), discard=discard, images=images, verity=verity,
                                 image_keys=image_keys, image_roots=image_roots, images_unsigned=images_unsigned)  # fmt: skip
        self.name = self._pool_name(directory)
        if not made:
            self.make_pool(directory, data, metadata)
        self.node: Node = self.start()

    @staticmethod
    def _pool_name(directory: Path) -> str:
        """Short, as a device's name is, and another one for each lab."""
        return f"lab{hashlib.sha256(str(directory).encode()).hexdigest()[:8]}"

    @classmethod
    def make_pool(cls, directory: Path, data: int = 256 * MIB, metadata: int = 8 * MIB) -> None:
        wish = Wish(
            name=cls._pool_name(directory), directory=str(directory / "pool"), size=data, metadata_size=metadata
        )
        with Mapper() as mapper:
            assembly.init(mapper, str(directory / "state"), wish, soon())

    @property
    def description(self) -> backing.Description:
        found = backing.load(self.state)
        assert found is not None
        return found

    def start(self, *, recover: bool = True) -> Node:
        self.node = Node(self.settings)
        self.node.open_pool()
        if recover:
            self.found = self.node.recover()
        return self.node

    def stop(self) -> None:
        """As kill -9 would: nothing is written, nothing is unmapped."""
        self.node.store.close()
        self.node.mapper.close()

    def restart(self) -> Node:
        self.stop()
        return self.start()

    def reboot(self) -> Node:
        """Everything that only a kernel remembers is gone: mapped devices, the pool, loop devices."""
        self.stop()
        with Mapper() as mapper:
            it = self.description
            pool, below = assembly.assemble(mapper, self.state, soon())
            _forget_seals(mapper, f"runvol-{it.identity[:8]}-")
            assembly.disassemble(mapper, pool, below, soon())
            _forget_images(mapper)
            assert mapper.find(it.name) is None
            assert not loops.find(it.data)
        return self.start()

    # -- the verbs, briefly -----------------------------------------------------------------------------------------

    def prepare(self, key: str, parent: str = "", **labels: str) -> list[Mount]:
        return self.node.snapshots.prepare(key, parent, _labels(labels), soon())

    def view(self, key: str, parent: str = "") -> list[Mount]:
        return self.node.snapshots.prepare(key, parent, {}, soon(), kind=Kind.VIEW)

    def mounts(self, key: str) -> list[Mount]:
        return self.node.snapshots.mounts(key, soon())

    def commit(self, name: str, key: str, **labels: str) -> None:
        self.node.snapshots.commit(name, key, _labels(labels), "", soon())

    def remove(self, key: str) -> None:
        self.node.snapshots.remove(key, soon())

    def stat(self, key: str) -> Snapshot:
        return self.node.snapshots.stat(key, soon())

    def usage(self, key: str) -> tuple[int, int]:
        return self.node.snapshots.usage(key, soon())

    def reap(self) -> None:
        """Let what is left behind be done."""
        while self.node.reaper.round():
            pass

    def reap_idle(self) -> None:
        """Let the time go by after which a device that nobody has open is unmapped."""
        before, self.node.idle.after = self.node.idle.after, 1e-9
        self.reap()
        self.node.idle.after = before

    def layer(self, name: str, parent: str = "", *, files: dict[str, bytes]) -> None:
        """A committed snapshot with these files."""
        with mounted(self.prepare(f"making {name}", parent)) as root:
            for path, content in files.items():
                (root / path).write_bytes(content)
        self.commit(name, f"making {name}")

    def read(self, name: str, path: str) -> bytes:
        """A file of a committed snapshot, through a view of it."""
        with mounted(self.view(f"reading {name}", name)) as root:
            content = (root / path).read_bytes()
        self.remove(f"reading {name}")
        return content

    def __contains__(self, key: str) -> bool:
        return key in self.names()

    def names(self) -> list[str]:
        return [row.key for page in self.node.snapshots.list([]) for row in page]

    # -- the kernel's side --------------------------------------------------------------------------------------------

    def ids(self) -> set[int]:
        return self.node.pool.ids(soon())

    def bases(self) -> set[int]:
        return {base.device for base in self.node.store.bases()}

    def mapped(self) -> set[int]:
        return set(self.node.pool.active())

    def status(self) -> PoolStatus:
        return self.node.pool.status()

    def extender(self) -> Extender:
        return Extender(self.node.mapper, self.node.pool, Backing(self.node.mapper, self.state, self.description))

    def leaks(self) -> list[str]:
        """What exists although no snapshot needs it, once everything behind is done."""
        self.reap()
        store = self.node.store
        rows = {row.device for page in store.pages() for row in page if row.device}
        ids = self.ids()
        found = [f"device {one} in the pool without a row" for one in ids - rows - self.bases()
                 - set(store.quarantined())]  # fmt: skip
        found += [f"row of device {one} without a device" for one in rows - ids]
        active = {row.device for page in store.pages() for row in page if row.kind is not Kind.COMMITTED}
        found += [f"device {one} mapped for nobody" for one in self.mapped() - active]
        found += [f"doomed {one}" for one in store.doomed()]
        found += [f"intent {row.key}" for row in store.intents()]
        return found + self._seal_leaks(rows)

    def _seal_leaks(self, rows: set[int]) -> list[str]:
        """Trees of no layer, and devices over no view."""
        folder = Path(self.state) / "seals"
        trees = {path.name for path in folder.iterdir()} if folder.exists() else set()
        found = [f"seal {name} of no layer" for name in trees - {str(one) for one in rows}]
        views = {self.node.pool.device_name(self.stat(key).device) for key in self.names()
                 if self.stat(key).kind is Kind.VIEW}  # fmt: skip
        mapped = {one.name for one in self.node.mapper.devices() if one.name.endswith("-seal")}
        found += [f"{name} over no view" for name in mapped if name.removesuffix("-seal") not in views]
        if not mapped:
            found += [f"a loop device on {name}" for name in trees if loops.find(str(folder / name))]
        return found

    def seal(self, key: str) -> bool:
        """Let the sealer do this layer now; whether it is sealed."""
        assert self.node.sealer is not None
        assert self.node.seals is not None
        self.reap()
        self.node.sealer.seal(key)
        self.reap()
        return self.node.seals.of(self.stat(key).device) is not None

    def destroy(self) -> None:
        with contextlib.suppress(Exception):
            self.stop()
        with Mapper() as mapper:
            it = self.description
            prefix = f"runvol-{it.identity[:8]}-"
            _forget_seals(mapper, prefix)
            for entry in mapper.devices():
                if entry.name.startswith(prefix):
                    if (found := mapper.find(entry.name)) and found.suspended:
                        mapper.resume(entry.name)
                    mapper.remove(entry.name)
            _forget_images(mapper)
            for name in (it.name, f"{it.name}-data", f"{it.name}-meta"):
                if mapper.find(name) is not None:
                    mapper.remove(name)
            Backing(mapper, self.state, it).detach(soon())


def _forget_seals(mapper: Mapper, prefix: str) -> None:
    for entry in mapper.devices():
        if entry.name.startswith(prefix) and entry.name.endswith("-seal"):
            for device in loops.find(node(entry.name)):
                loops.clear(device)
            below = mapper.dependencies(entry.name)
            mapper.remove(entry.name)
            for number in below:
                with contextlib.suppress(OSError):
                    loops.clear(f"/dev/loop{number.split(':')[1]}")


def _forget_images(mapper: Mapper) -> None:
    for entry in mapper.devices():
        if entry.name.startswith("runvol-image-"):
            # Another lab may have it mapped too; the last one takes it away.
            with contextlib.suppress(MapperError):
                for device in loops.find(node(entry.name)):
                    loops.clear(device)
                below = mapper.dependencies(entry.name)
                mapper.remove(entry.name)
                for number in below:
                    loops.clear(f"/dev/loop{number.split(':')[1]}")


def _labels(labels: dict[str, str]) -> dict[str, str]:
    """`size="1"` is the label of that size; other names are given with `__` for their slash."""
    return {("containerd.io/snapshot/max-size" if name == "size" else name.replace("__", "/")): value
            for name, value in labels.items()}  # fmt: skip


def in_child(work: Callable[[], object]) -> int:
    """Run `work` in a forked process; its wait status: 0, 256 for an exception, 9 for kill -9."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1]


__all__ = ["MIB", "Lab", "in_child", "mounted", "recovery", "soon"]
