"""Settings: a file, then the environment, then flags; later wins, and each value remembers where it came from.

Every setting is a key of /etc/runvol/runvol.toml, a variable RUNVOL_<SECTION>_<KEY> and, where people type it, a
flag. Without any of them everything has a working default, and what belongs into one of the two directories follows it.
A key, and a variable of this form, that is not known is refused.
"""

from __future__ import annotations

import os
import re
import socket
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from blockdev import toml_files
from blockdev.addresses import host_and_port
from runvol import sizes

DEFAULT_FILE = "/etc/runvol/runvol.toml"
FILE_VARIABLE = "RUNVOL_CONFIG"
# What the FlexVolume driver is told besides settings, by the file that `runvol flexvolume install` writes.
OTHER_VARIABLES = (
    FILE_VARIABLE, "RUNVOL_FLEXVOLUME_LOG", "RUNVOL_FLEXVOLUME_CALL_SECONDS", "RUNVOL_FLEXVOLUME_NAME",
)  # fmt: skip
# Kubernetes gives every container the addresses of its namespace's Services, also of one that is named runvol-csi.
_OF_SERVICES = re.compile(
    r"_(SERVICE_HOST|SERVICE_PORT(_[A-Z0-9_]+)?|PORT(_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)\Z"
)
# How alike a variable must be to one of ours, of 1, to be a misspelt one.
_ALIKE = 0.9
# What people type for a setting, on the command that has it.
FLAGS = {
    "paths.state_dir": "--state-dir", "paths.run_dir": "--run-dir", "log.level": "--log-level",
    "csi.endpoint": "--endpoint", "csi.nfs_endpoint": "--nfs-endpoint", "csi.services": "--services",
    "node.id": "--node-id", "nri.socket": "--socket", "snapshotter.endpoint": "--endpoint",
    "paths.host_root": "--root", "paths.containerd_config": "--config",
}  # fmt: skip
DEFAULT, FLAG = "default", "flag"


class ConfigError(Exception):
    """A setting that cannot be used; names it, its value and its source."""


# As `volumes.registry` has them, which what kubelet executes cannot afford to import; a test compares.
BACKENDS = ("loop", "directory", "nfs")
# Bytes; as `blockdev.filesystems` has them.
SMALLEST = {"ext4": 8 << 20, "xfs": 300 << 20}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One key: its default gives its type."""

    default: str | int | bool | tuple[str, ...]
    meaning: str


TABLE: Mapping[str, Setting] = {
    "node.id": Setting(default="", meaning="the node's name; empty for the host's name"),
    "node.roots": Setting(
        default=("/var/lib/kubelet",), meaning="directories under which requests may name paths (kubelet's directory)"
    ),
    "node.kubelet_process": Setting(
        default="1",
        meaning="a process in the mount namespace that kubelet uses: a process id, or a program's name such as kubelet",
    ),
    "node.unproved_mounts": Setting(
        default="refuse",
        meaning="volumes where it cannot be found out whether kubelet sees the mounts made here: refuse or allow",
    ),
    "node.guest_filesystems": Setting(
        default="checked",
        meaning="what the host does before it mounts a block filesystem that a guest may have written: checked (whole, "
        "by a program under limits), trusted or never",
    ),
    "paths.state_dir": Setting(
        default="/var/lib/runvol", meaning="the state directory: volumes and stores; survives reboots"
    ),
    "paths.state_dir_mounted": Setting(
        default="false", meaning="something must be mounted at the state directory, else nothing starts: true or false"
    ),
    "paths.run_dir": Setting(
        default="/run/runvol", meaning="the run directory: sockets and locks; must not survive reboots"
    ),
    "paths.direct_volumes": Setting(
        default="/run/kata-containers/shared/direct-volumes", meaning="where Kata's shims look for direct volumes"
    ),
    "paths.containerd_config": Setting(
        default="auto",
        meaning="configuration of kubelet's containerd; `auto`: /etc/containerd/config.toml, else k3s's, else RKE2's",
    ),
    "paths.host_root": Setting(
        default="/", meaning="the node's root, as runvol sees it: where containerd's and Kata's configuration is read"
    ),
    "paths.kata_root": Setting(default="/", meaning="where the search for Kata's configuration starts"),
    "paths.pod_logs": Setting(
        default="/var/log/pods", meaning="where kubelet keeps what containers write out (its podLogsDir)"
    ),
    "detect.sandbox_handlers": Setting(
        default=("kata*", "runv*", "rund*"), meaning="names of handlers that are sandboxes"
    ),
    "detect.host_handlers": Setting(
        default=(), meaning="names of handlers that run pods on the node's own kernel, whatever their type"
    ),
    "detect.sandbox_handler": Setting(
        default="kata", meaning="the handler that the parameter `runtime: sandbox` means"
    ),
    "detect.rund": Setting(
        default="rund2", meaning="the dialect of handlers named rund: rund2 or rund3 (RunD's version)"
    ),
    "detect.default_runtime": Setting(
        default="", meaning="runtime of pods that nobody knows: runc, sandbox, a handler; empty refuses them"
    ),
    "detect.kubeconfig": Setting(
        default="", meaning="how to reach a Kubernetes API: a kubeconfig file, `in-cluster`, or empty for none"
    ),
    "detect.api_server": Setting(
        default="", meaning="the API's address, if not the configured one (a node-local proxy)"
    ),
    "detect.kubelet": Setting(
        default="",
        meaning="kubelet's address, asked for a pod that the API does not tell of: https://127.0.0.1:10250, or its "
        "read-only http://127.0.0.1:10255; empty for never",
    ),
    "detect.kubelet_ca": Setting(
        default="auto",
        meaning="file of the certificates that kubelet's own is of; `auto` is kubelet-server-current.pem or "
        "kubelet.crt in `pki` of the first of node.roots that has one",
    ),
    "kata.rust_shared_block": Setting(
        default="refuse",
        meaning="pods in which two containers write to one block volume under Kata's Rust shim, which loses data by "
        "it: refuse or allow",
    ),
    "volumes.backends": Setting(
        default=BACKENDS,
        meaning="backends that make volumes; the first serves classes that name none",
    ),
    "directory.path": Setting(
        default="", meaning="where the volumes of the backend directory lie; empty for <paths.state_dir>/directories"
    ),
    "directory.capacity_bytes": Setting(
        default=0,
        meaning="bytes, or a size such as 500Gi, that all volumes of the backend directory may promise; 0 for what "
        "the disk has",
    ),
    "loop.copy_gives_way_seconds": Setting(
        default=120,
        meaning="seconds for which a pod waits for a volume that is being copied (a snapshot or clone without "
        "reflinks); the copy then gives way, and begins again when it is asked for",
    ),
    "loop.capacity_bytes": Setting(
        default=0,
        meaning="bytes, or a size such as 500Gi, that all volumes of the backend loop may promise; 0 for what the disk "
        "has",
    ),
    "nfs.exports": Setting(
        default=(),
        meaning="exports whose volumes are found and listed although this controller has never worked there: "
        "`server:/path`, with mount options behind semicolons",
    ),
    "flexvolume.directories": Setting(
        default=(), meaning="where directories may lie that FlexVolume volumes name by `directory`; empty for none"
    ),
    "flexvolume.devices": Setting(
        default=(), meaning="where devices and images may lie that FlexVolume volumes name by `device`; empty for none"
    ),
    "cri.endpoint": Setting(
        default="auto",
        meaning="where the container runtime is asked which runtimes it has and whether a pod's sandbox lives (CRI); "
        "`auto`: the socket of that containerd, below paths.host_root; empty for never: then its file counts, and "
        "volumes that a sandbox has grow with its next pod only",
    ),
    "nri.socket": Setting(default="/var/run/nri/nri.sock", meaning="the container runtime's NRI socket"),
    "nri.metrics": Setting(default="", meaning="HOST:PORT where the NRI plugin serves its metrics; empty for none"),
    "metrics.interval_seconds": Setting(
        default=30, meaning="how often the volumes of a node are looked at for its metrics, where they are served"
    ),
    "metrics.doctor_seconds": Setting(
        default=900, meaning="how often `runvol doctor` is asked for its findings' metrics; 0 for never"
    ),
    "metrics.volumes": Setting(default=500, meaning="most volumes of a node that have metrics of their own"),
    "csi.endpoint": Setting(
        default="unix:///run/runvol/csi.sock",
        meaning="the CSI socket of the driver csi.runvol.io, which serves all volumes; empty for none",
    ),
    "csi.nfs_endpoint": Setting(
        default="",
        meaning="the CSI socket of the driver nfs.csi.runvol.io, which serves volumes on NFS; empty for none",
    ),
    "csi.plugins_registry": Setting(
        default="auto",
        meaning="where kubelet looks for plugins, and runvol introduces itself; `auto` is `plugins_registry` in the "
        "first of node.roots; empty for not at all (a node-driver-registrar does it)",
    ),
    "csi.startup_taint": Setting(
        default="",
        meaning="the key of a taint that new nodes come with, such as csi.runvol.io/not-ready, and that the node "
        "plugin takes off its node once kubelet has registered it; empty for none",
    ),
    "csi.max_volumes": Setting(
        default=0,
        meaning="volumes of csi.runvol.io that this node may have at a time, those on NFS not counted; 0 for "
        "any number",
    ),
    "csi.metrics": Setting(default="", meaning="HOST:PORT where the drivers serve their metrics; empty for none"),
    "csi.events_seconds": Setting(
        default=600,
        meaning="seconds after which an event on a pod or claim is said again, if it is still so; 0 for no events. "
        "Without an API (detect.kubeconfig) there are none",
    ),
    "csi.services": Setting(default=("identity", "controller", "node"), meaning="the CSI services to serve"),
    "snapshotter.endpoint": Setting(default="unix:///run/runvol/snapshotter.sock", meaning="the socket for containerd"),
    "snapshotter.state_dir": Setting(
        default="/var/lib/runvol/snapshotter", meaning="the snapshotter's store and its pool's description"
    ),
    "snapshotter.fstype": Setting(default="ext4", meaning="filesystem of root filesystems: ext4 or xfs"),
    "snapshotter.size_bytes": Setting(
        default=10 << 30, meaning="bytes, or a size such as 10Gi, that a root filesystem may hold"
    ),
    "snapshotter.namespace_sizes": Setting(
        default=(), meaning="the same for single containerd namespaces, as NAMESPACE=SIZE, such as k8s.io=20Gi"
    ),
    "snapshotter.call_seconds": Setting(default=60, meaning="longest time that one call of containerd's may take"),
    "snapshotter.discard": Setting(default=1, meaning="1: give deleted blocks back to the disk below; 0: keep them"),
    "snapshotter.images": Setting(
        default="", meaning="directory of shared images (a local one or NFS); empty for none"
    ),
    "snapshotter.image_keys": Setting(
        default=(),
        meaning="public keys whose signature makes this node use a shared image: files, or directories whose *.pub are "
        "read",
    ),
    "snapshotter.image_roots": Setting(
        default="",
        meaning="file of shared images that this node uses although no such key has signed them: a line CHAIN ROOT for "
        "each; empty for none",
    ),
    "snapshotter.images_unsigned": Setting(
        default=0, meaning="1: use shared images whoever has made them; 0: those that are signed or listed"
    ),
    "snapshotter.verity": Setting(
        default=0, meaning="1: hash committed layers behind, and let Views read through dm-verity; 0: do not"
    ),
    "snapshotter.share_layers": Setting(
        default=1, meaning="1: a layer that another containerd namespace has unpacked is not stored again; 0: it is"
    ),
    "snapshotter.unmap_idle_seconds": Setting(
        default=600, meaning="unmap a snapshot's device that nobody has had open for so long; 0 for never"
    ),
    "snapshotter.gauge": Setting(
        default="auto",
        meaning="where a filesystem is mounted that is as full as the pool, for kubelet and what watches the node; "
        "`auto` is `gauge` in snapshotter.state_dir; empty for none",
    ),
    "snapshotter.metrics": Setting(default="", meaning="HOST:PORT where it serves its metrics; empty for none"),
    "pool.data_reserve_percent": Setting(
        default=3, meaning="free data that new snapshots leave to those that run, in percent"
    ),
    "pool.autoextend_threshold": Setting(default=80, meaning="percent in use at which the pool is extended"),
    "pool.autoextend_percent": Setting(default=20, meaning="by how much of its size it is extended; 0 for never"),
    "log.level": Setting(default="info", meaning="debug, info, warning or error"),
    "log.format": Setting(default="text", meaning="text or json"),
}
# Settings that lie below one of the two directories, unless somebody says otherwise.
FOLLOWS = {
    "csi.endpoint": ("paths.run_dir", "unix://{}/csi.sock"),
    "snapshotter.endpoint": ("paths.run_dir", "unix://{}/snapshotter.sock"),
    "snapshotter.state_dir": ("paths.state_dir", "{}/snapshotter"),
}
# As `snapshotter.backing` has it: what tells that a directory is a snapshotter's.
POOL_FILE = "pool.json"
# As `csi.server` has them.
SERVICES = ("identity", "controller", "node")
# Settings that take one of a few words.
WORDS = {
    "log.level": ("debug", "info", "warning", "error"),
    "log.format": ("text", "json"),
    "detect.rund": ("rund2", "rund3"),
    "node.unproved_mounts": ("refuse", "allow"),
    "paths.state_dir_mounted": ("true", "false"),
    "node.guest_filesystems": ("checked", "trusted", "never"),
    "kata.rust_shared_block": ("refuse", "allow"),
}
_EXPORT = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^;/\[\]\s]+):/[^;\s]*(;[^;\s]+)*\Z")
# Kubelet's address: on the loopback, and elsewhere.
_HERE = re.compile(r"https?://(127\.[0-9.]+|localhost|\[::1\])(:[0-9]{1,5})?\Z")
_THERE = re.compile(r"https://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9][-A-Za-z0-9.]*)(:[0-9]{1,5})?\Z")
# A topology label's value (Kubernetes' limit).
_NODE_ID = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?\Z")

# A whole number as everybody reads it; Python takes others too.
_NUMBER = re.compile(r"-?[0-9]{1,18}\Z")
# More volumes than a node has places for, of any kind (blockdev's loop devices).
_MOST_VOLUMES = 1 << 20

# containerd's pkg/identifiers.
_NAMESPACE = re.compile(r"[A-Za-z0-9]+([-._][A-Za-z0-9]+)*\Z")
_LONGEST_NAMESPACE = 76


@dataclass(frozen=True, kw_only=True)
class Config:
    """Values by key, and the source of each. `file`: one that was named; empty for that which may be there."""

    values: Mapping[str, Any]
    sources: Mapping[str, str]
    file: str = ""

    def text(self, key: str) -> str:
        return str(self.values[key])

    def number(self, key: str) -> int:
        return int(self.values[key])

    def words(self, key: str) -> tuple[str, ...]:
        return tuple(self.values[key])

    def said(self, key: str, value: object = None) -> str:
        """A setting as an error names it: its value, or one of them, and who said it."""
        shown = self.values[key] if value is None else value
        return f"{key} = {list(shown) if isinstance(shown, tuple) else shown!r} (from {self.sources[key]})"

    @property
    def node_id(self) -> str:
        return self.text("node.id") or socket.gethostname()


def load(
    *, file: str | None = None, flags: Mapping[str, Any] | None = None, environment: Mapping[str, str] = os.environ
) -> Config:
    """The settings in force. ConfigError for an unknown key or variable, a wrong type, or a named file that is not
    there."""
    file = file or environment.get(FILE_VARIABLE) or None
    values: dict[str, Any] = {key: setting.default for key, setting in TABLE.items()}
    sources = dict.fromkeys(TABLE, DEFAULT)
    for key, value in _from_file(file).items():
        values[key], sources[key] = _typed(key, value, file or DEFAULT_FILE), file or DEFAULT_FILE
    _check_variables(environment)
    for key in TABLE:
        variable = variable_of(key)
        if variable in environment:
            values[key], sources[key] = _typed(key, _from_text(key, environment[variable]), variable), variable
    for key, value in (flags or {}).items():
        if value is not None:
            flag = FLAGS.get(key, FLAG)
            values[key], sources[key] = _typed(key, _from_text(key, value), flag), flag
    for key, (directory, form) in FOLLOWS.items():
        if sources[key] == DEFAULT and sources[directory] != DEFAULT:
            _follow(values, sources, key, directory, form.format(values[directory].rstrip("/")))
    config = Config(values=values, sources=sources, file=file or "")
    _check(config)
    return config


def _follow(values: dict[str, Any], sources: dict[str, str], key: str, directory: str, derived: str) -> None:
    """A pool that an earlier release has described elsewhere stays where it is."""
    kept = key == "snapshotter.state_dir" and os.path.exists(os.path.join(values[key], POOL_FILE))
    if not kept or os.path.exists(os.path.join(derived, POOL_FILE)):
        values[key], sources[key] = derived, directory


def source_kind(source: str) -> str:
    """What a source is: default, derived (of another setting), variable, flag or file."""
    if source in (DEFAULT, FLAG):
        return source
    if source in TABLE:
        return "derived"
    if source.startswith("RUNVOL_"):
        return "variable"
    return FLAG if source in FLAGS.values() else "file"


def _check_variables(environment: Mapping[str, str]) -> None:
    """ConfigError for one that is meant for runvol and that runvol does not know."""
    known = {*OTHER_VARIABLES, *map(variable_of, TABLE)}
    sections = tuple({f"RUNVOL_{key.partition('.')[0].upper()}_" for key in TABLE})
    for name in sorted(environment):
        if not name.startswith("RUNVOL_") or name in known or _OF_SERVICES.search(name):
            continue
        import difflib

        alike = difflib.get_close_matches(name, known, n=1, cutoff=_ALIKE)
        if alike or name.startswith(sections):
            hint = f"is {alike[0]} meant?" if alike else "a setting's is RUNVOL_<SECTION>_<KEY> (`runvol config`)"
            raise ConfigError(f"the variable {name} is not known; {hint}")


def variable_of(key: str) -> str:
    """`node.id` is RUNVOL_NODE_ID."""
    return "RUNVOL_" + key.replace(".", "_").upper()


def _from_file(file: str | None) -> dict[str, Any]:
    path = file or DEFAULT_FILE
    try:
        document = toml_files.read(path)[1]
    except FileNotFoundError:
        if file is None:
            return {}
        raise ConfigError(f"the configuration file {file} does not exist") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is no TOML: {error}") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    found = {}
    for section, table in document.items():
        if not isinstance(table, dict):
            raise ConfigError(f"{path}: {section!r} stands outside of a section; known sections are {_sections()}")
        for name, value in table.items():
            key = f"{section}.{name}"
            if key not in TABLE:
                raise ConfigError(f"{path}: the key {key!r} is not known; `runvol config` lists those that are")
            found[key] = value
    return found


def _sections() -> str:
    return ", ".join(sorted({key.split(".")[0] for key in TABLE}))


def _from_text(key: str, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    default = TABLE[key].default
    if isinstance(default, tuple):
        return [word.strip() for word in value.split(",") if word.strip()]
    if isinstance(default, int) and not key.endswith("_bytes"):
        return int(value) if _NUMBER.match(value) else value
    return value


def _typed(key: str, value: Any, source: str) -> Any:
    default = TABLE[key].default
    if isinstance(value, bool) and WORDS.get(key) == ("true", "false"):
        return str(value).lower()
    if key.endswith("_bytes") and isinstance(value, str):
        if not _is_size(value):
            raise ConfigError(f"{key} = {value!r} (from {source}): is no size: {sizes.FORM}")
        return sizes.parse(value)
    if isinstance(default, tuple):
        if isinstance(value, list | tuple) and all(isinstance(word, str) for word in value):
            return tuple(value)
    elif isinstance(value, type(default)) and not isinstance(value, bool):
        return value
    wanted = {str: "a text", int: "a whole number", tuple: "a list of texts"}[type(default)]
    raise ConfigError(f"{key} = {value!r} (from {source}): must be {wanted}")


def _check(config: Config) -> None:
    for key in ("paths.state_dir", "paths.run_dir", "paths.direct_volumes", "paths.host_root", "paths.kata_root"):
        if not config.text(key).startswith("/"):
            raise ConfigError(f"{config.said(key)}: must be an absolute path")
    _check_node(config)
    for key, words in WORDS.items():
        if config.text(key) not in words:
            raise ConfigError(f"{config.said(key)}: takes {', '.join(words)}")
    if config.text("directory.path") and not config.text("directory.path").startswith("/"):
        raise ConfigError(f"{config.said('directory.path')}: must be an absolute path")
    if config.text("csi.endpoint") == config.text("csi.nfs_endpoint"):
        both = repr(config.text("csi.endpoint")) if config.text("csi.endpoint") else "empty"
        why = "each driver has a socket of its own, and one of them has to be served"
        raise ConfigError(f"csi.endpoint and csi.nfs_endpoint are both {both}: {why}")
    _check_lists(config)
    _check_kubelet(config)
    _check_ranges(config)
    _check_snapshotter(config)
    if not _NODE_ID.match(config.node_id):
        raise ConfigError(
            f"{config.said('node.id', config.node_id)}: must be a label value of at most 63 "
            "characters, since it is the node's topology"
        )


def _check_lists(config: Config) -> None:
    for key, known in (("volumes.backends", BACKENDS), ("csi.services", SERVICES)):
        if not config.words(key) or set(config.words(key)) - {*known}:
            raise ConfigError(f"{config.said(key)}: takes any of {', '.join(known)}")
    for key in ("csi.metrics", "nri.metrics", "snapshotter.metrics"):
        if address := config.text(key):
            try:
                host_and_port(address)
            except ValueError as error:
                raise ConfigError(f"{config.said(key)}: {error}") from None
    for one in config.words("nfs.exports"):
        if not _EXPORT.match(one):
            raise ConfigError(
                f"{config.said('nfs.exports', one)}: takes `server:/path`, with mount options behind semicolons"
            )


def _check_node(config: Config) -> None:
    for root in config.words("node.roots"):
        if not root.startswith("/") or os.path.normpath(root) != root or root == "/":
            raise ConfigError(f"{config.said('node.roots', root)}: must be plain absolute paths")
    if not config.words("node.roots"):
        raise ConfigError(f"{config.said('node.roots')}: is empty; name kubelet's directory")
    if not config.text("node.kubelet_process"):
        raise ConfigError(
            f"{config.said('node.kubelet_process')}: is empty; name a process id, or a program such as kubelet"
        )


def _check_kubelet(config: Config) -> None:
    address = config.text("detect.kubelet")
    said = config.said("detect.kubelet")
    if not address:
        return
    if not config.text("detect.kubeconfig") and not config.text("detect.api_server"):
        raise ConfigError(f"{said}: it knows no RuntimeClasses; set detect.kubeconfig too")
    if not _HERE.match(address) and not _THERE.match(address):
        raise ConfigError(f"{said}: takes https://HOST:PORT, or http:// on the loopback (127.0.0.1, ::1)")


RANGES = {
    "loop.copy_gives_way_seconds": (1, 86400),
    "loop.capacity_bytes": (0, sizes.MOST),
    "directory.capacity_bytes": (0, sizes.MOST),
    "csi.max_volumes": (0, _MOST_VOLUMES),
    "csi.events_seconds": (0, 86400),
    "metrics.interval_seconds": (1, 3600),
    "metrics.doctor_seconds": (0, 86400),
    "metrics.volumes": (0, 5000),
    "snapshotter.size_bytes": (8 << 20, 1 << 50),
    "snapshotter.call_seconds": (1, 3600),
    "snapshotter.discard": (0, 1),
    "snapshotter.images_unsigned": (0, 1),
    "snapshotter.verity": (0, 1),
    "snapshotter.share_layers": (0, 1),
    "snapshotter.unmap_idle_seconds": (0, 1 << 30),
    "pool.data_reserve_percent": (0, 50),
    "pool.autoextend_threshold": (10, 100),
    "pool.autoextend_percent": (0, 1000),
}


def _check_ranges(config: Config) -> None:
    for key, (least, most) in RANGES.items():
        if not least <= config.number(key) <= most:
            raise ConfigError(f"{config.said(key)}: must lie between {least} and {most}")


def _check_snapshotter(config: Config) -> None:
    fstype = config.text("snapshotter.fstype")
    if fstype not in SMALLEST:
        raise ConfigError(f"{config.said('snapshotter.fstype')}: takes {', '.join(SMALLEST)}")
    _check_size(config.said("snapshotter.size_bytes"), config.number("snapshotter.size_bytes"), fstype)
    named: set[str] = set()
    for one in config.words("snapshotter.namespace_sizes"):
        name, _, size = one.partition("=")
        said = config.said("snapshotter.namespace_sizes", one)
        if not _is_size(size):
            raise ConfigError(f"{said}: takes NAMESPACE=SIZE; a size is {sizes.FORM}")
        if not _NAMESPACE.match(name) or len(name) > _LONGEST_NAMESPACE:
            raise ConfigError(f"{said}: containerd has no namespace of the name {name!r}")
        if name in named:
            raise ConfigError(f"{said}: {name} has a size already")
        named.add(name)
        _check_size(said, sizes.parse(size), fstype)
    for key in ("snapshotter.images", "snapshotter.image_roots"):
        if config.text(key) and not config.text(key).startswith("/"):
            raise ConfigError(f"{config.said(key)}: must be an absolute path")
    _check_gauge(config)
    for path in config.words("snapshotter.image_keys"):
        if not path.startswith("/"):
            raise ConfigError(f"{config.said('snapshotter.image_keys', path)}: must be absolute paths")
    idle, call = config.number("snapshotter.unmap_idle_seconds"), config.number("snapshotter.call_seconds")
    # The default follows a longer call.
    if idle and idle < call and config.sources["snapshotter.unmap_idle_seconds"] != "default":
        raise ConfigError(
            f"{config.said('snapshotter.unmap_idle_seconds')}: must not be below snapshotter.call_seconds = {call}, "
            "else a device goes under a call; 0 is for never"
        )


def _check_gauge(config: Config) -> None:
    gauge = config.text("snapshotter.gauge")
    if gauge not in ("", "auto") and (not gauge.startswith("/") or os.path.normpath(gauge) != gauge or gauge == "/"):
        raise ConfigError(
            f"{config.said('snapshotter.gauge')}: must be a plain absolute path, `auto`, or empty for none"
        )


def _is_size(text: str) -> bool:
    try:
        return sizes.parse(text) >= 0
    except ValueError:
        return False


def _check_size(said: str, size: int, fstype: str) -> None:
    least, most = SMALLEST[fstype], RANGES["snapshotter.size_bytes"][1]
    if not least <= size <= most:
        raise ConfigError(f"{said}: an {fstype} filesystem has {least} to {most} bytes")
