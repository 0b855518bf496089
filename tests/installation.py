"""An installation of runvol on one node, that can be broken, looked at by doctor, and put right as doctor says.

What a fix has between backquotes is done as it stands: a command is executed by a shell, a setting is written into
runvol.toml, a line of another file is put into the table and file that the fix names. Only what a fix leaves open
(`NAME`, `FILE`, the value of a setting) is given by the test.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blockdev import mountinfo
from runvol import assembly, config, doctor
from runvol.diagnosis import OK, Diagnosis
from runvol.toml_text import written

ROOT = Path(__file__).resolve().parents[1]
CRI = 'plugins."io.containerd.cri.v1.runtime".containerd.runtimes'
# Stand in for programs that a test's machine has not; each does what the real one would do here.
_CONTAINERD = "#!/bin/sh\necho containerd github.com/containerd/containerd v2.1.4\n"
_COMMANDS = ("runvol", "rm", "touch", "modprobe", "systemctl", "kubectl", "e2fsck", "cp")


class Installation:
    """In directories of its own; a context manager that leaves nothing behind."""

    def __init__(self) -> None:
        # Short, since Kata finds a volume only by a path of at most 189 bytes.
        self.directory = Path(tempfile.mkdtemp(prefix="ri-", dir=os.environ.get("RUNVOL_TEST_DIR", "/var/tmp")))
        self.kubelet, self.state, self.run = (self.directory / name for name in ("kubelet", "state", "run"))
        self.kubelet.mkdir()
        self.root = self.directory / "node"
        self.file = self.directory / "runvol.toml"
        self.containerd = self.root / "etc/containerd/config.toml"
        self.containerd.parent.mkdir(parents=True)
        self.bin = self.directory / "bin"
        self.bin.mkdir()
        self.program("runvol", f'#!/bin/sh\ncd {ROOT}\nexec {sys.executable} -m runvol --config {self.file} "$@"\n')
        self.program("containerd", _CONTAINERD)
        self.settings: dict[str, Any] = {
            "node.id": "node-1",
            "node.roots": [str(self.kubelet)],
            "paths.state_dir": str(self.state),
            "paths.run_dir": str(self.run),
            "paths.direct_volumes": str(self.directory / "direct-volumes"),
            "paths.containerd_config": str(self.containerd),
            "paths.kata_root": str(self.root),
            "cri.endpoint": "",
            "csi.endpoint": f"unix://{self.run}/csi.sock",
            "csi.plugins_registry": "",
            "snapshotter.state_dir": str(self.state / "snapshotter"),
            "snapshotter.gauge": "",
        }
        self._save()

    def __enter__(self) -> Installation:
        return self

    def __exit__(self, *_: object) -> None:
        below = f"{self.directory}/"
        for mount in reversed([one.target for one in mountinfo.table() if one.target.startswith(below)]):
            subprocess.run(["umount", "-l", mount], check=False)
        listed = subprocess.run(["losetup", "-ln", "-O", "NAME,BACK-FILE"], capture_output=True, text=True, check=False)
        for line in listed.stdout.splitlines():
            device, _, file = line.partition(" ")
            if file.strip().startswith(below):
                subprocess.run(["losetup", "-d", device], check=False)
        shutil.rmtree(self.directory, ignore_errors=True)

    # -- how it is

    def program(self, name: str, text: str) -> None:
        path = self.bin / name
        path.write_text(text)
        path.chmod(0o755)

    def set(self, **values: Any) -> None:
        """`paths__run_dir=…` is the setting paths.run_dir."""
        self.settings |= {key.replace("__", "."): value for key, value in values.items()}
        self._save()

    def _save(self) -> None:
        sections: dict[str, dict[str, Any]] = {}
        for key, value in self.settings.items():
            section, _, name = key.partition(".")
            sections.setdefault(section, {})[name] = value
        self.file.write_text(written(sections))

    @property
    def loaded(self) -> config.Config:
        return config.load(file=str(self.file), environment={})

    def write(self, path: str, text: str) -> Path:
        """Below the node's root."""
        place = self.root / path.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
        return place

    def handler(self, name: str = "kata", kata: str = "[hypervisor.qemu]\n", **fields: str) -> Path:
        """A sandbox handler that is well but for what `kata`, its shim's configuration, says."""
        place = self.write(f"etc/kata-containers/{name}.toml", kata)
        shim = self.write("opt/kata/bin/containerd-shim-kata-v2", "")
        fields = {"runtime_type": "io.containerd.kata.v2", "runtime_path": str(shim)} | fields
        with self.containerd.open("a") as file:
            if not self.containerd.stat().st_size:
                file.write("version = 3\n")
            file.write(f"[{CRI}.{name}]\n" + "".join(f'{key} = "{value}"\n' for key, value in fields.items()))
            file.write(f'[{CRI}.{name}.options]\nConfigPath = "/{place.relative_to(self.root)}"\n')
        return place

    # -- what doctor says

    def look(self) -> list[Diagnosis]:
        loaded = self.loaded
        return list(doctor.examine(loaded, assembly.build(loaded, looking=True)))

    def ill(self, known: str) -> list[Diagnosis]:
        """The findings of this id."""
        return [one for one in self.look() if one.id == known]

    # -- what it says to do

    def execute(self, command: str) -> str:
        done = subprocess.run(
            ["sh", "-c", command], capture_output=True, text=True, check=False, cwd=ROOT, timeout=120,
            env={**os.environ, "PATH": f"{self.bin}:{os.environ['PATH']}"},
        )  # fmt: skip
        corrected = command.startswith("e2fsck ") and done.returncode == 1
        assert done.returncode == 0 or corrected, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def apply(self, fix: str, given: Mapping[str, str]) -> int:
        """How many things were done."""
        done = 0
        for number, part in enumerate(fix.split("`")):
            if number % 2 == 0:
                continue
            if part.startswith(given.get("only", "")):
                done += self._apply(part, fix, given)
        return done

    def _apply(self, part: str, fix: str, given: Mapping[str, str]) -> int:
        for word, value in given.items():
            part = re.sub(rf"\b{re.escape(word)}\b", value, part) if word.isupper() else part
        if part.split()[0] in _COMMANDS:
            self.execute(part)
            return 1
        key, equals, value = part.partition(" = ")
        if key in config.TABLE:
            if not equals and key not in given:
                return 0  # one of several ways
            found = tomllib.loads(f"x = {value if equals else given[key]}")["x"]
            self.set(**{key.replace(".", "__"): found})
            return 1
        table = re.search(rf"`{re.escape(part)}`.*? in (\[.*?\]) of (\S+?)[,;]?(\s|\Z)", fix)
        if not equals or table is None:
            return 0
        put(Path(table[2]), table[1], key, value)
        return 1


def put(file: Path, table: str, key: str, value: str) -> None:
    """A line into a table of a TOML file, in the place of the one that is there."""
    lines, at = file.read_text().splitlines(), None
    names = [one.strip() for one in lines]
    begin = names.index(table)
    for number in range(begin + 1, len(lines)):
        if names[number].startswith("["):
            break
        if names[number].partition("=")[0].strip() == key:
            at = number
    if at is None:
        lines.insert(begin + 1, f"{key} = {value}")
    else:
        lines[at] = f"{key} = {value}"
    file.write_text("\n".join(lines) + "\n")


def is_well(found: list[Diagnosis], known: str) -> bool:
    return not [one for one in found if one.id == known and one.state != OK]
