"""Pools that are broken for real, full, with metadata that cannot be written, or not assembled: doctor finds each under
its id, and what it prints, typed as it stands, puts it right.
"""

from __future__ import annotations

import configparser
import contextlib
import os
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from blockdev import BlockdevError, loops
from blockdev.devicemapper import Mapper, MapperError, node
from blockdev.dm_targets import SECTOR, Error, Flakey, Linear
from runvol import config, doctor_snapshots
from runvol.cli import main
from runvol.diagnosis import OK, Diagnosis
from snapshotter import assembly, backing
from snapshotter.errors import Unavailable
from tests.kernel.inside.lab import MIB, Lab, soon
from tests.kernel.inside.server import Server
from tests.kernel.inside.test_doctor import prepared
from tests.kernel.inside.test_making import group  # noqa: F401
from tests.kernel.inside.test_pool import _spoil, _taken_apart, _touch, _until, loop_device

UNIT = Path(__file__).parents[3] / "deploy/systemd/runvol-snapshotter.service"
REPAIR = ["systemctl stop runvol-snapshotter", "runvol pool check --repair", "systemctl start runvol-snapshotter"]


class Patient:
    """A state directory that doctor looks at, and on which its fixes are typed. `stop`, `start`: what systemd would do
    to the service."""

    def __init__(self, state: str, *, stop: Callable[[], object], start: Callable[[], object], **more: str) -> None:
        self.environment = {"RUNVOL_SNAPSHOTTER_STATE_DIR": state, "RUNVOL_SNAPSHOTTER_GAUGE": "", **more}
        self._units = {
            "systemctl stop runvol-snapshotter": stop,
            "systemctl start runvol-snapshotter": start,
            "systemctl restart runvol-snapshotter": lambda: (stop(), start()),
        }

    def look(self) -> list[Diagnosis]:
        return list(doctor_snapshots.examine(config.load(file=None, flags={}, environment=self.environment)))

    def is_well(self) -> bool:
        """The pool is, and everything that stands on it."""
        found = self.look()
        about = [one for one in found if one.id.startswith(("pool.", "devicemapper.", "snapshotter."))]
        assert "pool.health" in [one.id for one in about], about
        return not [one for one in about if one.state != OK]

    def ill(self, known: str) -> Diagnosis:
        found = [one for one in self.look() if one.id == known]
        assert found, [(one.id, one.finding) for one in self.look() if one.state != OK]
        return found[0]

    def apply(self, finding: Diagnosis) -> list[str]:
        """All that the fix has between backquotes, in its order; what was typed."""
        commands = re.findall(r"`([^`]+)`", finding.fix)
        assert commands, finding
        for command in commands:
            if command in self._units:
                self._units[command]()
            elif command.startswith("runvol "):
                assert self.said(command)[0] == 0, (finding, self.said(command))
            else:
                subprocess.run(shlex.split(command), check=True, capture_output=True)
        return commands

    def said(self, command: str) -> tuple[int, str]:
        """Status and words of one of runvol's commands."""
        done = CliRunner().invoke(main, shlex.split(command)[1:], env=self.environment)
        return done.exit_code, done.output


def of_lab(lab: Lab, **more: str) -> Patient:
    return Patient(lab.state, stop=lab.stop, start=lab.start, **more)


def of_server(server: Server) -> Patient:
    def start() -> None:
        server.start()
        prepared(server, "after")

    return Patient(str(server.state), stop=server.stop, start=start)


def test_the_unit_that_fixes_name_runs_the_service_that_these_tests_start() -> None:
    unit = configparser.RawConfigParser(strict=False)
    unit.read(UNIT)
    assert unit["Service"]["ExecStart"] == "/usr/local/bin/runvol snapshotter"


# -- full -------------------------------------------------------------------------------------------------------------


def test_a_pool_without_free_data_blocks(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(data=64 * MIB, size=200 * MIB)
    (mount,) = lab.prepare("a")
    patient = of_lab(lab, RUNVOL_POOL_AUTOEXTEND_PERCENT="100")
    assert patient.is_well()
    writer = subprocess.Popen(
        ["dd", "if=/dev/zero", f"of={mount.source}", "bs=1M", "count=80", "oflag=direct"], stderr=subprocess.DEVNULL
    )
    _until(lambda: lab.status().mode == "out_of_data_space")
    found = patient.ill("pool.data-full")
    assert found.state == "broken" and "has no free data blocks" in found.finding
    assert patient.apply(found) == ["runvol pool extend"]
    assert writer.wait(30) == 0
    assert patient.is_well()


def test_a_pool_whose_metadata_device_fills_and_is_full(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(metadata=2 * MIB, size=200 * MIB, data=512 * MIB)
    patient = of_lab(lab, RUNVOL_POOL_AUTOEXTEND_PERCENT="100")
    pool = lab.node.pool
    _touch(lab.prepare("a")[0].source, every=64 << 10)
    lab.commit("layer", "a")
    layer, filling = lab.stat("layer").device, None
    for number in range(3000, 3100):
        # Past the reserve that a snapshotter keeps, as what containers write goes past it.
        try:
            lab.node.mapper.message(lab.name, f"create_snap {number} {layer}")
            pool.activate(number, 200 * MIB)
            _touch(pool.path(number), every=8 * MIB)
        except (OSError, BlockdevError):
            if lab.status().mode != "ro":
                raise
        if lab.status().mode == "ro":
            break
        if filling is None and lab.status().metadata_used * 100 > 82 * lab.status().metadata_total:
            filling = patient.ill("pool.filling")
    assert filling is not None and filling.state == "warning"
    assert filling.fix == "`runvol pool extend --metadata`"
    found = patient.ill("pool.metadata-full")
    assert found.state == "broken" and "its metadata device is full" in found.finding
    assert patient.apply(found) == ["runvol pool extend --metadata"]
    assert lab.status().mode == "rw"
    for entry in lab.node.mapper.devices():
        if re.fullmatch(rf"runvol-{lab.description.identity[:8]}-3\d\d\d", entry.name):
            lab.node.mapper.remove(entry.name)
    for device in range(3000, number + 1):
        with contextlib.suppress(MapperError):
            lab.node.mapper.message(lab.name, f"delete {device}")
    assert patient.is_well()


# -- metadata that cannot be written ----------------------------------------------------------------------------------


class Disks:
    """Two mapped devices that a pool stands on, and whose tables are another disk's behaviour."""

    def __init__(self, mapper: Mapper, data: str, metadata: str) -> None:
        self._mapper = mapper
        self._length = {data: 256 * MIB // SECTOR, metadata: 8 * MIB // SECTOR}
        self._below = metadata
        for name, device in (("rvd-data", data), ("rvd-meta", metadata)):
            mapper.create(name)
            mapper.load(name, [Linear(length=self._length[device], device=device)])
            mapper.resume(name)

    def _be(self, *targets: object) -> None:
        self._mapper.load("rvd-meta", targets)  # type: ignore[arg-type]
        self._mapper.suspend("rvd-meta", flush=False, freeze=False)
        self._mapper.resume("rvd-meta")

    def mend(self) -> None:
        self._be(Linear(length=self._length[self._below], device=self._below))

    def refuse_writes(self) -> None:
        self._be(Flakey(length=self._length[self._below], device=self._below, up=0, down=600,
                        features=("error_writes",)))  # fmt: skip

    def be_gone(self) -> None:
        self._be(Error(length=self._length[self._below]))


@pytest.fixture
def disks(mapper: Mapper, tmp_path: Path) -> Iterator[Disks]:
    with loop_device(tmp_path / "data", 256 * MIB) as data, loop_device(tmp_path / "meta", 8 * MIB) as metadata:
        yield Disks(mapper, data, metadata)
        for name in ("rvd-data", "rvd-meta"):
            mapper.remove(name)


@pytest.fixture
def server(disks: Disks, tmp_path: Path) -> Iterator[Server]:
    below = ("--device", node("rvd-data"), "--metadata-device", node("rvd-meta"))
    with Server(tmp_path, below=below) as running:
        prepared(running, "before")
        yield running
        disks.mend()


def _commits(server: Server) -> None:
    """Something is written to the metadata, or is to be."""
    with Mapper() as mapper, contextlib.suppress(MapperError):
        mapper.message(server.pool_name, "create_thin 4000")
        mapper.message(server.pool_name, "delete 4000")


def test_metadata_that_could_not_be_written_once_and_a_disk_that_went_away(server: Server, disks: Disks) -> None:
    patient = of_server(server)
    assert patient.is_well()
    disks.refuse_writes()
    _commits(server)
    found = patient.ill("pool.needs-check")
    assert found.state == "broken" and "waits for a check" in found.finding
    disks.mend()
    # The disk is well again; the pool waits all the same.
    assert patient.ill("pool.needs-check").fix == found.fix
    assert patient.apply(found) == REPAIR
    assert patient.is_well()

    disks.be_gone()
    _commits(server)
    found = patient.ill("pool.failed")
    assert found.state == "broken" and found.finding.endswith("has failed")
    disks.mend()
    assert patient.apply(found) == REPAIR
    assert found.fix.endswith("then check the filesystems")
    assert patient.is_well()


def test_a_pool_that_somebody_mapped_read_only(server: Server) -> None:
    patient = of_server(server)
    with Mapper() as mapper:
        it = backing.load(str(server.state))
        assert it is not None
        table = backing.Backing(mapper, str(server.state), it).table(node("rvd-meta"), node("rvd-data"))
        mapper.load(server.pool_name, [replace(table, features=(*table.features, "read_only"))])
        mapper.suspend(server.pool_name, flush=False, freeze=False)
        mapper.resume(server.pool_name)
        assert mapper.pool_status(server.pool_name).mode == "ro"
    found = patient.ill("pool.read-only")
    assert found.state == "broken"
    assert patient.apply(found) == REPAIR
    assert patient.is_well()


# -- not assembled, or left half way ----------------------------------------------------------------------------------


def test_after_a_reboot_without_the_service(lab: Lab) -> None:
    patient = of_lab(lab)
    lab.stop()
    with Mapper() as mapper:
        assembly.disassemble(mapper, *assembly.assemble(mapper, lab.state, soon()), soon())
    found = patient.ill("pool.not-assembled")
    assert found.state == "broken"
    assert "systemctl start runvol-snapshotter" in patient.apply(found)
    assert patient.is_well()


def test_a_pool_whose_metadata_are_damaged(lab: Lab, mapper: Mapper) -> None:
    """What keeps it from being assembled takes a reader of the metadata: doctor names the command, and that the next
    one, which here has nothing to rebuild from, and says so."""
    patient, path = of_lab(lab), lab.description.metadata
    lab.layer("layer", files={"f": b"x"})
    sound = _taken_apart(lab, mapper)
    damaged = _spoil(path, sound)
    found = patient.ill("pool.not-assembled")
    start, check = re.findall(r"`([^`]+)`", found.fix)
    assert start == "systemctl start runvol-snapshotter"
    with pytest.raises(Unavailable, match="is damaged .* `runvol pool check --repair`"):
        lab.start()
    lab.stop()
    status, said = patient.said(check)
    assert status == 1 and "is damaged" in said
    (repair,) = re.findall(r"`([^`]+)`", said)
    assert repair == "runvol pool check --repair" and patient.said(repair)[0] == 1
    assert Path(path).read_bytes() == damaged
    for device in loops.find(path):
        loops.detach(device, path, soon())
    Path(path).write_bytes(sound)
    lab.start()
    assert patient.is_well()
    assert lab.read("layer", "f") == b"x"


def test_a_repair_that_was_killed(lab: Lab, mapper: Mapper) -> None:
    patient = of_lab(lab)
    sound = _taken_apart(lab, mapper)
    Path(lab.state, "metadata.replacing").write_bytes(sound)
    found = patient.ill("pool.not-assembled")
    assert "its repair did not end" in found.finding
    assert patient.apply(found) == ["runvol pool check --repair"]
    lab.start()
    assert patient.is_well()


def test_a_pool_whose_file_is_not_there(lab: Lab, mapper: Mapper) -> None:
    patient, file = of_lab(lab), lab.description.data
    _taken_apart(lab, mapper)
    os.rename(file, f"{file}.away")
    found = patient.ill("pool.not-assembled")
    assert f"{file} does not exist" in found.finding and "bring it back" in found.fix
    os.rename(f"{file}.away", file)
    patient.apply(patient.ill("pool.not-assembled"))
    assert patient.is_well()


def test_a_pool_whose_logical_volumes_are_not_active(mapper: Mapper, tmp_path: Path, group: str) -> None:  # noqa: F811
    state = str(tmp_path / "state")
    assembly.init(mapper, state, assembly.Wish(name="ofgroup", group=group, size=128 * MIB), soon())
    assembly.disassemble(mapper, *assembly.assemble(mapper, state, soon()), soon())
    subprocess.run(["vgchange", "-q", "-an", group], check=True, capture_output=True)
    patient = Patient(state, stop=lambda: None, start=lambda: assembly.assemble(mapper, state, soon()))
    for part in ("meta", "data"):
        found = patient.ill("pool.not-assembled")
        assert patient.apply(found) == [f"lvchange -ay {group}/ofgroup_{part}"]
    patient.apply(patient.ill("pool.not-assembled"))
    assert "pool.health" in [one.id for one in patient.look()]
    assembly.disassemble(mapper, *assembly.assemble(mapper, state, soon()), soon())


def test_a_pool_that_was_left_suspended(lab: Lab) -> None:
    """Whatever is read or written on it waits, and its mode is `rw` all the same."""
    patient = of_lab(lab)
    lab.node.mapper.suspend(lab.name)
    found = patient.ill("pool.suspended")
    assert found.state == "broken"
    status, said = patient.said("runvol pool status")
    assert status == 1 and "is suspended: whatever is read or written on it waits" in " ".join(said.split())
    patient.apply(found)
    assert patient.is_well()
