"""A double of Kata's shims: it reads an OCI bundle, finds direct volumes, hot-plugs them and talks to the agent.

It follows the Go or the Rust shim where they differ, traps included, and is nowhere more forgiving than they are. The
commands to QEMU and to the agent are those that a running Kata 4.1.0 sent.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import secrets
import stat
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from google.protobuf.empty_pb2 import Empty

from guestmount import ttrpc
from runvol_proto import kata_agent_pb2, kata_csi_pb2, kata_health_pb2, kata_oci_pb2
from tests.sandbox.vm import VM, QmpError

GO, RUST = "go", "rust"
_AGENT = "grpc.AgentService"
_GUEST_SHARED = "/run/kata-containers/shared/containers"
_GUEST_SANDBOX = "/run/kata-containers/sandbox"
_GUEST_STORAGE = f"{_GUEST_SANDBOX}/storage"
_EMPTY_DIR = "/volumes/kubernetes.io~empty-dir/"


class ContainerFailed(Exception):
    """The container was not created."""


class SandboxFailed(Exception):
    """No container of the pod can be created."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The part of Kata's configuration that matters for volumes."""

    shim: str = GO
    block_device_driver: str = "virtio-scsi"
    disable_block_device_use: bool = False
    aio: str = "threads"
    cache_set: bool = False
    cache_direct: bool = False
    indep_iothreads: bool = False
    direct_volumes: Path
    shared: Path | None = None


@dataclass
class Drive:
    """A hot-plugged device; counted, since containers of one pod share it. `fdset`: the Rust shim's, for its file."""

    node: str
    device: str
    driver: str
    source: str
    number: int
    users: int = 1
    fdset: int | None = None


@dataclass
class Sandbox:
    """One pod's guest, as a shim sees it."""

    vm: VM
    settings: Settings
    sandbox_id: str = field(default_factory=lambda: secrets.token_hex(32))
    drives: dict[str, Drive] = field(default_factory=dict)
    # Plugged in until the sandbox ends, as the Rust shim has no record of them any more.
    forgotten: list[Drive] = field(default_factory=list)
    storages: list[kata_agent_pb2.Storage] = field(default_factory=list)
    _containers: dict[str, list[str]] = field(default_factory=dict)
    _binds: list[Path] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    plugged: int = 0

    # -- the agent

    def call(self, method: str, request: Any, response: Any = Empty, timeout: float = 60.0) -> Any:
        assert self.vm.agent is not None
        return self.vm.agent.call(_AGENT, method, request, response, timeout)

    def start(self) -> Sandbox:
        """Health, then CreateSandbox with the shared directory, as both shims do."""
        assert self.vm.agent is not None
        driver = self.settings.block_device_driver
        if self.settings.shim == RUST and driver in ("virtio-blk", "virtio-blk-mmio"):
            raise SandboxFailed(f"unsupported block device type {driver}")
        if self.settings.shim == GO and driver not in ("virtio-scsi", "virtio-blk"):
            raise SandboxFailed(f"Invalid hypervisor block storage driver {driver} specified")
        self.vm.agent.call(
            "grpc.Health", "Check", kata_health_pb2.CheckRequest(), kata_health_pb2.HealthCheckResponse, 60.0
        )
        request = kata_agent_pb2.CreateSandboxRequest(sandbox_id=self.sandbox_id, hostname="sandbox")
        if self.settings.shared is not None:
            request.storages.add(
                driver="virtio-fs", source="kataShared", fstype="virtiofs", mount_point=_GUEST_SHARED, options=["nodev"]
            )
        request.storages.add(driver="ephemeral", source="shm", fstype="tmpfs", mount_point=f"{_GUEST_SANDBOX}/shm")
        self.call("CreateSandbox", request)
        return self

    # -- containers

    def create_container(
        self,
        bundle: Path,
        container_id: str,
        rootfs: list[dict[str, Any]] | None = None,
        *,
        image: Path | None = None,
        start: bool = True,
    ) -> None:
        """From `<bundle>/config.json`. ContainerFailed where the shim or the agent refuses.

        `rootfs` are the mounts that containerd passes for the root filesystem, `image` is where they are mounted, to be
        shared; without either it is the guest's own.
        """
        spec = json.loads((bundle / "config.json").read_text())
        request = kata_agent_pb2.CreateContainerRequest(container_id=container_id, exec_id=container_id)
        plugged: list[str] = []
        try:
            for mount in spec.get("mounts", []):
                self._mount(mount, request, container_id, plugged)
            for device in spec.get("linux", {}).get("devices", []):
                self._raw_device(device, request, plugged)
            _fill_oci(request.OCI, spec)
            if rootfs is not None:
                self._block_rootfs(rootfs, request, container_id, plugged)
            if image is not None:
                request.OCI.Root.Path = self._bind(str(image), f"{container_id}-rootfs")
            self.storages = list(request.storages)
            self.call("CreateContainer", request)
            if start:
                self.start_container(container_id)
        except (
            ttrpc.RpcError, OSError, ValueError, QmpError, ContainerFailed, subprocess.CalledProcessError
        ) as error:  # fmt: skip
            # What a sibling uses too is counted down by this, which is where the Rust shim forgets it.
            for key in plugged:
                self._unplug(key)
            raise ContainerFailed(str(error)) from error
        self._containers[container_id] = plugged

    def start_container(self, container_id: str) -> None:
        """Its first process, once; ttrpc.RpcError with the agent's words."""
        self.call("StartContainer", kata_agent_pb2.StartContainerRequest(container_id=container_id))

    def run(self, container_id: str, *arguments: str, timeout: float = 120.0) -> tuple[int, str]:
        """A process in the container; its exit status and its output."""
        exec_id = secrets.token_hex(8)
        process = kata_oci_pb2.Process(Args=list(arguments), Cwd="/")
        self.call(
            "ExecProcess",
            kata_agent_pb2.ExecProcessRequest(container_id=container_id, exec_id=exec_id, process=process),
        )
        output = b""
        read = kata_agent_pb2.ReadStreamRequest(container_id=container_id, exec_id=exec_id, len=1 << 16)
        while data := self.call("ReadStdout", read, kata_agent_pb2.ReadStreamResponse, timeout).data:
            output += data
        while data := self.call("ReadStderr", read, kata_agent_pb2.ReadStreamResponse, timeout).data:
            output += data
        wait = kata_agent_pb2.WaitProcessRequest(container_id=container_id, exec_id=exec_id)
        return self.call("WaitProcess", wait, kata_agent_pb2.WaitProcessResponse, timeout).status, output.decode(
            "utf-8", "replace"
        )

    def spawn(self, container_id: str, *arguments: str) -> str:
        """A process that goes on; its exec id."""
        exec_id = secrets.token_hex(8)
        process = kata_oci_pb2.Process(Args=list(arguments), Cwd="/")
        self.call(
            "ExecProcess",
            kata_agent_pb2.ExecProcessRequest(container_id=container_id, exec_id=exec_id, process=process),
        )
        return exec_id

    def remove_container(self, container_id: str) -> None:
        """The guest unmounts, then the devices that nobody else uses are unplugged, but what the Rust shim has forgotten.

        The hand-off stays, as Kata leaves it.
        """
        self.call("RemoveContainer", kata_agent_pb2.RemoveContainerRequest(container_id=container_id, timeout=10))
        for key in self._containers.pop(container_id):
            self._unplug(key)
        self._unbind(f"{container_id}-")

    def destroy(self) -> None:
        for drive in [*self.drives.values(), *self.forgotten]:
            with contextlib.suppress(QmpError, OSError, TimeoutError):
                self._pull(drive)
        self.drives.clear()
        self.forgotten.clear()
        self._unbind("")

    def volume_stats(self, guest_path: str) -> kata_csi_pb2.VolumeStatsResponse:
        request = kata_agent_pb2.VolumeStatsRequest(volume_guest_path=guest_path)
        answer: kata_csi_pb2.VolumeStatsResponse = self.call(
            "GetVolumeStats", request, kata_csi_pb2.VolumeStatsResponse
        )
        return answer

    # -- mounts

    def _mount(self, mount: dict[str, Any], request: Any, container_id: str, plugged: list[str]) -> None:
        options = list(mount.get("options", []))
        is_bind = mount.get("type") == "bind" or (self.settings.shim == GO and {"bind", "rbind"} & set(options))
        oci = request.OCI.Mounts.add(
            destination=mount["destination"], source=mount["source"], type=mount.get("type", ""), options=options
        )
        if not is_bind:
            return  # any other type is the agent's to mount
        if self._is_local(mount, oci, request):
            return
        info = self._direct_volume(mount["source"])
        if info is None:
            self._share(mount["source"], oci, container_id)
            return
        if self.settings.shim == RUST and mount["destination"].startswith("/dev"):
            info["fstype"] = "bind"  # taken for a device node, /devices too
        read_only = "ro" in (info["options"] if self.settings.shim == GO else options)
        storage = self._plug(info, read_only, options, mount["destination"], plugged)
        request.storages.append(storage)
        oci.source = storage.mount_point
        oci.type = "bind"
        if self.settings.shim == RUST:
            oci.options.extend(info["options"])
        elif not {"bind", "rbind"} & set(oci.options):
            oci.options.append("bind")

    @staticmethod
    def _is_local(mount: dict[str, Any], oci: Any, request: Any) -> bool:
        """What both shims keep in the guest: shared memory, and kubelet's empty directories, in memory or not."""
        if mount["destination"] == "/dev/shm":
            oci.source, oci.type = f"{_GUEST_SANDBOX}/shm", "bind"
            return True
        if _EMPTY_DIR not in mount["source"] or not os.path.isdir(mount["source"]):
            return False
        driver = "ephemeral" if os.path.ismount(mount["source"]) else "local"
        oci.source = f"{_GUEST_SANDBOX}/{driver}/{os.path.basename(mount['source'])}"
        oci.type = "bind"
        fstype = "tmpfs" if driver == "ephemeral" else driver
        request.storages.add(driver=driver, source=driver, fstype=fstype, mount_point=oci.source)
        return True

    def _direct_volume(self, source: str) -> dict[str, Any] | None:
        """mountInfo for the mount's source, byte for byte; None where the shim falls back to sharing."""
        place = self.settings.direct_volumes / base64.urlsafe_b64encode(os.fsencode(source)).decode()
        if self.settings.shim == GO:
            if self.settings.disable_block_device_use:
                self.log.append("Block device not supported")
                return None
            try:
                info = json.loads((place / "mountInfo.json").read_text())
            except (OSError, ValueError) as error:
                if place.exists():
                    self.log.append(f"could not read mountInfo: {error}")
                return None
            (place / self.sandbox_id).touch()
        else:
            if len(place.name) > 255 or not place.exists():
                return None
            if self.settings.disable_block_device_use:
                raise ContainerFailed("block device driver is empty")
            info = self._strict(place)
        info.setdefault("options", [])
        info.setdefault("metadata", {})
        return dict(info)

    @staticmethod
    def _strict(place: Path) -> dict[str, Any]:
        """runtime-rs reads with serde and checks the type: whatever is wrong fails the container."""
        try:
            info = json.loads((place / "mountInfo.json").read_text())
        except (OSError, ValueError) as error:
            raise ContainerFailed(f"get volume mount info: {error}") from error
        for key in ("volume-type", "device", "fstype"):
            if not isinstance(info.get(key), str):
                raise ContainerFailed(f"missing field `{key}`")
        if not isinstance(info.get("metadata", {}), dict) or not isinstance(info.get("options", []), list):
            raise ContainerFailed("invalid type in mountInfo.json")
        if info["volume-type"] != "directvol":
            raise ContainerFailed(f"unsupported direct volume type {info['volume-type']}")
        if not os.path.exists(info["device"]):
            raise ContainerFailed(f"stat {info['device']}: No such file or directory")
        return dict(info)

    def _share(self, source: str, oci: Any, container_id: str) -> None:
        """Both shims bind the host's path into the directory that virtiofsd exports."""
        oci.source = self._bind(source, f"{container_id}-{secrets.token_hex(4)}-{os.path.basename(oci.destination)}")

    def _bind(self, source: str, name: str) -> str:
        """Its path in the guest."""
        if self.settings.shared is None:
            raise ContainerFailed(f"{source} cannot be shared: no shared filesystem")
        place = self.settings.shared / name
        if os.path.isdir(source):
            place.mkdir()
        else:
            place.touch()
        subprocess.run(["mount", "--bind", source, str(place)], check=True)
        self._binds.append(place)
        return f"{_GUEST_SHARED}/{name}"

    def _unbind(self, prefix: str) -> None:
        for bind in [one for one in self._binds if one.name.startswith(prefix)]:
            subprocess.run(["umount", "-l", str(bind)], check=False)  # virtiofsd keeps what a guest has looked at
            self._binds.remove(bind)

    # -- devices

    def _plug(
        self, info: dict[str, Any], read_only: bool, oci_options: list[str], destination: str, plugged: list[str]
    ) -> kata_agent_pb2.Storage:
        key = info["device"]
        drive = self.drives.get(key)
        if drive is not None:
            drive.users += 1
        else:
            drive = self._add_drive(key, read_only)
        plugged.append(key)
        storage = kata_agent_pb2.Storage(driver=drive.driver, source=drive.source, fstype=info["fstype"])
        if self.settings.shim == GO:
            storage.options.extend(info["options"])
            storage.mount_point = f"{_GUEST_STORAGE}/{base64.urlsafe_b64encode(drive.source.encode()).decode()}"
            if "fsGroup" in info["metadata"]:
                storage.fs_group.group_id = int(info["metadata"]["fsGroup"])
                policy = info["metadata"].get("fsGroupChangePolicy", "Always")
                storage.fs_group.group_change_policy = 1 if policy == "OnRootMismatch" else 0
        else:
            kept = [option for option in info["options"] if option not in ("bind", "rbind")]
            storage.options.extend([*kept, "ro"] if read_only and "ro" not in kept else kept)
            unique = f"{secrets.token_hex(5)}-{secrets.token_hex(4)}-{os.path.basename(destination)}"
            storage.mount_point = f"{_GUEST_SHARED}/passthrough/{unique}"
            if self.settings.shared is not None:
                (self.settings.shared / "passthrough" / unique).mkdir(parents=True, exist_ok=True)
        return storage

    def _block_rootfs(self, rootfs: list[dict[str, Any]], request: Any, container_id: str, plugged: list[str]) -> None:
        """Exactly one mount of a block device is hot-plugged; the Go shim drops its options, except nouuid."""
        if len(rootfs) != 1:
            raise ValueError(f"rootfs has {len(rootfs)} mounts: only one block device is taken")
        mount = rootfs[0]
        drive = self._add_drive(mount["source"], False)
        plugged.append(mount["source"])
        path = f"{_GUEST_SHARED}/{container_id}"
        options = [one for one in mount["options"] if self.settings.shim == RUST or one == "nouuid"]
        request.storages.add(
            driver=drive.driver, source=drive.source, fstype=mount["type"], mount_point=path, options=options
        )
        request.OCI.Root.Path = path

    def _add_drive(self, key: str, read_only: bool) -> Drive:
        if self.settings.block_device_driver not in ("virtio-scsi", "virtio-blk", "virtio-blk-pci"):
            raise ContainerFailed(f"unsupported driver type {self.settings.block_device_driver}")
        backing = key.partition("#")[0]
        if not backing.startswith("nbd://") and not os.path.exists(backing):
            raise FileNotFoundError(2, "No such file or directory", backing)
        number = self._free_number()
        if self.settings.shim == RUST and not backing.startswith("nbd://"):
            drive = self._plug_in_rust(backing, number, read_only)
        else:
            drive = self._plug_in_go(backing, number, read_only)
        self.drives[key] = drive
        return drive

    def _plug_in_go(self, backing: str, number: int, read_only: bool) -> Drive:
        node, settings = f"drive-{secrets.token_hex(8)}", self.settings
        device = f"virtio-{node}"
        if backing.startswith("nbd://"):
            # Stands for a block node of a machine that is another one here.
            host, _, port = backing.removeprefix("nbd://").partition(":")
            self.vm.qmp("blockdev-add", driver="raw", **{"node-name": node, "read-only": read_only},
                        file={"driver": "nbd", "server": {"type": "inet", "host": host, "port": port}})  # fmt: skip
        else:
            # With cache options it looks at nothing, and says that whatever it plugs in is a node.
            block = settings.cache_set or stat.S_ISBLK(os.stat(backing).st_mode)
            cache = {"cache": {"direct": settings.cache_direct, "no-flush": False}} if settings.cache_set else {}
            self.vm.qmp(
                "blockdev-add",
                driver="raw",
                file={"aio": settings.aio, "driver": "host_device" if block else "file", "filename": backing, **cache},
                **{"node-name": node, "read-only": read_only},
                **cache,
            )
        if settings.block_device_driver == "virtio-scsi":
            self.vm.qmp("device_add", driver="scsi-hd", bus="scsi0.0", drive=node, id=device,
                        **{"scsi-id": number // 256, "lun": number % 256, "share-rw": True})  # fmt: skip
            return Drive(
                node=node, device=device, driver="scsi", source=f"{number // 256}:{number % 256}", number=number
            )
        slot = f"{number + 1:02x}"
        thread = {"iothread": self._iothread("indep_iothreadsPrefix_0")} if settings.indep_iothreads else {}
        self.vm.qmp("device_add", driver="virtio-blk-pci", bus="pci-bridge-0", addr=slot, drive=node, id=device,
                    romfile="", **{"num-queues": 1, "share-rw": True}, **thread)  # fmt: skip
        return Drive(node=node, device=device, driver="blk", source=f"02/{slot}", number=number)

    def _plug_in_rust(self, backing: str, number: int, read_only: bool) -> Drive:
        """The file is opened by the shim and passed to QEMU; cache_set is ignored."""
        name, settings = f"drive-{self.plugged}", self.settings
        self.plugged += 1
        fd = os.open(backing, os.O_RDONLY if read_only else os.O_RDWR)
        try:
            fdset = self.vm.pass_fd(fd, f"kata-block:{name}:block-source")
        finally:
            os.close(fd)
        block = stat.S_ISBLK(os.stat(backing).st_mode)
        shared = {"force-share": True} if read_only else {}
        self.vm.qmp("blockdev-add", driver="raw", **{"node-name": name, "read-only": read_only}, **shared,
                    file={"driver": "host_device" if block else "file", "filename": f"/dev/fdset/{fdset}", "read-only": read_only,
                          "aio": settings.aio, "cache": {"direct": settings.cache_direct}})  # fmt: skip
        share = {} if read_only else {"share-rw": True}
        if settings.block_device_driver == "virtio-scsi":
            self.vm.qmp("device_add", driver="scsi-hd", bus="scsi0.0", drive=name, id=name,
                        **{"scsi-id": number // 256, "lun": number % 256}, **share)  # fmt: skip
            return Drive(node=name, device=name, driver="scsi", source=f"{number // 256}:{number % 256}", number=number,
                         fdset=fdset)  # fmt: skip
        slot = f"{number + 1:02x}"
        thread = {"iothread": self._iothread("indep_iothread_0")} if settings.indep_iothreads else {}
        self.vm.qmp(
            "device_add", driver="virtio-blk-pci", bus="pci-bridge-0", addr=slot, drive=name, id=name, **share, **thread
        )
        return Drive(node=name, device=name, driver="blk", source=f"02/{slot}", number=number, fdset=fdset)

    def _iothread(self, name: str) -> str:
        if name not in (one["id"] for one in self.vm.qmp("query-iothreads")):
            self.vm.qmp("object-add", **{"qom-type": "iothread", "id": name})
        return name

    def _free_number(self) -> int:
        taken = {drive.number for drive in [*self.drives.values(), *self.forgotten]}
        return next(number for number in range(250) if number not in taken)

    def _unplug(self, key: str) -> None:
        drive = self.drives.get(key)
        if drive is None:
            return  # the Rust shim knows it no more, and it stays where it is
        drive.users -= 1
        raw = self.settings.shim == RUST and "#" in key
        if drive.users or raw:
            if self.settings.shim == RUST:
                # Its record goes although the detach has only counted down; a further container plugs it in again.
                self.forgotten.append(self.drives.pop(key))
            return
        self._pull(self.drives.pop(key))

    def _pull(self, drive: Drive) -> None:
        self.vm.qmp("device_del", id=drive.device)
        self.vm.wait_unplugged(drive.device)
        self.vm.remove_node(drive.node)
        if drive.fdset is not None:
            self.vm.qmp("remove-fd", **{"fdset-id": drive.fdset})

    def _raw_device(self, device: dict[str, Any], request: Any, plugged: list[str]) -> None:
        """volumeMode Block: known by major:minor only, whatever node names it has on the host."""
        real = "/dev/" + os.path.basename(os.path.realpath(f"/sys/dev/block/{device['major']}:{device['minor']}"))
        # runtime-rs looks devices up by an empty path, which never matches: each container plugs its own.
        key = f"{real}#{self.plugged}" if self.settings.shim == RUST else real
        drive = self.drives.get(key)
        if drive is None:
            drive = self._add_drive(key, read_only=False)
        else:
            drive.users += 1
        plugged.append(key)
        request.devices.add(id=drive.source, type=drive.driver, container_path=device["path"])
        request.OCI.Linux.Devices.add(Path=device["path"], Type="b", Major=device["major"], Minor=device["minor"])


def _fill_oci(oci: Any, spec: dict[str, Any]) -> None:
    process = spec["process"]
    oci.Version = spec.get("ociVersion", "1.2.0")
    oci.Process.Args.extend(process["args"])
    oci.Process.Env.extend(process.get("env", []))
    oci.Process.Cwd = process.get("cwd", "/")
    user = process.get("user", {})
    oci.Process.User.UID, oci.Process.User.GID = user.get("uid", 0), user.get("gid", 0)
    oci.Process.User.AdditionalGids.extend(user.get("additionalGids", []))
    oci.Root.Path = ""  # the test guest's own root is every container's
    oci.Root.Readonly = False


_ALWAYS = (
    {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
    {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
    {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid"]},
)


def write_bundle(directory: Path, mounts: list[dict[str, Any]], devices: list[dict[str, Any]] | None = None) -> Path:
    """An OCI bundle as containerd writes it, reduced to what a shim reads of volumes."""
    directory.mkdir(parents=True, exist_ok=True)
    spec = {
        "ociVersion": "1.2.0",
        "process": {"args": ["sleep", "100000"], "cwd": "/", "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"]},
        "root": {"path": "rootfs", "readonly": False},
        "mounts": [*_ALWAYS, *mounts],
        "linux": {"devices": devices or []},
    }
    (directory / "config.json").write_text(json.dumps(spec))
    return directory


def volume_mount(target: str, destination: str = "/mnt/data", *, read_only: bool = False) -> dict[str, Any]:
    """What CRI makes of a kubelet volume: always a bind mount of the target."""
    return {
        "destination": destination,
        "type": "bind",
        "source": target,
        "options": ["rbind", "rprivate", "ro" if read_only else "rw"],
    }
