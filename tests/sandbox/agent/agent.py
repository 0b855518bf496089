"""The agent in the test guest: Kata's agent protocol, the part that storage needs, with Kata's own strictness.

It runs as the guest's init. What it does and refuses follows Kata's agent (storage drivers, mount rules, reference
counts); where Kata answers UNIMPLEMENTED, so does this.
"""

from __future__ import annotations

import ctypes
import glob
import os
import select
import signal
import stat
import subprocess
import sys
import threading
import time

sys.path.insert(0, "/agent")

import ttrpc  # noqa: E402
from google.protobuf.empty_pb2 import Empty  # noqa: E402
from runvol_proto import kata_agent_pb2, kata_csi_pb2, kata_health_pb2  # noqa: E402

PORT = "agent.channel.0"
PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
_DEVICES = (("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0))
_libc = ctypes.CDLL(None, use_errno=True)
_FLAGS = {
    "defaults": (False, 0), "ro": (False, 1), "rw": (True, 1), "nosuid": (False, 2), "suid": (True, 2),
    "nodev": (False, 4), "dev": (True, 4), "noexec": (False, 8), "exec": (True, 8), "sync": (False, 16),
    "async": (True, 16), "remount": (False, 32), "mand": (False, 64), "dirsync": (False, 128),
    "noatime": (False, 1024), "atime": (True, 1024), "nodiratime": (False, 2048), "diratime": (True, 2048),
    "bind": (False, 4096), "rbind": (False, 4096 | 16384), "relatime": (False, 1 << 21),
    "norelatime": (True, 1 << 21), "strictatime": (False, 1 << 24), "private": (False, 1 << 18),
    "rprivate": (False, (1 << 18) | 16384), "slave": (False, 1 << 19), "rslave": (False, (1 << 19) | 16384),
}  # fmt: skip
_FSTAB = {"_netdev", "auto", "noauto", "nofail", "user", "users", "nouser", "owner", "group"}
_PROPAGATION = (1 << 18) | (1 << 19)


def fail(text, code=ttrpc.INTERNAL):
    raise ttrpc.RpcError(code, text)


def mount(source, target, fstype, flags, data):
    if _libc.mount(source.encode(), target.encode(), fstype.encode(), ctypes.c_ulong(flags), data.encode() or None) < 0:
        number = ctypes.get_errno()
        fail(f"failed to mount {source} to {target}: {os.strerror(number)} (os error {number})")


def umount(target, flags=0):
    if _libc.umount2(target.encode(), flags) < 0:
        number = ctypes.get_errno()
        fail(f"failed to umount {target}: {os.strerror(number)} (os error {number})")


def parse_options(options):
    """Flag names become flags, the rest is joined by commas; `loop` is an error."""
    flags, data = 0, []
    for option in options:
        if option == "loop":
            fail("loop option is not supported", ttrpc.INVALID_ARGUMENT)
        if option in _FLAGS:
            clear, value = _FLAGS[option]
            flags = flags & ~value if clear else flags | value
        elif option not in _FSTAB:
            data.append(option)
    return flags, ",".join(data)


def mounts():
    with open("/proc/self/mountinfo") as lines:
        for line in lines:
            fields = line.split()
            dash = fields.index("-")
            yield fields[4], fields[dash + 1]


def mounted(target):
    found = [fstype for at, fstype in mounts() if at == target]
    return found[-1] if found else None


def wait_for(what, look, seconds=20.0):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found = look()
        if found:
            return found
        time.sleep(0.02)
    return fail(f"timed out waiting for {what}")


def scsi_device(address):
    """`id:lun`: the bus is scanned for that address alone, as the kernel runs with scsi_mod.scan=none."""
    target, lun = address.split(":")
    pattern = f"/sys/bus/scsi/devices/*:0:{target}:{lun}/block/*"

    def look():
        for host in glob.glob("/sys/class/scsi_host/host*/scan"):
            with open(host, "w") as scan:
                scan.write(f"0 {target} {lun}")
        return opens(node_of(glob.glob(pattern)))

    return wait_for(f"scsi device {address}", look)


def opens(node):
    """None while it does not: QEMU forgets a SCSI disk before the guest does, and the address may be the next one's."""
    try:
        if node:
            os.close(os.open(node, os.O_RDONLY))
        return node
    except OSError:
        return None


def pci_device(path):
    """`02/01`: bridge slot, then device slot, in hexadecimal."""
    if path.startswith("/dev/"):
        return path
    bridge, slot = path.split("/")
    pattern = f"/sys/devices/pci0000:00/0000:00:{bridge}.0/0000:*:{slot}.0/virtio*/block/*"
    return wait_for(f"pci device {path}", lambda: node_of(glob.glob(pattern)))


def node_of(found):
    if not found:
        return None
    node = "/dev/" + os.path.basename(found[0])
    return node if os.path.exists(node) else None


def apply_group(root, group, policy, read_only):
    facts = os.stat(root)
    if policy == 1 and facts.st_gid == group and facts.st_mode & stat.S_ISGID and facts.st_mode & 0o070 == 0o070:
        return
    bits = 0o440 if read_only else 0o660
    for path, directories, files in os.walk(root):
        for name in [".", *files]:
            full = os.path.normpath(os.path.join(path, name))
            if os.path.islink(full):
                continue
            os.chown(full, -1, group)
            mode = stat.S_IMODE(os.stat(full).st_mode) | bits
            os.chmod(full, mode | 0o110 | stat.S_ISGID if os.path.isdir(full) else mode)


class Storages:
    """Mounts by mount point, counted: a second container with the same mount point uses the first one's."""

    handlers = ("scsi", "blk", "virtio-fs", "ephemeral", "local")

    def __init__(self):
        self._lock, self._counts = threading.Lock(), {}

    def add(self, storage):
        with self._lock:
            if self._counts.get(storage.mount_point):
                self._counts[storage.mount_point] += 1
                return
            self._mount(storage)
            self._counts[storage.mount_point] = 1

    def _mount(self, storage):
        if storage.driver == "scsi":
            source = scsi_device(storage.source)
        elif storage.driver == "blk":
            source = pci_device(storage.source)
        elif storage.driver in ("virtio-fs", "ephemeral"):
            source = storage.source
        elif storage.driver == "local":
            os.makedirs(storage.mount_point, exist_ok=True)
            return
        else:
            fail(f"Failed to find the storage handler {storage.driver}", ttrpc.INVALID_ARGUMENT)
        flags, data = parse_options([] if storage.driver == "ephemeral" else storage.options)
        if mounted(storage.mount_point) == storage.fstype:
            return
        os.makedirs(storage.mount_point, exist_ok=True)
        mount(source, storage.mount_point, storage.fstype, flags, data)
        if storage.HasField("fs_group"):
            group = storage.fs_group
            apply_group(storage.mount_point, group.group_id, group.group_change_policy, "ro" in storage.options)

    def remove(self, mount_point):
        with self._lock:
            left = self._counts.get(mount_point, 0) - 1
            if left > 0:
                self._counts[mount_point] = left
                return
            self._counts.pop(mount_point, None)
            if mounted(mount_point):
                umount(mount_point)


class Process:
    """A further process in a container's namespaces and root."""

    def __init__(self, process, keeper, rootfs):
        environment = dict(pair.split("=", 1) for pair in process.Env)
        # A container's own mounts are seen by entering its namespace, then its root.
        self._child = subprocess.Popen(
            ["/bin/busybox", "nsenter", f"--mount=/proc/{keeper}/ns/mnt", f"--pid=/proc/{keeper}/ns/pid",
             "/bin/busybox", "chroot", rootfs, *process.Args],
            env={"PATH": PATH, **environment},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        self.pipes = {"stdout": self._child.stdout.fileno(), "stderr": self._child.stderr.fileno()}

    def wait(self):
        code = self._child.wait()
        return 128 - code if code < 0 else code

    def signal(self, number):
        if self._child.poll() is None:
            os.killpg(self._child.pid, number)


class Init:
    """A container's first process, which it begins as a fork of the agent's; all others end with it."""

    # No other one keeps a copy of its pipes.
    _one = threading.Lock()

    def __init__(self, prepare, process, rootfs):
        self._lock, self._code = threading.Lock(), None
        # Of the thread that calls, which has no other children: every request has its own.
        if _libc.unshare(0x20000000) < 0:
            fail("no namespace of processes")
        with self._one:
            self._answer, self._said = os.pipe()
            self._go, self._start = os.pipe()
            (out, self._out), (err, self._err) = os.pipe(), os.pipe()
            self.pipes = {"stdout": out, "stderr": err}
            self.pid = os.fork()
            if self.pid == 0:
                self._begin(prepare, process, rootfs)
            for fd in (self._said, self._go, self._out, self._err):
                os.close(fd)

    def _begin(self, prepare, process, rootfs):
        try:
            os.setsid()
            prepare()
            os.write(self._said, b"ok")
            os.read(self._go, 1)
            user = process.User
            for number, fd in enumerate((os.open("/dev/null", os.O_RDONLY), self._out, self._err)):
                os.dup2(fd, number)
            os.chroot(rootfs)
            os.chdir(process.Cwd or "/")
            os.setgroups(list(user.AdditionalGids))
            os.setgid(user.GID)
            os.setuid(user.UID)
            environment = {"PATH": PATH, **dict(pair.split("=", 1) for pair in process.Env)}
            os.execvpe(process.Args[0], list(process.Args), environment)  # noqa: S606
        except OSError as error:
            os.write(self._said, f"{process.Args[0]}: {error.strerror} (os error {error.errno})".encode())
        except BaseException as error:
            os.write(self._said, str(error).encode())
        finally:
            os._exit(127)

    def ready(self):
        """Its mounts are made."""
        if not select.select([self._answer], [], [], 20.0)[0]:
            fail("timed out waiting for the container's mounts")
        if (said := os.read(self._answer, 4096)) != b"ok":
            fail(said.decode() or "the container's first process has ended")

    def start(self):
        os.write(self._start, b"x")
        if said := os.read(self._answer, 4096):
            fail(f"failed to exec {said.decode()}")

    def wait(self):
        with self._lock:
            if self._code is None:
                code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
                self._code = 128 - code if code < 0 else code
            return self._code

    def signal(self, number):
        if self._code is None:
            try:
                os.kill(self.pid, number)
            except ProcessLookupError:
                pass


class Container:
    """Rootfs, storages and processes of one container."""

    def __init__(self, request):
        self.id, self.request, self.processes = request.container_id, request, {}
        self.rootfs = f"/run/kata-containers/{self.id}/rootfs"
        self.mounted_storages = []
        self.devices = []

    def make_namespace(self):
        os.makedirs(self.rootfs, exist_ok=True)
        self.init = self.processes[self.id] = Init(self._prepare, self.request.OCI.Process, self.rootfs)
        try:
            self.init.ready()
        except ttrpc.RpcError:
            self.init.signal(signal.SIGKILL)
            self.init.wait()
            raise

    def _prepare(self):
        """rustjail's order: the root, then every mount of the bundle, all invisible to the rest of the guest."""
        if _libc.unshare(0x00020000) < 0:
            fail("no namespace of mounts")
        mount("none", "/", "", (1 << 18) | 16384, "")
        mount(self.request.OCI.Root.Path or "/", self.rootfs, "bind", 4096, "")
        for one in self.request.OCI.Mounts:
            self._mount_in(one)
            if one.destination == "/dev":
                self._default_devices()
        for path, number in self.devices:
            node = self.rootfs + path
            os.makedirs(os.path.dirname(node), exist_ok=True)
            if os.path.lexists(node):
                os.unlink(node)
            os.mknod(node, stat.S_IFBLK | 0o660, number)

    def _default_devices(self):
        for name, major, minor in _DEVICES:
            os.mknod(f"{self.rootfs}/dev/{name}", stat.S_IFCHR | 0o666, os.makedev(major, minor))
            os.chmod(f"{self.rootfs}/dev/{name}", 0o666)
        for name, target in (("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2"),
                             ("ptmx", "pts/ptmx")):  # fmt: skip
            os.symlink(target, f"{self.rootfs}/dev/{name}")

    def _mount_in(self, one):
        target = self.rootfs + one.destination
        flags, data = parse_options(one.options)
        if one.type == "bind":
            source = os.path.realpath(one.source)
            if not os.path.exists(source):
                fail(f"No such file or directory (os error 2): {one.source}")
            if os.path.isdir(source):
                os.makedirs(target, exist_ok=True)
            else:
                os.makedirs(os.path.dirname(target), exist_ok=True)
                open(target, "a").close()
            mount(source, target, "bind", flags & ~_PROPAGATION | 4096, "")
            if flags & 1:
                mount("none", target, "", 4096 | 32 | 1, "")
        else:
            os.makedirs(target, exist_ok=True)
            fstype = "cgroup2" if one.type == "cgroup" else one.type
            mount(one.source, target, fstype, flags & ~_PROPAGATION, data)


class Agent:
    """grpc.AgentService."""

    def __init__(self):
        self.storages, self.containers, self._lock = Storages(), {}, threading.Lock()

    def CreateSandbox(self, request):
        os.makedirs("/run/kata-containers/sandbox/storage", exist_ok=True)
        for storage in request.storages:
            self.storages.add(storage)
        return Empty()

    def DestroySandbox(self, request):
        os.sync()
        threading.Timer(0.2, lambda: _libc.reboot(0x4321FEDC)).start()
        return Empty()

    def CreateContainer(self, request):
        if not request.OCI.HasField("Process") or not request.OCI.HasField("Root"):
            fail("EINVAL: Invalid argument", ttrpc.INVALID_ARGUMENT)
        container = Container(request)
        try:
            for storage in request.storages:
                self.storages.add(storage)
                container.mounted_storages.append(storage.mount_point)
            for device in request.devices:
                container.devices.append((device.container_path, os.stat(self._find_device(device)).st_rdev))
            container.make_namespace()
        except BaseException:
            for mount_point in reversed(container.mounted_storages):
                self.storages.remove(mount_point)
            raise
        self.containers[request.container_id] = container
        return Empty()

    def _find_device(self, device):
        return scsi_device(device.id) if device.type == "scsi" else pci_device(device.id)

    def _container(self, container_id):
        return self.containers.get(container_id) or fail("invalid container id", ttrpc.INVALID_ARGUMENT)

    def StartContainer(self, request):
        self._container(request.container_id).init.start()
        return Empty()

    def ExecProcess(self, request):
        container = self._container(request.container_id)
        container.processes[request.exec_id] = Process(request.process, container.init.pid, container.rootfs)
        return Empty()

    def _process(self, request):
        container = self._container(request.container_id)
        found = container.processes.get(request.exec_id or container.id)
        return found or fail("invalid exec id", ttrpc.INVALID_ARGUMENT)

    def SignalProcess(self, request):
        self._process(request).signal(request.signal)
        return Empty()

    def WaitProcess(self, request):
        return kata_agent_pb2.WaitProcessResponse(status=self._process(request).wait())

    def ReadStdout(self, request):
        return kata_agent_pb2.ReadStreamResponse(data=self._read(request, "stdout"))

    def ReadStderr(self, request):
        return kata_agent_pb2.ReadStreamResponse(data=self._read(request, "stderr"))

    def _read(self, request, which):
        return os.read(self._process(request).pipes[which], min(request.len, 1 << 20))

    def RemoveContainer(self, request):
        container = self._container(request.container_id)
        for process in container.processes.values():
            process.signal(signal.SIGKILL)
            process.wait()
        for mount_point in reversed(container.mounted_storages):
            self.storages.remove(mount_point)
        del self.containers[request.container_id]
        return Empty()

    def UpdateEphemeralMounts(self, request):
        for storage in request.storages:
            if storage.driver != "ephemeral":
                fail(f"Unsupported storage driver type {storage.driver}", ttrpc.INVALID_ARGUMENT)
            if storage.options:
                flags, data = parse_options(storage.options)
                os.makedirs(storage.mount_point, exist_ok=True)
                mount(storage.source, storage.mount_point, storage.fstype, flags, data)
        return Empty()

    def GetVolumeStats(self, request):
        if not os.path.exists(request.volume_guest_path):
            fail(f"path {request.volume_guest_path} does not exist")
        facts = os.statvfs(request.volume_guest_path)
        answer = kata_csi_pb2.VolumeStatsResponse(volume_condition=kata_csi_pb2.VolumeCondition(message="OK"))
        total, free = facts.f_blocks * facts.f_bsize, facts.f_bfree * facts.f_bsize
        answer.usage.add(available=free, total=total, used=total - free, unit=1)
        answer.usage.add(available=facts.f_ffree, total=facts.f_files, used=facts.f_files - facts.f_ffree, unit=2)
        return answer

    def ResizeVolume(self, request):
        return fail("resize_volume is not implemented in kata-agent", ttrpc.UNIMPLEMENTED)

    def GetGuestDetails(self, request):
        details = kata_agent_pb2.AgentDetails(
            version="runvol-test", init_daemon=True, storage_handlers=self.storages.handlers
        )
        return kata_agent_pb2.GuestDetailsResponse(agent_details=details)


class Health:
    """grpc.Health."""

    def Check(self, request):
        return kata_health_pb2.HealthCheckResponse(status=kata_health_pb2.HealthCheckResponse.SERVING)

    def Version(self, request):
        return kata_health_pb2.VersionCheckResponse(grpc_version="0.0.1", agent_version="runvol-test")


def channel():
    for name in glob.glob("/sys/class/virtio-ports/*/name"):
        with open(name) as text:
            if text.read().strip() == PORT:
                return os.open("/dev/" + name.split("/")[-2], os.O_RDWR)
    return None


class PortStream(ttrpc.FileStream):
    """A virtio-serial port: reading returns nothing while no host is connected, which is not the end."""

    def read(self, count):
        while True:
            data = super().read(count)
            if data:
                return data
            time.sleep(0.05)


def main():
    fd = wait_for("the agent's port", channel)
    services = [
        ttrpc.Service(kata_agent_pb2.DESCRIPTOR.services_by_name["AgentService"], Agent()),
        ttrpc.Service(kata_health_pb2.DESCRIPTOR.services_by_name["Health"], Health()),
    ]
    print("agent: serving", flush=True)
    ttrpc.Server(PortStream(fd), services).serve()


if __name__ == "__main__":
    main()
