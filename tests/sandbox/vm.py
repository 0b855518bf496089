"""A QEMU guest as Kata starts it: q35, a PCI bridge, virtio-scsi, virtio-serial, virtio-fs and 9p shares, QMP.

KVM is used where a guest really boots with it, which /dev/kvm alone does not prove.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from guestmount import ttrpc
from tests.sandbox.guest import CACHE, Guest, build

VIRTIOFSD = ("/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd")
_BOOT_LIMIT = 120.0
_numbers = itertools.count(1)


class QmpError(Exception):
    """QEMU refused a command."""


@functools.cache
def accelerator() -> str:
    """`kvm` if a guest boots with it within a few seconds, else `tcg`; asked once for each boot of the machine."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "tcg"
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    known = CACHE / f"accelerator-{boot}"
    if not known.exists():
        guest = build()
        for old in CACHE.glob("accelerator-*"):
            old.unlink()
        known.write_text(_probe_kvm(guest))
    return known.read_text()


def _probe_kvm(guest: Guest) -> str:
    # A kernel with nothing to boot panics at once, and `-no-reboot` ends QEMU: that is the proof.
    command = ["qemu-system-x86_64", "-accel", "kvm", "-cpu", "host", "-m", "256M", "-display", "none", "-no-reboot",
               "-kernel", str(guest.kernel), "-append", "panic=-1 console=ttyS0", "-nodefaults"]  # fmt: skip
    try:
        return "kvm" if subprocess.run(command, capture_output=True, timeout=8, check=False).returncode == 0 else "tcg"
    except subprocess.TimeoutExpired:
        return "tcg"


class VirtioFsDaemon:
    """virtiofsd for one directory; Debian 12 has QEMU's, later ones the Rust one."""

    def __init__(self, directory: Path, socket_path: Path) -> None:
        program = next((path for path in VIRTIOFSD if os.path.exists(path)), None)
        if program is None:
            raise RuntimeError("virtiofsd is not installed; run tests/prepare/debian.sh")
        if program.startswith("/usr/libexec"):
            arguments = ["--shared-dir", str(directory), "--sandbox", "chroot", "--cache", "auto"]
        else:
            arguments = ["-o", f"source={directory}", "-o", "sandbox=chroot", "-o", "cache=auto", "-o", "xattr"]
        self.log = open(f"{socket_path}.log", "wb")
        self._process = subprocess.Popen(
            [program, f"--socket-path={socket_path}", *arguments], stdout=self.log, stderr=subprocess.STDOUT
        )
        _wait(socket_path.exists, 10, f"virtiofsd: {Path(f'{socket_path}.log').read_text()[-500:]}")

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        self.log.close()


def _wait(ready: Any, seconds: float, what: str) -> None:
    until = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > until:
            raise TimeoutError(what)
        time.sleep(0.02)


class VM:
    """One guest; a context manager. `shares`: 9p tags to directories. `drives`: files plugged in before the boot."""

    def __init__(
        self,
        *,
        memory: str = "1G",
        virtiofs: Path | None = None,
        shares: dict[str, Path] | None = None,
        drives: list[Path] | None = None,
        guest: Guest | None = None,
        prefix: tuple[str, ...] = (),
        network: tuple[str, str] | None = None,
        outward: bool = False,
        processors: int = 2,
    ) -> None:
        self._guest = guest or build()
        # A tap device, and the guest's address with its prefix length; `outward`: what QEMU reaches, the guest does.
        self._network, self._outward, self._processors = network, outward, processors
        # What QEMU is started by, for one in a network namespace.
        self._prefix = prefix
        self._memory, self._virtiofs, self._shares, self._drives = memory, virtiofs, shares or {}, drives or []
        self.directory = Path(tempfile.mkdtemp(prefix="runvol-vm-"))
        self.process: subprocess.Popen[bytes] | None = None
        self._daemon: VirtioFsDaemon | None = None
        self._qmp: socket.socket | None = None
        self.agent: ttrpc.Client | None = None
        self.commands: list[tuple[str, dict[str, Any]]] = []

    @property
    def has_virtiofs(self) -> bool:
        return self._virtiofs is not None

    def __enter__(self) -> VM:
        try:
            self._start()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    # -- life

    def _start(self) -> None:
        if self._virtiofs is not None:
            self._daemon = VirtioFsDaemon(self._virtiofs, self.directory / "virtiofs.sock")
        with open(self.directory / "qemu.log", "wb") as log:
            self.process = subprocess.Popen(self._command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self._connect_qmp()
        self._connect_agent()

    def _command(self) -> list[str]:
        kvm = accelerator() == "kvm"
        command = [
            *self._prefix, "qemu-system-x86_64", "-machine", "q35,memory-backend=mem", "-accel", "kvm" if kvm else "tcg,thread=multi",
            "-cpu", "host" if kvm else "max,la57=off", "-smp", str(self._processors), "-m", self._memory, "-nodefaults", "-no-user-config",
            "-display", "none", "-no-reboot",
            "-object", f"memory-backend-memfd,id=mem,size={self._memory},share=on",
            "-kernel", str(self._guest.kernel), "-initrd", str(self._guest.initramfs),
            "-append", "console=ttyS0 panic=-1 scsi_mod.scan=none mitigations=off tsc=reliable random.trust_cpu=on"
            + self._addresses(),
            "-chardev", f"file,id=console,path={self.directory}/console.log", "-serial", "chardev:console",
            "-qmp", f"unix:{self.directory}/qmp.sock,server=on,wait=off",
            "-device", "pci-bridge,bus=pcie.0,id=pci-bridge-0,chassis_nr=1,shpc=off,addr=2,io-reserve=4k,mem-reserve=1m,pref64-reserve=1m",
            "-device", "virtio-scsi-pci,id=scsi0,bus=pcie.0,addr=3",
            "-device", "virtio-serial-pci,id=serial0,bus=pcie.0,addr=4",
            "-chardev", f"socket,id=agent,path={self.directory}/agent.sock,server=on,wait=off",
            "-device", "virtserialport,bus=serial0.0,chardev=agent,name=agent.channel.0",
            "-object", "rng-random,id=rng0,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=rng0",
            *self._nic(),
        ]  # fmt: skip
        if self._virtiofs is not None:
            command += ["-chardev", f"socket,id=fs,path={self.directory}/virtiofs.sock",
                        "-device", "vhost-user-fs-pci,chardev=fs,tag=kataShared,queue-size=1024"]  # fmt: skip
        for number, (tag, directory) in enumerate(self._shares.items()):
            command += ["-fsdev", f"local,id=share{number},path={directory},security_model=passthrough,multidevs=remap",
                        "-device", f"virtio-9p-pci,fsdev=share{number},mount_tag={tag}"]  # fmt: skip
        for number, file in enumerate(self._drives):
            command += ["-object", f"iothread,id=io{number}",
                        "-blockdev", json.dumps({"driver": "raw", "node-name": f"cold{number}", "file": {
                            "driver": "file", "filename": str(file), "aio": "native", "cache": {"direct": True}}}),
                        "-device", f"pcie-root-port,id=port{number},chassis={number + 10}",
                        "-device", f"virtio-blk-pci,bus=port{number},drive=cold{number},iothread=io{number},num-queues=2,id=vd{number}"]  # fmt: skip
        return command

    def _addresses(self) -> str:
        if self._network is not None:
            return f" runvol.ip={self._network[1]}"
        return " runvol.ip=10.0.2.15/24 runvol.gateway=10.0.2.2" if self._outward else ""  # of QEMU's user network

    def _nic(self) -> list[str]:
        if self._network is None:
            return ["-nic", f"user,model=virtio-net-pci,restrict={'off' if self._outward else 'on'}"]
        return ["-netdev", f"tap,id=net0,ifname={self._network[0]},script=no,downscript=no",
                "-device", "virtio-net-pci,netdev=net0"]  # fmt: skip

    def _connect_qmp(self) -> None:
        path = str(self.directory / "qmp.sock")
        _wait(lambda: os.path.exists(path) or self._ended(), 20, "QEMU did not open its QMP socket")
        if self._ended():
            raise RuntimeError(f"QEMU ended at once: {(self.directory / 'qemu.log').read_text()[-2000:]}")
        self._qmp = socket.socket(socket.AF_UNIX)
        self._qmp.settimeout(30)
        self._qmp.connect(path)
        self._reader = self._qmp.makefile("r")
        self._reader.readline()
        self.qmp("qmp_capabilities")
        self.commands.clear()

    def _connect_agent(self) -> None:
        channel = socket.socket(socket.AF_UNIX)
        channel.connect(str(self.directory / "agent.sock"))
        until = time.monotonic() + _BOOT_LIMIT
        while "agent: serving" not in self.console():
            if time.monotonic() > until or self._ended():
                raise TimeoutError(f"the guest did not come up: {self.console()[-3000:]}")
            time.sleep(0.05)
        self.agent = ttrpc.Client(ttrpc.FileStream(channel.detach()))

    def _ended(self) -> bool:
        return self.process is not None and self.process.poll() is not None

    def console(self) -> str:
        """What the guest's kernel and agent have printed."""
        with contextlib.suppress(FileNotFoundError):
            return (self.directory / "console.log").read_text(errors="replace")
        return ""

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def kill(self) -> None:
        """As a power cut: QEMU gets SIGKILL and nothing is told to anybody."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
        if self.agent is not None:
            with contextlib.suppress(OSError):
                self.agent.close()
        if self._qmp is not None:
            self._reader.close()
            self._qmp.close()
        if self._daemon is not None:
            self._daemon.stop()
        shutil.rmtree(self.directory, ignore_errors=True)

    # -- QMP

    def qmp(self, command: str, **arguments: Any) -> Any:
        """One command; its answer. QmpError with QEMU's words. Events are passed over."""
        assert self._qmp is not None
        self.commands.append((command, arguments))
        self._qmp.sendall((json.dumps({"execute": command, "arguments": arguments}) + "\n").encode())
        while True:
            line = self._reader.readline()
            if not line:
                raise QmpError("QEMU has ended")
            answer = json.loads(line)
            if "error" in answer:
                raise QmpError(answer["error"]["desc"])
            if "return" in answer:
                return answer["return"]

    def pass_fd(self, fd: int, opaque: str) -> int:
        """QEMU has a copy of the descriptor; the number of its set, which `/dev/fdset/N` opens."""
        assert self._qmp is not None
        socket.send_fds(self._qmp, [b" "], [fd])
        return int(self.qmp("add-fd", opaque=opaque)["fdset-id"])

    def remove_node(self, node: str, seconds: float = 10.0) -> None:
        """blockdev-del; QEMU lets go of a device's disk a moment after the device."""
        until = time.monotonic() + seconds
        while True:
            try:
                self.qmp("blockdev-del", **{"node-name": node})
                return
            except QmpError as error:
                if "in use" not in str(error) or time.monotonic() > until:
                    raise
                self.commands.pop()
                time.sleep(0.05)

    def wait_unplugged(self, device: str, seconds: float = 20.0) -> None:
        """Return once QEMU has let go of a device: the guest has to agree first."""

        def gone() -> bool:
            return not any(one.get("name") == device for one in self.qmp("qom-list", path="/machine/peripheral"))

        _wait(gone, seconds, f"the guest did not release {device}")
