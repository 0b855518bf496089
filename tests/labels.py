"""A node in this process, and volumes that are staged and published with SELinux labels."""

from __future__ import annotations

from pathlib import Path

from blockdev import Deadline
from guestmount import PodRef, PublishRequest, StageRequest
from runvol import assembly, config
from volumes import AccessMode, Capability, SizeRange, Volume

MIB = 1 << 20


def capability(label: str, fstype: str, mode: AccessMode = AccessMode.SINGLE_NODE_MULTI_WRITER) -> Capability:
    """As kubelet has it where it knows the pod's label; empty for none."""
    flags = ("noatime", *((f'context="{label}"',) if label else ()))
    return Capability(mode=mode, fstype=fstype, mount_flags=flags)


class Lab:
    """One node and one volume of its backend `loop`; `another` makes more."""

    def __init__(self, directory: Path, *, fstype: str = "ext4") -> None:
        self.root, self.direct = directory / "kubelet", directory / "direct"
        self.root.mkdir(parents=True)
        settings = {
            "node.roots": str(self.root), "paths.state_dir": str(directory / "state"),
            "paths.run_dir": str(directory / "run"), "paths.direct_volumes": str(self.direct),
            "paths.containerd_config": str(directory / "containerd.toml"), "paths.kata_root": str(directory / "kata"),
            "node.id": "node-1", "node.unproved_mounts": "allow",
        }  # fmt: skip
        self.node = assembly.build(config.load(flags=settings))
        self.another("v", fstype)

    def another(self, name: str, fstype: str = "ext4", megabytes: int = 64, **context: str) -> None:
        """The volume that the verbs below are of from now on."""
        self.fstype, self.context = fstype, context
        self.mode = AccessMode.MULTI_NODE_MULTI_WRITER if context else AccessMode.SINGLE_NODE_MULTI_WRITER
        self.name = name
        if context:
            self.id = name
            return
        backend = self.node.catalog.for_parameters({"backend": "loop"})
        made: Volume = backend.create(name, SizeRange(required=megabytes * MIB), {}, [self._use("")])
        self.id = made.volume_id

    def _use(self, label: str) -> Capability:
        return capability(label, self.fstype, self.mode)

    @property
    def soon(self) -> Deadline:
        return Deadline.after(120)

    @property
    def staging(self) -> str:
        path = self.root / "staging" / self.name
        path.mkdir(parents=True, exist_ok=True)
        return str(path)

    def target(self, pod: str) -> str:
        path = self.root / "pods" / pod / "volumes/kubernetes.io~csi" / self.name
        path.mkdir(parents=True, exist_ok=True)
        return str(path / "mount")

    def stage(self, label: str) -> None:
        self.node.stage(
            StageRequest(
                volume_id=self.id, staging_path=self.staging, capability=self._use(label), context=self.context
            ),
            self.soon,
        )

    def publish(self, pod: str, label: str, runtime: str) -> str:
        self.node.publish(
            PublishRequest(
                volume_id=self.id, staging_path=self.staging, target=self.target(pod), capability=self._use(label),
                pod=PodRef(uid=pod), context={**self.context, "runtime": runtime},
            ), self.soon,
        )  # fmt: skip
        return self.target(pod)

    def end(self, *pods: str) -> None:
        for pod in pods:
            self.node.unpublish(self.id, self.target(pod), self.soon)
        self.node.unstage(self.id, self.staging, self.soon)
