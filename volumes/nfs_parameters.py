"""The StorageClass parameters of the backend `nfs`."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping

from blockdev import nfs
from volumes.parameter import Parameter, one_of

RECORDS_PATH = "recordsPath"
_LABEL = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9]{0,61}[A-Za-z0-9])?")
# The interface that an IPv6 address is of, and bytes that no path has.
_SCOPE, _LONGEST = re.compile(r"[A-Za-z0-9_.-]{1,64}"), 4096


def is_server(value: str) -> bool:
    """A DNS name, or an address as a number."""
    try:
        address, percent, scope = value.partition("%")
        ipaddress.ip_address(address)
        return not percent or _SCOPE.fullmatch(scope) is not None
    except ValueError:
        return len(value) <= 253 and all(_LABEL.fullmatch(label) for label in value.split("."))


def is_path(value: str) -> bool:
    fits = len(value.encode(errors="replace")) < _LONGEST
    return fits and value.startswith("/") and value.isprintable() and "," not in value and ".." not in value.split("/")


def is_relative(value: str) -> bool:
    """Below the share, and nothing that is runvol's own there."""
    parts = value.split("/")
    return value.isprintable() and all(
        part and not part.startswith((".", "archived-")) and len(part.encode()) <= 200 for part in parts
    )


def are_options(value: str) -> bool:
    words = value.split(",")
    return value.isprintable() and all(words) and nfs.check_options(words) is None


def why_not_options(value: str) -> str:
    """Which of the options cannot be, for a text that `are_options` refuses."""
    words = value.split(",")
    wrong = nfs.check_options(words)
    if not value.isprintable() or not all(words) or wrong is None:
        return "takes options with commas between them, such as nconnect=4,noatime"
    key = wrong.partition("=")[0]
    if key in nfs.OWN_OPTIONS:
        return f"the option {key} is set by runvol itself, from `server` and `vers`; leave it out"
    return f"the option {wrong} names no version that runvol mounts: {', '.join(nfs.VERSIONS)}"


def split(server: str) -> tuple[str, str] | None:
    """Server and path of `name:/path`; None for a server alone."""
    if ":/" not in server or server.startswith("["):
        return None
    name, _, path = server.partition(":")
    return name, path.rstrip("/") or "/"


def of_export(parameters: Mapping[str, str]) -> dict[str, str]:
    """Those of a class or context, as somebody wrote them, that say which export is meant and how it is reached.
    Whatever no server, path, version or options can be is left out."""
    found = {_ALIASES.get(key, key): value for key, value in parameters.items()}
    named = split(found.get("server", ""))
    if named is not None:
        found["server"], found["path"] = named
    return {one.key: found[one.key] for one in PARAMETERS
            if one.key in _OF_EXPORT and one.key in found and one.accepts(found[one.key])}  # fmt: skip


PARAMETERS: tuple[Parameter, ...] = (
    Parameter(
        key="server",
        values="a name or an address",
        default="(none)",
        meaning="Backend `nfs`: the server; `name:/path` says the path as well. Required.",
        accepts=is_server,
        in_context=True,
    ),
    Parameter(
        key="path",
        values="an absolute path",
        default="(none)",
        meaning="Backend `nfs`: the exported directory (csi-driver-nfs calls it `share`). Required.",
        accepts=is_path,
        in_context=True,
        aliases=("share",),
    ),
    Parameter(
        key=RECORDS_PATH,
        values="an absolute path",
        default="(`path`)",
        meaning="Backend `nfs`: another export of the same server, on which what runvol knows of the volumes lies, and "
        "their snapshots. For a `path` that pods have whole: who can write there could change it.",
        accepts=is_path,
        in_context=True,
    ),
    Parameter(
        key="subDir",
        values="a relative path",
        default="(the PersistentVolume's name)",
        meaning="Backend `nfs`: the volume's directory below `path`, of a static volume too. `${pvc.metadata.name}`, "
        "`${pvc.metadata.namespace}` and `${pv.metadata.name}` stand for what external-provisioner's "
        "`--extra-create-metadata` tells.",
        accepts=is_relative,
    ),
    Parameter(
        key="volumeAs",
        values="subpath, sharepath",
        default="subpath",
        meaning="Backend `nfs`: whether a volume is a directory of its own below `path`, or `path` itself. A static "
        "volume's `path`, with its `subDir`, is what is mounted either way.",
        accepts=one_of("subpath", "sharepath"),
    ),
    Parameter(
        key="vers",
        values=", ".join(nfs.VERSIONS),
        default=nfs.DEFAULT_VERSION,
        meaning="Backend `nfs`: the protocol's version.",
        accepts=one_of(*nfs.VERSIONS),
        in_context=True,
    ),
    Parameter(
        key="options",
        values="a comma list",
        default="(none)",
        meaning="Backend `nfs`: mount options besides those of the StorageClass's `mountOptions`.",
        accepts=are_options,
        refuses=why_not_options,
        in_context=True,
    ),
    Parameter(
        key="mode",
        values="one to four octal digits",
        default="0777",
        meaning="Backend `nfs`: permissions of a new volume's directory (csi-driver-nfs calls it `mountPermissions`). "
        "Of a static volume: set for its directory when it is staged; left as they are without it.",
        accepts=lambda value: re.fullmatch(r"[0-7]{1,4}", value) is not None,
        aliases=("mountPermissions",),
    ),
    Parameter(
        key="modeType",
        values="non-recursive, recursive",
        default="non-recursive",
        meaning="Backend `nfs`: whether `mode` is set for what a static volume's directory holds, too (files: "
        "without the bits for execution).",
        accepts=one_of("non-recursive", "recursive"),
    ),
    Parameter(
        key="makePath",
        values="true, false",
        default="false (true for FlexVolume under the name `nas`)",
        meaning="Backend `nfs`: whether the directory of a static volume is made when it is staged, where the server "
        "has none. Directories of other volumes always are.",
        accepts=one_of("true", "false"),
    ),
    Parameter(
        key="archiveOnDelete",
        values="true, false",
        default="true",
        meaning="Backend `nfs`: a deleted volume's directory is renamed to `archived-…` instead of being removed. A "
        "directory that was there before the volume is left as it is.",
        accepts=one_of("true", "false"),
        of_controller=True,
    ),
    Parameter(
        key="inSandbox",
        values="guest, share",
        default="guest",
        meaning="Backend `nfs`: who mounts for a sandboxed pod: its guest, or the host, whose mount is shared.",
        accepts=one_of("guest", "share"),
        in_context=True,
    ),
    Parameter(
        key="probe",
        values="host, none",
        default="host",
        meaning="Backend `nfs`: whether the node asks the server before a guest mounts it. `none` where only the pods' "
        "network reaches the server.",
        accepts=one_of("host", "none"),
        in_context=True,
    ),
)
_OF_EXPORT = frozenset({"server", "path", "vers", "options"})
_ALIASES = {alias: one.key for one in PARAMETERS for alias in one.aliases}
# What describes a static volume, in a context or in the options of a FlexVolume.
DESCRIBED_BY = ("server", "path", "vers", "options", "mode", "modeType", "makePath", "inSandbox", "probe")
