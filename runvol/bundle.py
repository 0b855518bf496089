"""`runvol support-bundle`: what a maintainer needs of a node, in one file, without its secrets.

Each part has its own end in time and size; what fails or hangs is named in the file and left out. Nothing is asked of
Kubernetes but what doctor asks, so no Secret is ever read.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import io
import json
import os
import platform
import re
import select
import stat
import subprocess
import sys
import tarfile
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from blockdev import Deadline, WaitExpired, durable
from blockdev.deadlines import bounded
from guestmount import kata_config
from guestmount.containerd_files import Version, load
from guestmount.errors import Refused
from guestmount.runtimes import in_root
from runvol import assembly, config, doctor, doctor_containerd, doctor_shown, schemas, version
from runvol.config import Config
from runvol.diagnosis import Diagnosis
from runvol.masking import Masked

# Seconds of a part, and of all.
_LONGEST, _IN_ALL = 20.0, 150.0
# Bytes of a part and of all, before they are packed; files of one kind.
_PART, _WHOLE = 2 << 20, 48 << 20
_FILES = 200
_LINES = 5000
# Of a directory, and of all that is listed.
_ENTRIES = 5000
# Of the kernel's messages.
_OF_STORAGE = re.compile(
    r"(?i)device-mapper|\bdm-\d|\bdm_|thin|loop\d*:|\bloop\b|ext4|xfs|jbd2|nfs|sunrpc|i/o error|buffer i/o|blk_update|"
    r"oom-kill|out of memory|hung_task|blocked for more|runvol|project quota"
)
_UNITS = ("runvol-csi", "runvol-snapshotter", "runvol-nri", "containerd", "kubelet")
_LOGS = ("/var/log/runvol/*.log", "/var/log/runvol-flexvolume.log")
# Where the documents install, and where a pod reads which namespace is its own.
_NAMESPACE, _OWN_NAMESPACE = "runvol-system", "/var/run/secrets/kubernetes.io/serviceaccount/namespace"
# Where they lie in truth: below each of these, or with dockershim, whose names there are links.
_LOG_PLACES = ("/var/log", "/var/lib/docker/containers")
_KUBECONFIG_SECRETS = re.compile(
    r"(?m)^\s*-?\s*(?:token|password|client-key-data|client-certificate-data):\s*(\S+)\s*$"
)
_ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount/token"
_SECRET_NAMES = re.compile(r"(?i)pass|secret|token|auth|cred|key")

Make = Callable[[], str]


@dataclass(frozen=True, kw_only=True)
class Part:
    """`make` gives its text; `toml`: it is masked as such. `end`: of what is too long the end counts, as of a log."""

    name: str
    make: Make
    toml: bool = False
    end: bool = False


@dataclass(kw_only=True)
class Said:
    """Of a part, in MANIFEST.json. `left_out`: why it is not there; `absent`: this node has nothing of the kind."""

    name: str
    bytes: int = 0
    shortened: bool = False
    absent: bool = False
    seconds: float = 0.0
    left_out: str = ""


@dataclass(kw_only=True)
class Bundle:
    said: list[Said] = field(default_factory=list)
    content: dict[str, bytes] = field(default_factory=dict)

    @property
    def left_out(self) -> list[Said]:
        return [one for one in self.said if one.left_out]


def collect(
    config: Config, *, namespace: str = "", longest: float = _LONGEST, in_all: float = _IN_ALL,
    more: tuple[Part, ...] = (),
) -> Bundle:  # fmt: skip
    """Everything, masked. `namespace`: that of runvol's own pods, whose logs are taken; `more`: parts besides.
    WaitExpired where what is secret cannot be read."""
    until = time.monotonic() + in_all
    known = bounded("reading what is secret here", Deadline.after(longest), lambda: list(known_secrets(config)))
    made, masked = Bundle(), Masked(known)
    size = 0
    for part in (*_parts(config, namespace), *more):
        said = Said(name=part.name)
        made.said.append(said)
        begun = time.monotonic()
        seconds = min(longest, until - begun)
        if seconds <= 0 or size >= _WHOLE:
            said.left_out = "the whole took too long" if seconds <= 0 else f"the whole has {_WHOLE} bytes already"
            continue
        try:
            content, said.shortened = bounded(
                f"support bundle: {part.name}", Deadline.after(seconds), partial(_made, part, masked)
            )
        except WaitExpired:
            said.left_out = f"it gave no answer within {seconds:.0f} seconds"
        except FileNotFoundError as error:
            said.absent = True
            made.content[masked.text(part.name)] = masked.text(
                f"({error.filename or part.name} is not there)\n"
            ).encode()
        except Exception as error:  # of whatever kind: the other parts are still to come, and the reason is told
            said.left_out = masked.text(f"{type(error).__name__}: {error}")
        else:
            made.content[masked.text(part.name)], said.bytes = content, len(content)
            size += len(content)
        said.name, said.seconds = masked.text(said.name), round(time.monotonic() - begun, 2)
    made.content["MANIFEST.json"] = _json([asdict(one) for one in made.said]).encode()
    return made


def _made(part: Part, masked: Masked) -> tuple[bytes, bool]:
    text = part.make()
    kept = text[-_PART:] if part.end else text[:_PART]
    if part.end and kept != text:  # half of a line may be half of a secret, and the half that tells that it is one
        kept = kept.partition("\n")[2] or kept
    return (masked.toml(kept) if part.toml else masked.text(kept)).encode(errors="replace"), kept != text


def pack(made: Bundle, path: str, name: str) -> int:
    """Written whole, readable by its owner alone; its size in bytes. FileExistsError, as nothing is written over. One
    that was killed leaves a file that ends in `.new`, at most."""
    packed, now = io.BytesIO(), int(time.time())
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for part, content in sorted(made.content.items()):
            entry = tarfile.TarInfo(f"{name}/{part}")
            entry.size, entry.mtime, entry.mode = len(content), now, 0o600
            archive.addfile(entry, io.BytesIO(content))
    content = packed.getvalue()
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
    beside = f"{path}.{os.getpid()}-{os.urandom(4).hex()}.new"
    durable.write(beside, content)
    try:
        os.link(beside, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        durable.write(path, content)  # a filesystem without links
    finally:
        os.unlink(beside)
    return len(content)


def known_secrets(config: Config) -> Iterator[str]:
    """Values that this node is known to keep secret: of its kubeconfig, its account, its environment."""
    for path in (config.text("detect.kubeconfig"), _ACCOUNT):
        text = _secret(path) if path.startswith("/") else ""
        yield from (found.strip("\"'") for found in _KUBECONFIG_SECRETS.findall(text))
        if path == _ACCOUNT:
            yield text
        for name in re.findall(r"(?m)^\s*-?\s*(?:tokenFile|client-key):\s*(\S+)\s*$", text):
            yield _secret(os.path.join(os.path.dirname(path), name.strip("\"'")))
    yield from (value for name, value in os.environ.items()
                if _SECRET_NAMES.search(name) and not (value.startswith("/") and os.path.lexists(value)))  # fmt: skip


def _secret(path: str) -> str:
    """Empty for what cannot be read: then it stands nowhere else either."""
    try:
        return _file(path)
    except (OSError, ValueError):
        return ""


def _json(what: object) -> str:
    return json.dumps(what, indent=2, default=str) + "\n"


def _file(path: str, *, end: bool = False, within: Sequence[str] = ()) -> str:
    """A regular file; what is longer than a part may be is cut. `within`: where it lies wherever its name leads, if
    that is not for this node's owner alone to say."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    with os.fdopen(fd, "rb") as file:
        facts = os.fstat(fd)
        if not stat.S_ISREG(facts.st_mode):
            raise OSError(errno.EINVAL, "is no regular file", path)
        if within and not os.readlink(f"/proc/self/fd/{fd}").startswith(tuple(f"{one}/" for one in within)):
            raise OSError(errno.ELOOP, "leads elsewhere", path)
        if end and facts.st_size > _PART:
            file.seek(facts.st_size - _PART)
        return file.read(_PART + 1).decode(errors="replace")


def _named(path: str, *, end: bool = False, within: Sequence[str] = ()) -> str:
    return f"# {path}\n{_file(path, end=end, within=within)}"


def _said_by(
    *words: str, seconds: float = _LONGEST, environment: Mapping[str, str] | None = None, end: bool = False
) -> str:  # fmt: skip
    """What a program says, or the end of it, with how it ended where that is not well. It is ended with its time, and
    once it has said more than a part may have."""
    kept, until, cut = b"", time.monotonic() + seconds, False
    reading, writing = os.pipe()
    try:
        running = subprocess.Popen(
            list(words), stdin=subprocess.DEVNULL, stdout=writing, stderr=subprocess.STDOUT,
            env={**os.environ, "LC_ALL": "C", **(environment or {})},
        )  # fmt: skip
    except BaseException:
        os.close(reading)
        raise
    finally:
        os.close(writing)
    try:
        while not cut:
            if not select.select([reading], [], [], max(0.0, until - time.monotonic()))[0]:
                raise subprocess.TimeoutExpired(words[0], seconds)
            said = os.read(reading, 1 << 16)
            if not said:
                break
            kept = (kept + said)[-_PART - 1 :] if end else kept + said
            cut = len(kept) > _PART and not end
        status = 0 if cut else running.wait(max(0.1, until - time.monotonic()))
    finally:
        os.close(reading)
        running.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # one that hangs in the kernel is left behind
            running.wait(1.0)
    text = kept.decode(errors="replace")
    return text if status == 0 else f"{text}\n(status {status})\n"


def _parts(config: Config, namespace: str) -> Iterator[Part]:
    yield Part(name="runvol/version.json", make=_versions)
    diagnoses: list[Diagnosis] = []
    yield Part(name="runvol/doctor.json", make=partial(_doctor, config, diagnoses))
    yield Part(name="runvol/doctor.txt", make=lambda: "\n".join(doctor_shown.lines(diagnoses, 100)) + "\n")
    yield Part(name="runvol/config.json", make=lambda: _settings(config))
    for name, words in (
        ("volumes", ("volumes", "--json")), ("handoffs", ("handoffs", "--json")), ("gc", ("gc", "--dry-run", "--json")),
        ("snapshots", ("snapshots", "--json")), ("images", ("images", "--json")),
        ("pool", ("pool", "status", "--json")),
    ):  # fmt: skip
        yield Part(name=f"runvol/{name}.json", make=partial(_command, config, words))
    yield from _there("records", partial(_records, config))
    yield from _there("containerd", partial(_runtimes, config))
    for key in ("csi.metrics", "snapshotter.metrics"):
        if config.text(key):
            yield Part(name=f"metrics/{key.partition('.')[0]}.txt", make=partial(_metrics, config.text(key)))
    yield from _node(config)
    yield from _there("logs", _logs)
    yield from _there("pods", partial(_pod_logs, config, namespace))


def _there(what: str, look: Callable[[], Iterable[Part]]) -> Iterator[Part]:
    """The parts of one kind; where it cannot be found out which there are, one that says why."""
    try:
        yield from bounded(f"support bundle: what there is of {what}", Deadline.after(_LONGEST), lambda: list(look()))
    except Exception as error:  # of whatever kind: the other parts are still to come, and the reason is told
        yield Part(name=f"{what}/list.txt", make=partial(_unlisted, f"{type(error).__name__}: {error}"))


def _unlisted(why: str) -> str:
    raise RuntimeError(f"it cannot be found out what there is: {why}")


def _versions() -> str:
    facts: dict[str, Any] = {"runvol": version(), "python": sys.version, "kernel": " ".join(os.uname())}
    with contextlib.suppress(OSError):
        facts["system"] = platform.freedesktop_os_release()
    return _json(facts)


def _doctor(config: Config, found: list[Diagnosis]) -> str:
    """`found` has them afterwards."""
    found += doctor.examine_all(config)
    return schemas.written(schemas.Diagnosis, doctor_shown.items(found)).decode()


def _settings(config: Config) -> str:
    return _json({key: {"value": value, "source": config.sources[key]} for key, value in config.values.items()})


def _command(loaded: Config, words: tuple[str, ...]) -> str:
    """Another process of this program with the same settings, which may be ended."""
    said = {}
    for key, value in loaded.values.items():
        if loaded.sources[key] != "default":
            said[config.variable_of(key)] = ",".join(value) if isinstance(value, tuple) else str(value)
    empty = ("--config", "/dev/null")
    return _said_by(sys.executable, "-m", "runvol", *empty, *words, environment=said)


def _records(config: Config) -> Iterator[Part]:
    run = config.text("paths.run_dir")
    records = assembly.records(config)
    for place, pattern in (
        ("claims", f"{glob.escape(records)}/claims/*.json"),
        ("flexvolume", f"{glob.escape(records)}/flexvolume/targets/*"),
        ("run", f"{glob.escape(run)}/*.json"),
        ("handoffs", f"{glob.escape(config.text('paths.direct_volumes'))}/*/mountInfo.json"),
        ("snapshotter", f"{glob.escape(config.text('snapshotter.state_dir'))}/pool.json"),
    ):
        yield Part(name=f"records/{place}.txt", make=partial(_several, pattern))
    yield Part(name="records/state.txt", make=partial(_listed, config))


def _listed(config: Config) -> str:
    """The directories of runvol's own; what pods have in theirs is nobody's to give away, and never comes to an end."""
    state = config.text("paths.state_dir")
    of_pods = os.path.realpath(config.text("directory.path") or os.path.join(state, "directories"))
    lines: list[str] = []
    for top in (state, config.text("paths.run_dir")):
        for place, directories, files in os.walk(top):
            if len(lines) > _ENTRIES:
                return "\n".join([*lines, "(more)"]) + "\n"
            lines.append(f"{place!r}:")
            names = sorted((*directories, *files))[:_ENTRIES]
            lines += [_entry(os.path.join(place, name), name) for name in names]
            directories[:] = sorted(one for one in directories if _is_own(os.path.join(place, one), place))
            if os.path.realpath(place) == of_pods:
                directories.clear()
    return "\n".join(lines) + "\n"


def _is_own(path: str, above: str) -> bool:
    """Whether a directory is no link, and nothing is mounted there."""
    try:
        facts = os.lstat(path)
        return stat.S_ISDIR(facts.st_mode) and facts.st_dev == os.lstat(above).st_dev
    except OSError:
        return False


def _entry(path: str, name: str) -> str:
    try:
        facts = os.lstat(path)
    except OSError as error:
        return f"{name!r}: {error.strerror}"
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(facts.st_mtime))
    return (f"{stat.filemode(facts.st_mode)} {facts.st_nlink} {facts.st_uid} {facts.st_gid} {facts.st_size} "
            f"{facts.st_blocks * 512} {when} {name!r}")  # fmt: skip


def _several(pattern: str) -> str:
    """Files of one kind, one after the other, each under its name."""
    found, names, size = [], sorted(glob.glob(pattern)), 0
    for name in names[:_FILES]:
        if size > _PART:
            break
        try:
            found.append(f"==> {name}\n{_file(name)}\n")
            size += len(found[-1])
        except OSError as error:
            found.append(f"==> {name}\n({error.strerror})\n")
    if len(names) > _FILES:
        found.append(f"({len(names) - _FILES} more)\n")
    return "".join(found) or "(none)\n"


def _runtimes(config: Config) -> Iterator[Part]:
    taken, root = assembly.places(config).taken(), config.text("paths.host_root")
    files = [taken.config]
    with contextlib.suppress(Refused):
        files = [one.path for one in load(taken.config, Version(major=2, minor=4), root)] or files
    for number, path in enumerate(files[:_FILES]):
        name = f"containerd/{number}-{os.path.basename(path)}"
        yield Part(name=name, toml=True, make=partial(_named, in_root(path, root)))
    handlers = {}
    with contextlib.suppress(Exception):  # doctor tells of it
        handlers = doctor_containerd.asked(config).handlers
    for handler in list(handlers.values())[:_FILES]:
        if handler.is_sandbox and (found := kata_config.found(handler, root=assembly.kata_root(config))):
            name = re.sub(r"[^A-Za-z0-9._-]", "_", handler.name)
            yield Part(name=f"kata/{name}.toml", toml=True, make=partial(_named, found))
            drop_ins = f"{glob.escape(os.path.dirname(found))}/config.d/*"
            yield Part(name=f"kata/{name}.d.toml", toml=True, make=partial(_several, drop_ins))


def _metrics(address: str) -> str:
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
        f"http://{address}/metrics", timeout=5
    ) as reply:
        return str(reply.read(_PART + 1).decode(errors="replace"))


def _node(config: Config) -> Iterator[Part]:
    for name in ("mounts", "mountinfo"):
        yield Part(name=f"node/{name}.txt", make=partial(_proc, f"/proc/self/{name}"))
    process = config.text("node.kubelet_process")
    if process.isdecimal():
        yield Part(name="node/mountinfo-kubelet.txt", make=lambda: _proc(f"/proc/{process}/mountinfo"))
    for name in ("filesystems", "modules", "meminfo", "diskstats", "swaps"):
        yield Part(name=f"node/{name}.txt", make=partial(_proc, f"/proc/{name}"))
    for name, words in (
        ("losetup", ("losetup", "-l")), ("dmsetup-status", ("dmsetup", "status")),
        ("dmsetup-table", ("dmsetup", "table")),
        ("df", ("df", "-k", "--local")), ("df-inodes", ("df", "-i", "--local")), ("lsblk", ("lsblk", "-a")),
    ):  # fmt: skip
        yield Part(name=f"node/{name}.txt", make=partial(_said_by, *words))
    yield Part(name="node/kernel.txt", make=_kernel, end=True)


def _proc(path: str) -> str:
    with open(path, "rb") as file:
        return file.read(_PART + 1).decode(errors="replace")


def _kernel() -> str:
    lines = [line for line in _said_by("dmesg").splitlines() if _OF_STORAGE.search(line)]
    return "\n".join(lines[-_LINES:]) + "\n"


def _logs() -> Iterator[Part]:
    for unit in _UNITS:
        words = ("journalctl", "--no-pager", "-o", "short-iso", "-n", str(_LINES), "--since", "-2d", "-u", unit)
        yield Part(name=f"logs/{unit}.txt", end=True, make=partial(_said_by, *words, end=True))
    said = os.environ.get("RUNVOL_FLEXVOLUME_LOG")
    names = [path for pattern in _LOGS for path in glob.glob(pattern)] + ([said] if said else [])
    for number, path in enumerate(_newest(names)):
        within = () if path == said else _LOG_PLACES
        yield Part(name=f"logs/{number}-{os.path.basename(path)}", end=True,
                   make=partial(_named, path, end=True, within=within))  # fmt: skip


def _pod_logs(config: Config, namespace: str) -> Iterator[Part]:
    """Of runvol's own pods: a pod's name is its owner's to choose, its namespace is not."""
    place = config.text("paths.pod_logs")
    pattern = glob.escape(f"{place}/{namespace or _secret(_OWN_NAMESPACE).strip() or _NAMESPACE}_") + "*runvol*/*/*.log"
    found = _newest(glob.glob(pattern))
    for number, path in enumerate(found):
        yield Part(name=f"pods/{number}-{os.path.basename(path)}", end=True,
                   make=partial(_named, path, end=True, within=(*_LOG_PLACES, os.path.realpath(place))))  # fmt: skip
    if not found:
        yield Part(name="pods/none.txt", make=partial(_file, pattern))


def _newest(paths: Iterable[str]) -> list[str]:
    return sorted(paths, key=lambda path: -_changed(path))[:20]


def _changed(path: str) -> float:
    """0 for what is gone meanwhile, or a link to what is."""
    try:
        return os.stat(path).st_mtime
    except OSError:
        return 0.0
