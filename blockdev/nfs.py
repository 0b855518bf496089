"""NFS mounts without mount.nfs: the options that its kernel side wants, resolved here, and never a wait without an end.

Source: nfs(5) and fs/nfs/fs_context.c. The kernel takes `addr=` as a number and does not resolve names; version 4 wants
`clientaddr=`; version 3 asks the server's own mountd by itself, and `nolock` spares it a statd that may not run.
"""

from __future__ import annotations

import ipaddress
import re
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from blockdev import isolated
from blockdev.deadlines import Deadline, bounded
from blockdev.detached import PRIVATE, filesystem
from blockdev.errors import BlockdevError, FilesystemUnknown, MountFailed
from blockdev.mounts import parse_options

VERSIONS = ("3", "4.0", "4.1", "4.2")
DEFAULT_VERSION = "4.1"
PORT = 2049
_PROGRAM, _XID = 100003, 0x72756E76
_PORTMAP, _PORTMAP_PORT, _GETPORT, _MOUNTD = 100000, 111, 3, 100005
# How long a server may take to accept a connection, in seconds.
PATIENCE = 3.0
# Set from the server, the version and the node; an option of these would contradict them.
OWN_OPTIONS = frozenset({"addr", "clientaddr", "minorversion", "mountaddr", "v3", "v4", "fscontext"})
_VERSION_KEYS = frozenset({"vers", "nfsvers"})
_PORT_KEYS = frozenset({"port", "mountport"})
# A controller's mount gives up: 5 s a try, two tries, then EIO.
_GIVES_UP = ("soft", "timeo=50", "retrans=1")


class ServerSilent(BlockdevError):
    """Nobody accepts connections at the server's NFS port."""

    def __init__(self, server: str, why: str, port: int = PORT) -> None:
        super().__init__(f"the NFS server {server} does not answer on port {port}: {why}")


@dataclass(frozen=True, kw_only=True)
class Export:
    """A directory of a server. `server` is a name or an address, `path` absolute."""

    server: str
    path: str
    version: str = DEFAULT_VERSION
    options: tuple[str, ...] = ()

    @property
    def source(self) -> str:
        """As mount's tables show it; IPv6 addresses stand in brackets."""
        return f"[{self.server}]:{self.path}" if ":" in self.server else f"{self.server}:{self.path}"

    @property
    def fstype(self) -> str:
        return "nfs" if self.version == "3" else "nfs4"

    @property
    def port(self) -> int:
        """Where the server listens: the option `port`, where there is one."""
        return port_among(self.options)


def client_in_kernel() -> bool:
    """Whether the running kernel can mount NFS now; a module that nobody loaded does not count."""
    with open("/proc/filesystems") as known:
        return any(line.split()[-1] == "nfs4" for line in known)


def resolve(server: str, deadline: Deadline) -> str:
    """The server's address as a number; ServerSilent for a name that nobody knows."""
    try:
        return str(ipaddress.ip_address(server))
    except ValueError:
        pass
    try:
        found = bounded(f"resolving {server}", Deadline.after(min(PATIENCE, deadline.remaining())),
                        lambda: socket.getaddrinfo(server, PORT, type=socket.SOCK_STREAM))  # fmt: skip
    except OSError as error:
        raise ServerSilent(server, f"its name cannot be resolved ({error.strerror or error})") from error
    except UnicodeError as error:
        raise ServerSilent(server, "this is no name that a server can have") from error
    return str(found[0][4][0])


def probe(server: str, address: str, version: str, deadline: Deadline, *, port: int = PORT) -> str:
    """Prove that the server answers calls of this NFS version; this node's address towards it. ServerSilent otherwise.

    A mount of a dead server hangs in the kernel, and a frozen one still takes connections: so it is asked for nothing
    (the procedure NULL, RFC 5531 and 7530), and has to say that it did that.
    """
    program_version = 3 if version == "3" else 4
    try:
        client, words = _called(address, port, (_PROGRAM, program_version, 0), (), deadline)
    except OSError as error:
        silent = isinstance(error, TimeoutError)
        why = "it takes connections and does not reply" if silent else error.strerror or str(error)
        raise ServerSilent(server, why, port) from error
    if words[:3] != (_XID, 1, 0):
        raise ServerSilent(server, "what answers there is no NFS server", port)
    if words[5]:
        raise ServerSilent(server, f"it does not speak NFS version {program_version}", port)
    return client


def mountd_port(server: str, address: str, deadline: Deadline) -> int:
    """Where the server's mountd listens, by its portmapper (RFC 1833, version 2); ServerSilent if it does not say."""
    asked = (_MOUNTD, 3, socket.IPPROTO_TCP, 0)
    try:
        _, words = _called(address, _PORTMAP_PORT, (_PORTMAP, 2, _GETPORT), asked, deadline, results=1)
    except OSError as error:
        raise ServerSilent(server, f"its portmapper: {error.strerror or error}") from error
    if words[:3] != (_XID, 1, 0) or words[5] or not words[6]:
        raise ServerSilent(server, "its portmapper knows no mountd of version 3 over TCP")
    return words[6]


def _called(
    address: str, port: int, procedure: tuple[int, int, int], arguments: tuple[int, ...], deadline: Deadline, *,
    results: int = 0,
) -> tuple[str, tuple[int, ...]]:  # fmt: skip
    """One call over TCP without credentials (RFC 5531); this node's address, and the reply's words after its mark: xid,
    direction, state, the verifier's two, how it was accepted, and `results` more. OSError, TimeoutError among them."""
    patience = min(PATIENCE, max(0.1, deadline.remaining()))
    words = (_XID, 0, 2, *procedure, 0, 0, 0, 0, *arguments)
    call = struct.pack(f">{len(words)}I", *words)
    try:
        connection = socket.create_connection((address, port), patience)
    except TimeoutError as error:
        raise OSError("nothing answers at that address, or a firewall drops what is sent there") from error
    with connection:
        client = str(connection.getsockname()[0])
        connection.settimeout(patience)
        connection.sendall(struct.pack(">I", 0x80000000 | len(call)) + call)
        count = 7 + results
        return client, struct.unpack(f">{count}I", _read(connection, 4 * count, Deadline.after(patience)))[1:]


def _read(connection: socket.socket, count: int, deadline: Deadline) -> bytes:
    """All within one deadline: a server that drips bytes is as dead as one that sends none."""
    data = b""
    while len(data) < count:
        if deadline.remaining() <= 0:
            raise TimeoutError("it replies a byte at a time")
        connection.settimeout(deadline.remaining())
        part = connection.recv(count - len(data))
        if not part:
            raise OSError("it closed the connection")
        data += part
    return data


def kernel_options(export: Export, address: str, client: str) -> list[str]:
    """What mount(2) wants for this export, from the export's own options and what was found out."""
    options = [f"vers={export.version}", f"addr={address}"]
    if export.version == "3":
        options += [f"mountaddr={address}", "proto=tcp", "mountproto=tcp"]
        if not {"nolock", "lock"} & set(export.options):
            options.append("nolock")
    else:
        options.append(f"clientaddr={client}")
    return [*options, *(option for option in export.options if option not in ("nfs", "nfs4"))]


def mount(export: Export, target: str, deadline: Deadline) -> None:
    """Mount an export of a server that answers. ServerSilent, MountFailed or WaitExpired, with the server's name."""
    address = resolve(export.server, deadline)
    client = probe(export.server, address, export.version, deadline, port=export.port)
    options = kernel_options(export, address, client)
    flags, data = parse_options(options)
    try:
        isolated.mount(export.source, target, export.fstype, flags, data, deadline=deadline,
                       what=f"mounting {export.source} from the NFS server {export.server}")  # fmt: skip
    except OSError as error:
        raise MountFailed(export.source, target, _why(error)) from error


@contextmanager
def opened(export: Export, deadline: Deadline) -> Iterator[int]:
    """An export's root as a descriptor, on a mount that hangs nowhere, follows no link and gives up by itself; gone at
    the end."""
    address = resolve(export.server, deadline)
    client = probe(export.server, address, export.version, deadline, port=export.port)
    options: dict[str, str | None] = {"source": export.source}
    flags = [option for option in export.options if "=" in option or option in ("nolock", "noresvport", "resvport")]
    gentle = Export(server=export.server, path=export.path, version=export.version, options=(*flags, *_GIVES_UP))
    for option in kernel_options(gentle, address, client):
        key, equals, value = option.partition("=")
        options[key] = value if equals else None
    with ExitStack() as stack:
        try:
            mounted = filesystem(export.fstype, options, attributes=PRIVATE, deadline=deadline, remote=True)
            root = stack.enter_context(mounted)
        except FilesystemUnknown:
            raise
        except MountFailed as error:
            hint = "does the server export this path to this node, in this version?"
            raise MountFailed(export.source, "nowhere", f"{error.reason}; {hint}") from error
        yield root


def _why(error: OSError) -> str:
    hints = {
        "Protocol not supported": "the server does not speak this version; set vers",
        "No such file or directory": "the server exports no such path",
        "Permission denied": "the server does not let this node in; see its exports",
        "Invalid argument": "the kernel refuses an option",
        "No such device": "this node's kernel has no NFS client; load its module (modprobe nfs)",
    }
    text = str(error.strerror)
    return f"{text}: {hints[text]}" if text in hints else text


def check_options(options: Sequence[str]) -> str | None:
    """The first option that contradicts what is set here, or is no version; None if there is none."""
    for option in options:
        key, _, value = option.partition("=")
        if key in OWN_OPTIONS or (key in _VERSION_KEYS and value not in VERSIONS):
            return option
    return None


def version_among(options: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """The version that `vers=` or `nfsvers=` asks for, the last one counting as for mount(8), and the other options.

    The version is empty if none does.
    """
    asked = [option.partition("=")[2] for option in options if option.partition("=")[0] in _VERSION_KEYS]
    rest = tuple(option for option in options if option.partition("=")[0] not in _VERSION_KEYS)
    return (asked[-1] if asked else ""), rest


def port_among(options: Sequence[str]) -> int:
    """The port that `port=` names, the last one counting; the usual one otherwise, also for one that is no port."""
    named = [option.partition("=")[2] for option in options if option.startswith("port=")]
    return (_port(named[-1]) if named else None) or PORT


def wrong_port(options: Sequence[str]) -> str | None:
    """The first option that names a port, and no number of one; None if there is none."""
    for option in options:
        key, _, value = option.partition("=")
        if key in _PORT_KEYS and _port(value) is None:
            return option
    return None


def _port(text: str) -> int | None:
    """As the kernel reads it (kstrtouint), in decimals; 0 asks the server's portmapper. What is long is not even tried:
    Python refuses to, by ValueError."""
    return int(text) if re.fullmatch(r"0|[1-9][0-9]{0,4}", text) and int(text) < 65536 else None
