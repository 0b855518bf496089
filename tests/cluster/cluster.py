"""A real Kubernetes on this machine: etcd, the control plane and nodes, in namespaces and directories of their own.

    with Cluster(tmp_path) as cluster:
        cluster.apply(pod("p"))
        cluster.wait_ready("p")
        cluster.kill("kube-apiserver")
        cluster.start("kube-apiserver")

The API server's address is reachable from the tests (`cluster.server`, `cluster.kubeconfig`). There is no kube-proxy and
no DNS: of all services only `kubernetes` has a working cluster address; the API server reaches webhooks by their
endpoints.
"""

from __future__ import annotations

import json
import os
import stat
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tests.cluster import cgroups, images, programs
from tests.cluster.certificates import Certificates
from tests.cluster.machines import Broken, Machine, Program, tail
from tests.cluster.network import KUBERNETES, SERVICES, Network
from tests.cluster.node import Node, Settings
from tests.cluster.waiting import wait

T = TypeVar("T")
Manifest = Mapping[str, Any]
CONTROL_PLANE = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler")


class Cluster:
    """`nodes` describes the first nodes; `flags` are more arguments for a program of the control plane, by its name.

    All that it writes is under `directory`, which a later cluster can take up again. Afterwards the programs, their
    mounts, interfaces and cgroups are gone.
    """

    def __init__(self, directory: Path, nodes: Sequence[Settings] = (Settings(),), *,
                 flags: Mapping[str, Sequence[str]] | None = None) -> None:  # fmt: skip
        self.directory = directory
        # Where kubelet, on every node, and the controller manager look for FlexVolume drivers.
        self.flexvolume = directory / "flexvolume"
        self.flags = flags or {}
        self.cgroup = cgroups.new_name()
        self.machine = Machine("control")
        self.network = Network(0)
        self.programs: dict[str, Program] = {}
        self.nodes: list[Node] = []
        self._settings = nodes

    def __enter__(self) -> Cluster:
        if missing := programs.missing():
            raise Broken(f"{programs.NOT_BUILT} (missing: {', '.join(missing)})")
        cgroups.remove_abandoned()
        try:
            self.machine.on()
            self.network = Network.of(self.machine)
            cgroups.make(self.cgroup)
            self._prepare()
            for name in CONTROL_PLANE:
                self.programs[name].start()
            self.wait_api()
            for settings in self._settings:
                self.add_node(settings)
            self.wait("the service account of pods is there", lambda: self.find("serviceaccount", "default"))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for node in self.nodes:
            node.machine.off()
        self.network.leave()
        self.machine.off()
        cgroups.remove(self.cgroup)
        for device in self._loop_devices():
            subprocess.run(["losetup", "--detach", device], check=False)

    def _prepare(self) -> None:
        self.server = f"https://{self.network.control}"
        # The address can differ from an earlier run's, and a server's certificate names it.
        self.certificates = Certificates(self.directory / "pki")
        certificates = self.certificates.directory
        names = f"IP:{self.network.control},IP:{KUBERNETES},IP:127.0.0.1,DNS:kubernetes,DNS:kubernetes.default.svc"
        serving = self.certificates.pair(f"server-{self.network.number}", "/CN=kube-apiserver", names)
        to_kubelets = self.certificates.pair("to-kubelets", "/O=system:masters/CN=to-kubelets")
        signing = self.certificates.service_accounts
        authority = self.certificates.authority
        self.kubeconfig = self.certificates.kubeconfig("admin", "/O=system:masters/CN=admin", self.server)
        manager, scheduler = (
            self.certificates.kubeconfig(name, f"/CN=system:{name}", self.server)
            for name in ("kube-controller-manager", "kube-scheduler")
        )
        self._known_control("etcd", f"--data-dir={self.directory}/etcd", "--unsafe-no-fsync", "--log-level=warn")
        self._known_control(
            "kube-apiserver", "--etcd-servers=http://127.0.0.1:2379", "--secure-port=443",
            f"--advertise-address={self.network.control}", f"--service-cluster-ip-range={SERVICES}",
            f"--tls-cert-file={serving[0]}", f"--tls-private-key-file={serving[1]}", f"--client-ca-file={authority}",
            f"--kubelet-client-certificate={to_kubelets[0]}", f"--kubelet-client-key={to_kubelets[1]}",
            "--kubelet-preferred-address-types=InternalIP", "--authorization-mode=Node,RBAC",
            "--enable-admission-plugins=NodeRestriction", "--allow-privileged=true", "--enable-aggregator-routing=true",
            "--service-account-issuer=https://kubernetes.default.svc", f"--service-account-key-file={signing}",
            f"--service-account-signing-key-file={signing}", f"--cert-dir={certificates}",
        )  # fmt: skip
        self._known_control(
            "kube-controller-manager", f"--kubeconfig={manager}", f"--root-ca-file={authority}", "--leader-elect=false",
            f"--service-account-private-key-file={signing}", "--use-service-account-credentials=true",
            f"--flex-volume-plugin-dir={self.flexvolume}", f"--cert-dir={certificates}", keep=True,
        )  # fmt: skip
        # It ends where an API server that was killed has it find its memory wrong, and kubelet would start it again.
        self._known_control(
            "kube-scheduler", f"--kubeconfig={scheduler}", "--leader-elect=false", f"--cert-dir={certificates}",
            keep=True,
        )  # fmt: skip

    def _known_control(self, name: str, *words: str, keep: bool = False) -> None:
        self.known(name, [programs.program(name), *words, *self.flags.get(name, ())], keep=keep)

    def known(self, name: str, argv: Sequence[str | Path], *, machine: Machine | None = None, keep: bool = False,
              env: dict[str, str] | None = None) -> Program:  # fmt: skip
        """A program under a name, not started yet, in the control machine if not in another; its log is `logs/<name>.log`.

        With `keep` it is started again whenever it ends, as a sidecar is.
        """
        log = self.directory / "logs" / f"{name.replace('/', '-')}.log"
        self.programs[name] = Program(machine or self.machine, name, argv, log, keep=keep, env=env)
        return self.programs[name]

    def add_node(self, settings: Settings | None = None) -> Node:
        """One more node, which is Ready afterwards."""
        index = next(number for number in range(1, 8) if number not in [node.index for node in self.nodes])
        node = Node(self, index, settings or Settings())
        self.nodes.append(node)
        node.on()
        return node

    def remove_node(self, node: Node) -> None:
        """Switches a node off, and has the cluster forget it and its pods."""
        node.off()
        self.nodes.remove(node)
        for name in [name for name, program in self.programs.items() if program.machine is node.machine]:
            del self.programs[name]
        self.delete("node", node.name)
        for found in self.list("pods", "--all-namespaces", f"--field-selector=spec.nodeName={node.name}"):
            where = found["metadata"]
            self.kubectl(
                "delete", "pod", where["name"], f"--namespace={where['namespace']}", "--force", "--ignore-not-found"
            )

    def left(self) -> list[str]:
        """What is still there of a cluster that has ended: processes, mounts, interfaces, cgroups, loop devices."""
        machines = [self.machine, *(node.machine for node in self.nodes)]
        mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        interface = Path("/sys/class/net", self.network.link)
        return [
            *(f"process {pid}" for machine in machines for pid in machine.processes()),
            *(f"mount {mount}" for mount in mounts if Path(mount).is_relative_to(self.directory)),
            *([f"interface {interface.name}"] if interface.exists() else []),
            *(f"cgroup {path}" for path in cgroups.left(self.cgroup)),
            *(f"loop device {name}" for name in self._loop_devices()),
        ]

    def _loop_devices(self) -> list[str]:
        """Those over files of the nodes, after kubelet's over those: nobody detaches them when a node is switched off."""
        columns = ("--list", "--noheadings", "--output=NAME,BACK-MAJ:MIN,BACK-INO")
        done = subprocess.run(["losetup", *columns], capture_output=True, text=True, check=True).stdout
        listed = [(name, (device, inode)) for name, device, inode in map(str.split, done.splitlines())]
        found: list[str] = []
        below = [
            status for path in self.directory.glob("*/runvol/**/*") if stat.S_ISREG((status := path.lstat()).st_mode)
        ]
        while below:
            ours = {(f"{os.major(one.st_dev)}:{os.minor(one.st_dev)}", str(one.st_ino)) for one in below}
            over = [name for name, backing in listed if backing in ours and name not in found]
            found = over + found
            below = [os.stat(name) for name in over]
        return found

    def start(self, name: str) -> None:
        """Starts a program that was stopped or killed, and waits until it serves where that can be seen."""
        self.programs[name].start()
        node = next((node for node in self.nodes if name.startswith(f"{node.name}/")), None)
        if name == "kube-apiserver":
            self.wait_api()
        elif node and self.programs[name] is node.containerd:
            node.wait_containerd()
        elif node and self.programs[name] is node.kubelet:
            node.wait_kubelet()

    def stop(self, name: str) -> None:
        self.programs[name].stop()

    def kill(self, name: str) -> None:
        self.programs[name].kill()

    def wait_api(self, seconds: float = 90.0) -> None:
        needs = [self.programs["kube-apiserver"], self.programs["etcd"]]
        wait(
            "the API server is ready",
            lambda: self.kubectl("get", "--raw", "/readyz", timeout=5) == "ok",
            seconds,
            needs=needs,
        )

    def kubectl(self, *words: str | Path, stdin: str | None = None, timeout: float = 60.0) -> str:
        """What kubectl prints, as the cluster's administrator."""
        argv = [
            str(programs.program("kubectl")),
            f"--kubeconfig={self.kubeconfig}",
            f"--cache-dir={self.directory}/kubectl",
            *map(str, words),
        ]
        try:
            done = subprocess.run(argv, input=stdin, capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired as late:
            raise Broken(f"kubectl {' '.join(map(str, words))}: no answer in {timeout:g} s") from late
        if done.returncode:
            raise Broken(f"kubectl {' '.join(map(str, words))}: {done.stdout}{done.stderr}")
        return done.stdout

    def apply(self, *manifests: Manifest | str | Path) -> None:
        """Objects as dicts, YAML as text, or paths of files."""
        for manifest in manifests:
            if isinstance(manifest, Path):
                self.kubectl("apply", "-f", manifest)
            else:
                self.kubectl("apply", "-f", "-", stdin=manifest if isinstance(manifest, str) else json.dumps(manifest))

    def find(self, kind: str, name: str, namespace: str = "default") -> dict[str, Any] | None:
        """An object, or None where there is none."""
        text = self.kubectl("get", kind, name, f"--namespace={namespace}", "--ignore-not-found", "--output=json")
        return json.loads(text) if text.strip() else None

    def list(self, kind: str, *words: str) -> list[dict[str, Any]]:
        """The objects of a kind; `words` are more of kubectl's, such as `--all-namespaces`."""
        found: list[dict[str, Any]] = json.loads(self.kubectl("get", kind, "--output=json", *words))["items"]
        return found

    def delete(self, kind: str, name: str, *, namespace: str = "default", seconds: float = 60.0) -> None:
        """Asks for the deletion, and waits until the object is gone."""
        self.kubectl("delete", kind, name, f"--namespace={namespace}", "--wait=false", "--ignore-not-found")
        self.wait(f"{kind} {name} is gone", lambda: self.find(kind, name, namespace) is None, seconds,
                  about=(kind, name, namespace))  # fmt: skip

    def wait(self, words: str, check: Callable[[], T], seconds: float = 60.0, *,
             about: tuple[str, str, str] | None = None) -> T:  # fmt: skip
        """What `check` returns once that is true; a failure tells what is known `about` an object: kind, name, namespace."""
        return wait(words, check, seconds, why=lambda: self.explain(*about) if about else self.explain())

    def wait_ready(self, pod: str, *, namespace: str = "default", seconds: float = 60.0) -> dict[str, Any]:
        """The pod, once it is Ready."""

        def ready() -> dict[str, Any] | None:
            found = self.find("pod", pod, namespace)
            conditions = found["status"].get("conditions", []) if found else []
            return found if any(one["type"] == "Ready" and one["status"] == "True" for one in conditions) else None

        found = self.wait(f"the pod {pod} is Ready", ready, seconds, about=("pod", pod, namespace))
        assert found
        return found

    def events(self, name: str, namespace: str = "default") -> list[str]:
        """`Reason: message` of each event of an object, oldest first."""
        words = (f"--namespace={namespace}", f"--field-selector=involvedObject.name={name}")
        return [f"{one['reason']}: {one['message']}" for one in self.list("events", *words)]

    def explain(self, kind: str = "", name: str = "", namespace: str = "default") -> str:
        """What a failure needs: the object with its events, the containers' output, which programs run, ends of logs."""
        parts = []
        if kind:
            parts.append(self._attempt("describe", kind, name, f"--namespace={namespace}"))
        if kind == "pod":
            parts.append(self._attempt("logs", name, "--all-containers", "--tail=20", f"--namespace={namespace}"))
        parts.append(
            "programs: "
            + ", ".join(f"{one.name} {'runs' if one.running else 'ended'}" for one in self.programs.values())
        )
        parts += [tail(one.log, 12) for one in self.programs.values()]
        return "\n".join(parts)

    def _attempt(self, *words: str) -> str:
        try:
            return self.kubectl(*words, timeout=15)
        except Broken as problem:
            return str(problem)


def pod(name: str, script: str = "echo started; sleep 1000000 & wait", **spec: Any) -> dict[str, Any]:
    """A pod with one container `main` of busybox that runs `script`; `spec` are more fields of the pod's, or other ones.

    `main` in `spec` are more fields of the container.
    """
    container = {
        "name": "main",
        "image": images.BUSYBOX,
        "imagePullPolicy": "Never",
        "command": ["sh", "-c", f"trap 'exit 0' TERM; {script}"],
        **spec.pop("main", {}),
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name},
        "spec": {"containers": [container], "terminationGracePeriodSeconds": 5, **spec},
    }


def claim(name: str, size: str = "64Mi", **spec: Any) -> dict[str, Any]:
    """A claim of the class `runvol-xfs`, or as `spec` says otherwise."""
    return {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": name},
            "spec": {"accessModes": ["ReadWriteOnce"], "storageClassName": "runvol-xfs",
                     "resources": {"requests": {"storage": size}}, **spec}}  # fmt: skip
