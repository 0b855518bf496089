"""Everything that `runvol doctor` can find: the ids, which stay the same between releases, and what each means.

`docs/doctor.md` is made from it. An id without a fix is that of something that is well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Known:
    """`fix`: in general; a finding says it with its own paths and names."""

    meaning: str
    fix: str = ""

    @property
    def is_good(self) -> bool:
        return not self.fix


def _well(meaning: str) -> Known:
    return Known(meaning=meaning)


def _ill(meaning: str, fix: str) -> Known:
    return Known(meaning=meaning, fix=fix)


_PROGRAMS = {
    "programs.present": _well("a program that runvol starts is installed"),
    "programs.e2fsprogs-missing": _ill(
        "mkfs.ext4, e2fsck or debugfs is not installed: no volume on ext4 can be made or checked",
        "install e2fsprogs",
    ),
    "programs.util-linux-missing": _ill(
        "blkid is not installed: nobody can tell whether a device is blank", "install util-linux"
    ),
    "programs.xfsprogs-missing": _ill(
        "mkfs.xfs or xfs_logprint is not installed: volumes on XFS cannot be made or checked", "install xfsprogs"
    ),
    "programs.tar-missing": _ill("tar is not installed: directories cannot be copied", "install tar"),
    "programs.coreutils-missing": _ill("du is not installed: directories cannot be measured", "install coreutils"),
    "programs.thin-provisioning-tools-missing": _ill(
        "a program that looks at a pool's metadata is not installed", "install thin-provisioning-tools"
    ),
}
_KERNEL = {
    "kernel.loop": _well("loop devices can be made"),
    "kernel.loop-missing": _ill(
        "there is no /dev/loop-control: no volume of the backend loop can be attached",
        "`modprobe loop`, or mount the host's /dev into the container",
    ),
    "kernel.filesystem": _well("the kernel mounts a filesystem that volumes have"),
    "kernel.filesystem-missing": _ill(
        "the kernel neither has a filesystem that volumes have, nor a module of it",
        "install the package of this kernel's modules, or use another fstype in the StorageClass",
    ),
    "kernel.capability": _well("a capability that mounting takes is granted"),
    "kernel.admin-missing": _ill(
        "the process lacks CAP_SYS_ADMIN: nothing can be mounted",
        "run it as root, and in a container with `privileged: true`",
    ),
    "kernel.resource-missing": _ill(
        "the process lacks CAP_SYS_RESOURCE: a mounted ext4 cannot grow",
        "give the container the capability SYS_RESOURCE",
    ),
    "kernel.confinement": _well("programs that unpack the content of others are held in their directory"),
    "kernel.confinement-missing": _ill(
        "volumes with the content of others cannot be made: the kernel cannot hold tar in its directory",
        "run Linux 5.14 or later, with CAP_SYS_ADMIN",
    ),
}
_STATE = {
    "state.silent": _ill(
        "the directory of runvol's state gives no answer: its disk hangs, or a server that it lies on is gone",
        "see with `findmnt -T PATH` and `dmesg` which disk or server does not answer, and put that right",
    ),
}
_KUBELET = {
    "kubelet.root": _well("kubelet's directory is there"),
    "kubelet.root-missing": _ill(
        "kubelet's directory does not exist: no kubelet has run here, or its --root-dir is another one",
        "set `node.roots` to kubelet's --root-dir",
    ),
    "kubelet.root-silent": _ill(
        "kubelet's directory gives no answer: its disk hangs, or a server that it lies on is gone",
        "see with `findmnt -T PATH` and `dmesg` which disk or server does not answer, and put that right; kubelet "
        "waits for it too",
    ),
    "kubelet.root-too-long": _ill(
        "below kubelet's directory a pod's volume has a path of more than the 189 bytes by which Kata finds it",
        "give kubelet a shorter --root-dir, and set `node.roots` to it",
    ),
    "kubelet.mounts": _well("what is mounted here is seen by kubelet"),
    "kubelet.mounts-not-propagated": _ill(
        "what is mounted here does not reach kubelet: pods would write to the host's disk",
        "give the plugin's container `mountPropagation: Bidirectional` on kubelet's directory, and a systemd unit no "
        "mounts of its own",
    ),
    "kubelet.mounts-unproved": _ill(
        "whether mounts reach kubelet cannot be found out, as kubelet's process is not seen",
        "give the pod `hostPID: true`, or set `node.kubelet_process` to kubelet's process",
    ),
    "kubelet.driver": _well("the plugin answers at its socket"),
    "kubelet.driver-silent": _ill(
        "nobody answers at the plugin's socket", "start `runvol csi` with the same settings, and look into its log"
    ),
    "kubelet.registration": _well("kubelet knows the driver"),
    "kubelet.registry-missing": _ill(
        "there is no directory in which kubelet looks for plugins",
        "set `node.roots` to kubelet's --root-dir, or `csi.plugins_registry` to its plugins_registry",
    ),
    "kubelet.registration-missing": _ill(
        "kubelet does not know the driver: pods with its volumes wait",
        "start `runvol csi`; if it runs, its log and kubelet's say why",
    ),
    "kubelet.registration-twice": _ill(
        "several sockets register one driver's name: kubelet forgets it with whichever ends first",
        "leave one: this plugin's own, or a node-driver-registrar's with `csi.plugins_registry = \"\"`",
    ),
    "kubelet.pods": _well("kubelet tells of its pods"),
    "kubelet.pods-unreadable": _ill(
        "kubelet cannot be asked for its pods, so it tells of none while the API is away",
        "put right what is said of `detect.kubelet` and `detect.kubelet_ca`, and allow `get` on `nodes/pods`",
    ),
    "sidecars.arguments": _well("a sidecar has the arguments that its driver needs"),
    "sidecars.not-per-node": _ill(
        "a sidecar takes every node's claims, and finds no other node's volumes",
        "give it the argument `--node-deployment`",
    ),
    "sidecars.per-node-for-nfs": _ill(
        "a sidecar makes volumes on NFS on every node, though they belong to none",
        "take `--node-deployment` out, and let one central provisioner make them",
    ),
    "sidecars.topology-not-strict": _ill(
        "a claim may be made on another node than its pod's", "give csi-provisioner the argument `--strict-topology`"
    ),
    "sidecars.resizer-on-node": _ill(
        "the csi-resizer beside a node's plugin asks its own node for the volumes of all",
        "run it beside a controller, not on nodes",
    ),
}
_KUBERNETES = {
    "kubernetes.api": _well("the API answers, and lets be read what is needed"),
    "kubernetes.not-configured": _ill(
        "no API is configured: pods' runtimes and exports are known by settings alone",
        "set `detect.kubeconfig` to a kubeconfig file, or to in-cluster",
    ),
    "kubernetes.unreachable": _ill(
        "the configured API does not answer", "put right the address in `detect.kubeconfig` or `detect.api_server`"
    ),
    "kubernetes.unauthorized": _ill(
        "the API does not take the credentials (401)", "renew the token or certificate in the kubeconfig"
    ),
    "kubernetes.forbidden": _ill(
        "the API lets something not be read that is needed (403)",
        "give the plugin's account the rules in deploy/manifests/runvol.yaml",
    ),
    "kubernetes.csidriver": _well("the CSIDriver object says what the driver needs"),
    "kubernetes.csidriver-missing": _ill(
        "there is no CSIDriver object: pods hang without any event",
        "`kubectl apply -f deploy/kubernetes/csidrivers.yaml`, or `helm upgrade` where the chart is used",
    ),
    "kubernetes.csidriver-wrong": _ill(
        "the CSIDriver object says something else than the driver needs",
        "`kubectl delete csidriver NAME`, then `kubectl apply -f deploy/kubernetes/csidrivers.yaml`",
    ),
    "kubernetes.selinux-mount": _ill(
        "kubelet leaves labels to the driver's mounts, and a volume of the driver cannot be mounted with one",
        "set `seLinuxMount` to false in the CSIDriver (of the chart: `drivers.seLinuxMount=false`)",
    ),
    "kubernetes.limit-not-asked-again": _ill(
        "kubelet asks only once how many volumes the node may have",
        "set `nodeAllocatableUpdatePeriodSeconds` in the CSIDriver, which the chart does by itself",
    ),
    "kubernetes.csidriver-unreadable": _ill(
        "whether there is a CSIDriver object is not known", "allow the plugin's account to get csidrivers"
    ),
    "kubernetes.class-binds-at-once": _ill(
        "a StorageClass has volumes of a node made before it is known where their pods can run",
        "make the class anew with volumeBindingMode: WaitForFirstConsumer; its volumes stay",
    ),
    "kubernetes.handlers": _well("kubelet's container runtime has the handlers that containerd is said to have"),
    "kubernetes.handlers-differ": _ill(
        "kubelet's container runtime has other handlers than the containerd that is looked at here",
        "restart containerd, or set `paths.containerd_config` and `cri.endpoint` to kubelet's",
    ),
    "kubernetes.node-unreadable": _ill(
        "this node's object cannot be read", "set `node.id` to the node's name in Kubernetes, and allow to get nodes"
    ),
}
_CONTAINERD = {
    "containerd.place": _well("which containerd is kubelet's is known"),
    "containerd.several": _ill(
        "several containerds of this node may be kubelet's", "set `paths.containerd_config` to the one that is"
    ),
    "containerd.not-found": _ill(
        "no containerd's configuration can be read, so runtimes are known by their names only",
        "set `paths.containerd_config` and `cri.endpoint`, or repair the file",
    ),
    "containerd.running": _well("the running containerd tells its runtimes, and its file says the same"),
    "containerd.silent": _ill(
        "the running containerd was not asked or does not answer, so its file counts",
        "start containerd, or set `cri.endpoint` to its socket",
    ),
    "containerd.read-differently": _ill(
        "containerd 1 and 2 read its files differently", "put all of a handler into one file"
    ),
    "containerd.not-restarted": _ill(
        "the running containerd was started with another file than the present one", "restart containerd"
    ),
    "containerd.proxy-plugin": _well("containerd knows the snapshotter"),
    "containerd.config-unreadable": _ill(
        "containerd's configuration cannot be read as containerd reads it", "repair the file as the finding says"
    ),
    "containerd.proxy-plugin-missing": _ill(
        "containerd does not know the snapshotter",
        "`runvol snapshotter containerd-config --write`, then restart containerd",
    ),
    "containerd.proxy-plugin-elsewhere": _ill(
        "containerd looks for the snapshotter at another socket than it has",
        "`runvol snapshotter containerd-config --write`, then restart containerd",
    ),
    "containerd.gauge-elsewhere": _ill(
        "containerd names another place than the one that shows the pool's fill",
        "`runvol snapshotter containerd-config --write`, then restart containerd",
    ),
    "containerd.handlers-on-snapshotter": _well("runtimes have their root filesystems on the snapshotter"),
    "containerd.no-handler-on-snapshotter": _ill(
        "no runtime has its root filesystems on the snapshotter",
        "`runvol snapshotter containerd-config --write`, then restart containerd",
    ),
    "containerd.layers-discarded": _ill(
        "containerd discards layers once they are unpacked: they cannot be unpacked for another snapshotter",
        "set `discard_unpacked_layers = false`, then restart containerd",
    ),
    "containerd.platform-wrong": _ill(
        "a runtime's platform is not this machine's, so its pods get images of another one",
        "take the `platform` line out, then restart containerd",
    ),
    "containerd.unpack-wrong": _ill(
        "pulled layers are not unpacked into the snapshotter at once, but when a container is made",
        "`runvol snapshotter containerd-config --write`, then restart containerd",
    ),
    "containerd.not-there": _well("containerd has no entry of the snapshotter, and needs none"),
    "containerd.nri": _well("containerd's NRI is on"),
    "containerd.nri-disabled": _ill(
        "containerd's NRI is switched off: guests cannot mount NFS themselves",
        'set `disable = false` in [plugins."io.containerd.nri.v1.nri"], then restart containerd',
    ),
    "containerd.nri-socket-elsewhere": _ill(
        "containerd's NRI listens at another socket than `runvol nri` asks", "set `nri.socket` to containerd's"
    ),
    "containerd.nri-socket-missing": _ill(
        "containerd's NRI is on, and its socket is not there", "restart containerd, or set `nri.socket`"
    ),
    "containerd.nri-not-registered": _ill(
        "`runvol nri` is not registered: guests mount no NFS", "start `runvol nri` (nri.enabled of the chart)"
    ),
}
_KATA = {
    "kata.host": _well("a handler runs pods on the host's kernel"),
    "kata.handler": _well("a handler takes block volumes"),
    "kata.config-missing": _ill(
        "the configuration of a sandbox's shim was not found, so what it does with volumes is not known",
        "install Kata's configuration, or name it as the handler's ConfigPath",
    ),
    "kata.config-unreadable": _ill("the configuration of a sandbox's shim cannot be read", "repair the file"),
    "kata.disk-places": _well("the fullest guest of a handler has places for more disks"),
    "kata.disk-places-used-up": _ill(
        "a pod has as many block volumes as its guest has places for disks",
        'set `block_device_driver = "virtio-scsi"`, or more `default_bridges`, in the hypervisor\'s table of its '
        "configuration, or give the pod fewer volumes",
    ),
    "kata.block-devices-disabled": _ill(
        "a handler ignores block volumes: its pods would write to the host's disk",
        "set `disable_block_device_use = false` in the hypervisor's table of its configuration",
    ),
    "kata.block-driver-wrong": _ill(
        "a handler's block_device_driver is one that its shim does not plug in",
        'set `block_device_driver = "virtio-scsi"` in the hypervisor\'s table of its configuration',
    ),
    "kata.aio-without-direct": _ill(
        'QEMU refuses block_device_aio = "native" without direct I/O',
        "set `block_device_cache_set = true` and `block_device_cache_direct = true` beside it",
    ),
    "kata.drop-in-refused": _ill(
        "the Rust shim does not start with a drop-in that is no regular file", "put a copy in its place"
    ),
    "kata.shim-missing": _ill(
        "the program of a handler's shim is not there: its pods cannot start",
        "install Kata, or name the shim in the handler's runtime_path",
    ),
    "kata.queues-wrong": _ill(
        "the shim does not start with the number of a block device's queues",
        "set `num_queues` or `queue_size` to a number from 1 on, or take the line out",
    ),
    "kata.no-shared-directories": _ill(
        "a handler's pods get no directories of the host, or get them by 9p",
        'set `shared_fs = "virtio-fs"` in the hypervisor\'s table of its configuration',
    ),
    "kata.shared-block-not-refused": _ill(
        "pods in which two containers write to one block volume lose data under the Rust shim, and are not refused",
        "set `kata.rust_shared_block` to refuse, and `detect.kubeconfig`",
    ),
    "kata.guest-nfs": _well("a handler's guests can mount NFS"),
    "kata.guest-nfs-missing": _ill(
        "the kernel of a handler's guests cannot mount NFS",
        "use a guest kernel with CONFIG_NFS_V4, or classes with `inSandbox: share`",
    ),
    "kata.guest-nfs-unknown": _ill(
        "whether a handler's guests can mount NFS is not known: their kernel has no configuration in it nor beside it",
        "put the kernel's configuration beside it as config-VERSION",
    ),
}
_VOLUMES = {
    "volumes.listed": _well("the volumes of this node can be listed"),
    "volumes.store-unreadable": _ill("the store of volumes cannot be read", "put right what its message says"),
    "volumes.not-listed": _ill("volumes of one backend or export cannot be listed", "put right what its message says"),
    "volumes.backend": _well("the node has what a backend needs"),
    "volumes.over-promised": _ill(
        "volumes were promised more bytes than the disk has: a guest may find it full",
        "delete volumes or snapshots, or give the disk more room",
    ),
    "volumes.no-attributes": _ill(
        "the filesystem of the volumes takes no extended attributes: a store from a backup knows less of them",
        "put the volumes on ext4 or XFS",
    ),
    "volumes.no-quotas": _ill(
        "the filesystem of the backend directory keeps no project quotas: sizes cannot be enforced",
        "mount it with the option prjquota, or set `quota: none` in the StorageClass",
    ),
    "volumes.no-nfs-client": _ill(
        "the kernel has no NFS client loaded: volumes on NFS cannot be mounted here", "`modprobe nfs`"
    ),
    "volumes.unlooked": _ill("a volume cannot be looked at", "put right what its message says, then ask again"),
    "volumes.file-missing": _ill(
        "the file of a volume is gone or too short: its data is lost", "bring the file back from a backup"
    ),
    "volumes.filesystem-damaged": _ill(
        "a volume's filesystem is damaged", "end its pods, then check it with e2fsck or xfs_repair"
    ),
    "volumes.full": _ill("a volume is full or over its limits", "make the claim larger, or delete files in it"),
    "volumes.server-silent": _ill("a volume's server does not answer", "bring the server back"),
    "volumes.mount-missing": _ill(
        "what a pod was given is not mounted any more: it would write to the host's disk", "delete the pod"
    ),
    "volumes.hand-off-damaged": _ill(
        "the hand-off of a volume is damaged or closed: containers of its pod do not start", "delete the pod"
    ),
    "volumes.claim-damaged": _ill(
        "the record of who has a volume is damaged", "end its pods; `runvol gc` takes back what is left"
    ),
    "volumes.problem": _ill("something else is wrong with a volume", "put right what its message says"),
}
_LEFT = {
    "left.nothing": _well("nothing is left over"),
    "left.volume": _ill("a volume was begun or is being deleted, and nobody goes on with it", "`runvol gc`"),
    "left.file": _ill(
        "a file lies among the volumes that no volume has",
        "`runvol volumes adopt FILE --name NAME` takes it, `rm FILE` removes it",
    ),
    "left.hand-off": _ill("a hand-off is of no pod any more, or was left closed", "`runvol gc`"),
    "left.placeholder": _ill("a placeholder stands where no pod has a volume", "`runvol gc`"),
    "left.claim": _ill("a record says that somebody has a volume that is gone", "`runvol gc`"),
    "left.loop-device": _ill("nobody uses a loop device on a volume's file", "`runvol gc`"),
    "left.quota": _ill("a project quota stands that no volume has", "`runvol gc`"),
    "left.unlooked": _ill("not everything could be looked at that may be left over", "ask again"),
}
_REPAIRED = (
    "stop the containers on it, `systemctl stop runvol-snapshotter`, `runvol pool check --repair`, "
    "`systemctl start runvol-snapshotter`"
)
_POOL = {
    "devicemapper.kernel": _well("the kernel has thin pools"),
    "devicemapper.missing": _ill("device-mapper does not answer", "`modprobe -a dm_mod dm_thin_pool`, and run as root"),
    "devicemapper.thin-pool-missing": _ill(
        "the kernel has no target thin-pool",
        "`modprobe dm_thin_pool`; the package of this kernel's modules brings it",
    ),
    "pool.not-set-up": _well("no pool is described, and containerd needs none"),
    "pool.missing": _ill("containerd has an entry of the snapshotter, and no pool is described", "`runvol pool init`"),
    "pool.description-damaged": _ill("the pool's description cannot be read", "bring pool.json back from a backup"),
    "pool.not-assembled": _ill(
        "the pool is described and not assembled", "`systemctl start runvol-snapshotter` assembles it"
    ),
    "pool.foreign": _ill(
        "a mapped device of the pool's name is somebody else's",
        "rename it, or describe the pool under another name",
    ),
    "pool.health": _well("the pool is well"),
    "pool.unreadable": _ill("the pool cannot be looked at", "put right what its message says"),
    "pool.failed": _ill(
        "the pool's metadata cannot be read or written",
        f"{_REPAIRED}, then check the filesystems",
    ),
    "pool.needs-check": _ill(
        "the pool had a metadata error and waits for a check",
        _REPAIRED,
    ),
    "pool.read-only": _ill(
        "the pool takes no writes",
        _REPAIRED,
    ),
    "pool.suspended": _ill(
        "the pool is suspended: whatever is read or written on it waits",
        "`systemctl restart runvol-snapshotter` resumes it",
    ),
    "pool.metadata-full": _ill("the pool's metadata device is full", "`runvol pool extend --metadata`"),
    "pool.data-full": _ill("the pool has no free data blocks", "`runvol pool extend`, or remove images"),
    "pool.filling": _ill("the pool is nearly full", "`runvol pool extend`, or remove images"),
    "pool.over-promised": _ill(
        "the pool's file was promised more bytes than its disk has", "give the disk more room, or remove images"
    ),
    "pool.gauge": _well("what shows the pool's fill tells the truth"),
    "pool.gauge-missing": _ill(
        "kubelet and what watches the node do not see how full the pool is",
        "`systemctl restart runvol-snapshotter` makes the gauge; why it could not stands in its log",
    ),
    "pool.gauge-behind": _ill(
        "what shows the pool's fill does not follow the pool",
        "`systemctl restart runvol-snapshotter`; why it does not follow stands in its log",
    ),
    "snapshotter.store": _well("the snapshotter's store can be read"),
    "snapshotter.disk-refuses": _ill(
        "the filesystem of the snapshotter's store takes no writes",
        "put its disk right, stop the service, mount the filesystem anew, start it",
    ),
    "snapshotter.store-missing": _ill("the snapshotter has no store yet", "`systemctl start runvol-snapshotter`"),
    "snapshotter.store-damaged": _ill(
        "the snapshotter's store cannot be read", "`runvol pool repair-store` makes it anew from the pool"
    ),
    "snapshotter.rows-damaged": _ill(
        "what the snapshotter's store says of some snapshots is damaged: they are passed over, all others are served",
        "remove each in containerd, and make it anew; its device is quarantined then",
    ),
    "snapshotter.other-past": _ill("store and pool are not of one past", "do as its message says"),
    "snapshotter.ids-running-out": _ill(
        "most of the pool's device ids were given", "remove images that nobody uses; a new epoch begins by itself"
    ),
    "snapshotter.quarantine": _ill(
        "devices of the pool belong to no snapshot", "`runvol pool quarantine` lists and frees them"
    ),
}
_IMAGES = {
    "images.share": _well("the shared images can be read"),
    "images.unreadable": _ill("the directory of shared images cannot be read", "mount its storage"),
    "images.trusted": _well("whose images this node uses is known"),
    "images.trust-damaged": _ill("a public key or list of images cannot be read", "put right what its message says"),
    "images.unsigned-used": _ill(
        "whoever can write to the share decides what containers here run",
        "`runvol images sign --all --key FILE`, name the public key in `snapshotter.image_keys`, and set "
        "`snapshotter.images_unsigned` to 0",
    ),
    "images.nobody-trusted": _ill(
        "only those shared images are used that this node has used before",
        "name the public key that signs them in `snapshotter.image_keys` (`runvol images keygen FILE` makes one), or "
        "list them in `snapshotter.image_roots`",
    ),
    "images.passed-over": _ill("a shared image is passed over, and its layers are pulled", "`runvol images sign`"),
    "images.used-since-before": _ill(
        "a shared image is used only since this node has used it before", "`runvol images sign`"
    ),
}
_WHOLE = {
    "versions.known": _well("a program's version is one that runvol was tried with"),
    "versions.untried": _ill(
        "a program's version is one that runvol was never tried with",
        "install one that docs/doctor.md names, or report how it went",
    ),
    "versions.too-old": _ill("a program's version is too old for runvol", "install a later version"),
    "versions.skew": _ill(
        "programs of runvol on this node are of different releases",
        "restart those that are older, after the upgrade is complete",
    ),
    "clock.well": _well("the node's clock agrees with the API's"),
    "clock.off": _ill(
        "the node's clock is off: certificates and times are misjudged",
        "`systemctl restart chronyd`, or the node's other time service",
    ),
    "clock.future": _ill("what was written here is dated in the future: the clock was set back", "set the clock right"),
    "doctor.not-looked": _ill("a check came to no end", "put right what its message says, then ask again"),
}
TABLE: Mapping[str, Known] = (
    _PROGRAMS
    | _KERNEL
    | _STATE
    | _KUBELET
    | _KUBERNETES
    | _CONTAINERD
    | _KATA
    | _VOLUMES
    | _LEFT
    | _POOL
    | _IMAGES
    | _WHOLE
)
