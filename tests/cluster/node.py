"""A node: a machine with containerd and kubelet, whose directories are its own and outlive its being switched off.

Inside, everything is at its usual place. `/run`, `/var/log` and the kernel's boot id are new each time; `/etc` and
`/var/lib` are the machine's with the node's own changes on top; `/var/lib/containerd`, `/var/lib/runvol` and kubelet's
root lie in the node's directory itself. Devices are the machine's: loop devices outlast the node.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.cluster import cgroups, images, programs
from tests.cluster.machines import Machine, Program
from tests.cluster.network import write_pod_network
from tests.cluster.waiting import wait

if TYPE_CHECKING:
    from tests.cluster.cluster import Cluster
    from tests.cluster.file_server import FileServer

CONTAINERD_SOCKET = Path("/run/containerd/containerd.sock")
_TREE = Path(__file__).resolve().parents[2]
_KATA_SHIM = "bin/containerd-shim-kata-v2"


def _kata_place(text: str) -> Path:
    """Below /var/lib; the Rust shim's configuration is the one that says `virt_container`."""
    return Path("/var/lib/kata/runtime-rs" if "virt_container" in text else "/var/lib/kata")


@dataclass(frozen=True)
class Settings:
    """What differs between nodes.

    `kubelet` is merged into KubeletConfiguration; `shims` are runtime handlers by name, each with the path of its
    shim; `kata` are handlers whose pods run in a guest, each with Kata's configuration as TOML, which may be the Rust
    shim's. `containerd` is more of containerd's configuration, as TOML. `root` is kubelet's root directory, below
    /var/lib or one that exists already. `server` is reached also when the node's network is cut.
    """

    kubelet: Mapping[str, Any] = field(default_factory=dict)
    kubelet_flags: Sequence[str] = ()
    shims: Mapping[str, Path] = field(default_factory=dict)
    kata: Mapping[str, str] = field(default_factory=dict)
    containerd: str = ""
    root: Path = Path("/var/lib/kubelet")
    labels: Mapping[str, str] = field(default_factory=dict)
    server: FileServer | None = None


class Node:
    """`root` is kubelet's root directory. Paths are the node's; `path` says where the tests find the same file."""

    def __init__(self, cluster: Cluster, index: int, settings: Settings) -> None:
        self.cluster, self.index, self.settings = cluster, index, settings
        self.name = f"node{index}"
        self.address = cluster.network.node(index)
        self.directory = cluster.directory / self.name
        self.machine = Machine(self.name)
        self.cgroup = f"{cluster.cgroup}/{self.name}"
        self.root = settings.root
        bins = programs.directory("containerd")
        path = {"PATH": f"{bins}:/usr/sbin:/usr/bin:/sbin:/bin"}
        self.containerd = self.launched(
            "containerd", [bins / "containerd", "--config", "/etc/containerd/config.toml"], env=path
        )
        self.kubelet = self.launched("kubelet", self._kubelet_argv(), env=path)

    def launched(
        self, name: str, argv: Sequence[str | Path], *, keep: bool = False, env: dict[str, str] | None = None
    ) -> Program:
        """One more program of this node, such as a driver; known to the cluster as `node1/<name>`, and not started yet."""
        return self.cluster.known(f"{self.name}/{name}", argv, machine=self.machine, keep=keep, env=env)

    def run(self, argv: Sequence[str | Path], *, timeout: float = 60.0, check: bool = True) -> str:
        """What a command prints that runs on the node, as root, with the node's mounts and network."""
        return self.machine.run(argv, timeout=timeout, check=check)

    def path(self, inside: str | Path) -> Path:
        """Where a file or a socket of the node is for the tests, while it is on."""
        return Path(f"/proc/{self.machine.pid}/root", str(inside).lstrip("/"))

    def on(self, seconds: float = 60.0, *, units: Sequence[str] = (), away: bool = False) -> None:
        """Switches the machine on, and starts containerd, the `units` (programs that were `launched`) and kubelet. With
        `away` it has no network, and nobody waits for the API server to hear of it."""
        self._write()
        self.machine.on()
        self._mount()
        cgroups.make(self.cgroup)
        self.cluster.network.join(self.cluster.machine, self.machine, self.index)
        if self.settings.server is not None:
            self.settings.server.join(self.machine, self.index)
        if away:
            self.cut()
        self.containerd.start()
        self.wait_containerd(seconds)
        self._import_own()
        for name in units:
            self.cluster.programs[f"{self.name}/{name}"].start()
        self.kubelet.start()
        self.wait_kubelet(seconds)
        if not away:
            self.wait_ready(seconds)

    def off(self) -> None:
        """As when the current fails; `on` starts it again with what was on its disk."""
        for program in self.cluster.programs.values():
            if program.machine is self.machine:
                program.forget()  # or it would be there before its turn
        self.machine.off()
        self.cluster.network.leave(self.cluster.machine, self.index)
        cgroups.remove(self.cgroup)

    def cut(self) -> None:
        """Takes the node's network away, until `mend`."""
        self.cluster.network.cut(self.cluster.machine, self.index)

    def mend(self) -> None:
        self.cluster.network.mend(self.cluster.machine, self.index)

    def wait_containerd(self, seconds: float = 60.0) -> None:
        """Until containerd answers."""
        wait(f"containerd of {self.name} answers", lambda: "Server:" in self.ctr("version", check=False), seconds,
             needs=[self.containerd])  # fmt: skip

    def wait_kubelet(self, seconds: float = 60.0) -> None:
        """Until kubelet serves; that the API server has heard of it is more (`wait_ready`)."""
        healthy = "busybox wget -q -O - http://127.0.0.1:10248/healthz && busybox nc -w 1 $1 10250 < /dev/null"

        def answers() -> bool:
            return self.run(["sh", "-c", healthy, "-", self.address]).startswith("ok")

        wait(f"kubelet of {self.name} answers", answers, seconds, needs=[self.kubelet, self.containerd])

    def wait_ready(self, seconds: float = 60.0) -> None:
        """Until the API server has the node as Ready, by a report of the kubelet that runs now."""

        def ready() -> bool:
            node = self.cluster.find("node", self.name)
            reports = [one for one in node["status"].get("conditions", []) if one["type"] == "Ready"] if node else []
            return any(
                one["status"] == "True"
                and datetime.fromisoformat(one["lastHeartbeatTime"]).timestamp() >= int(self.kubelet.started)
                for one in reports
            )

        wait(f"{self.name} is Ready", ready, seconds, needs=[self.kubelet, self.containerd])

    def ctr(self, *words: str | Path, check: bool = True, timeout: float = 120.0) -> str:
        return self.run([programs.program("ctr"), "--address", CONTAINERD_SOCKET, "--namespace", "k8s.io", *words],
                        check=check, timeout=timeout)  # fmt: skip

    def import_image(self, archive: Path) -> None:
        """The images of an OCI archive (a layout in a tar), for pods with `imagePullPolicy: Never`."""
        self.ctr("images", "import", "--all-platforms", archive, timeout=300.0)

    def _import_own(self) -> None:
        there = self.ctr("images", "list", "--quiet").split()
        for archive, reference in zip(
            images.own(self.cluster.directory / "images"), (images.PAUSE, images.BUSYBOX), strict=True
        ):
            if reference not in there:
                self.import_image(archive)

    def _write(self) -> None:
        for name in ("containerd", "kubelet", "runvol", "etc/containerd", "etc-work", "var-lib", "var-lib-work", "pki"):
            (self.directory / name).mkdir(parents=True, exist_ok=True)
        for handler, text in self.settings.kata.items():
            self._write_kata(handler, text)
        write_pod_network(self.directory / "etc/cni/net.d", self.cluster.network.pods(self.index))
        (self.directory / "etc/resolv.conf").write_text("nameserver 127.0.0.1\n")
        (self.directory / "etc/containerd/config.toml").write_text(self._containerd_config())
        (self.directory / "kubelet.json").write_text(json.dumps(self._kubelet_config(), indent=1))
        self.cluster.certificates.kubeconfig(
            self.name, f"/O=system:nodes/CN=system:node:{self.name}", self.cluster.server
        )

    def _write_kata(self, handler: str, text: str) -> None:
        """The shim where Kata's own installation has it, which tells the two apart, and the configuration."""
        inside = _kata_place(text)
        shim, configuration = (self.directory / str(path).lstrip("/").replace("var/lib", "var-lib", 1)
                               for path in (inside / _KATA_SHIM, inside / f"{handler}.toml"))  # fmt: skip
        shim.parent.mkdir(parents=True, exist_ok=True)
        kind = "rust" if "runtime-rs" in inside.parts else "go"
        words = shlex.join([sys.executable, "-m", "tests.cluster.kata_shim", kind])
        shim.write_text(f'#!/bin/sh\nPYTHONPATH={shlex.quote(str(_TREE))} exec {words} "$@"\n')
        shim.chmod(0o755)
        configuration.write_text(text)

    def _mount(self) -> None:
        script = """
            mount -t tmpfs -o mode=755 log /var/log
            mount -t overlay -o "lowerdir=/etc,upperdir=$1/etc,workdir=$1/etc-work" etc /etc
            mount -t overlay -o "lowerdir=/var/lib,upperdir=$1/var-lib,workdir=$1/var-lib-work" var-lib /var/lib
            bind() { mkdir -p "$2"; mount --bind "$1" "$2"; mount --make-private "$2"; mount --make-shared "$2"; }
            bind "$1/containerd" /var/lib/containerd
            bind "$1/runvol" /var/lib/runvol
            bind "$1/kubelet" "$2"
            cat /proc/sys/kernel/random/uuid > /run/boot_id
            mount --bind /run/boot_id /proc/sys/kernel/random/boot_id
            # What kubelet sets for the whole machine, it sets in files of the node.
            for each in vm/overcommit_memory vm/panic_on_oom kernel/panic kernel/panic_on_oops kernel/keys/root_maxkeys \\
                    kernel/keys/root_maxbytes; do
                mkdir -p "/run/sysctl/${each%/*}"
                cat "/proc/sys/$each" > "/run/sysctl/$each"
                mount --bind "/run/sysctl/$each" "/proc/sys/$each"
            done
        """
        self.run(["sh", "-ec", script, "-", self.directory, self.root])

    def _containerd_config(self) -> str:
        runtimes = "".join(
            f"[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.{name}]\n"
            f"runtime_type = 'io.containerd.runc.v2'\nruntime_path = '{shim}'\n"
            for name, shim in self.settings.shims.items()
        )
        runtimes += "".join(
            f"[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.{name}]\n"
            f"runtime_type = 'io.containerd.kata.v2'\nruntime_path = '{_kata_place(text) / _KATA_SHIM}'\n"
            f"[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.{name}.options]\n"
            f"ConfigPath = '{_kata_place(text) / name}.toml'\n"
            for name, text in self.settings.kata.items()
        )
        return f"""version = 3
imports = ['/etc/containerd/conf.d/*.toml']
[plugins.'io.containerd.cri.v1.images'.pinned_images]
sandbox = '{images.PAUSE}'
[plugins.'io.containerd.cri.v1.runtime']
restrict_oom_score_adj = true
[plugins.'io.containerd.cri.v1.runtime'.cni]
bin_dirs = ['{programs.directory("cni")}']
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
runtime_type = 'io.containerd.runc.v2'
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
SystemdCgroup = false
{runtimes}{self.settings.containerd}"""

    def _kubelet_config(self) -> dict[str, Any]:
        return {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "address": self.address,
            "authentication": {
                "anonymous": {"enabled": False},
                "x509": {"clientCAFile": str(self.cluster.certificates.authority)},
            },
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": f"/{self.cgroup}",
            "failCgroupV1": False,
            "enforceNodeAllocatable": [],
            "failSwapOn": False,
            "oomScoreAdj": 0,
            "containerRuntimeEndpoint": f"unix://{CONTAINERD_SOCKET}",
            "evictionHard": {
                "memory.available": "50Mi",
                "nodefs.available": "1%",
                "nodefs.inodesFree": "1%",
                "imagefs.available": "1%",
            },
            "imageGCHighThresholdPercent": 100,  # an image that is removed comes from nowhere again
            "makeIPTablesUtilChains": False,
            "volumePluginDir": str(self.cluster.flexvolume),
            **self.settings.kubelet,
        }

    def _kubelet_argv(self) -> list[str | Path]:
        labels = ",".join(f"{name}={value}" for name, value in self.settings.labels.items())
        return [
            programs.program("kubelet"),
            f"--config={self.directory}/kubelet.json",
            f"--kubeconfig={self.cluster.certificates.directory}/{self.name}.kubeconfig",
            f"--root-dir={self.root}",
            f"--cert-dir={self.directory}/pki",
            f"--hostname-override={self.name}",
            f"--node-ip={self.address}",
            f"--node-labels={labels}",
            "--v=2",
            *self.settings.kubelet_flags,
        ]
