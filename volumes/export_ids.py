"""The names of volumes and snapshots on NFS: `<prefix><export's key>-<name's digest>`, a dot, and the export itself.

So any controller finds it there. The export is compressed, in base32, where a CSI id has room for it (most fit). What
stands on the share is called by the first part alone (`short`).
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import hashlib
import zlib

from blockdev import nfs

_LONGEST = 128
# Bytes that no export's name exceeds.
_MOST = 4096
_PLAIN, _DEFLATED = b"\0", b"\1"
# What exports are called; never changed, since ids that were given are read with it.
_WORDS = (
    b".svc.cluster.local:/.amazonaws.com:/efs.fs-.cn-hangzhou.nas.aliyuncs.com:/.file.core.windows.net:/.internal:/"
    b".example.com:/kubernetes/volumes/data/shares/shared/storage/exports/export/srv/nfs/mnt/pool/vol/home/var/lib/"
    b"192.168.172.16.10.0.0.1"
)


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def key(export: nfs.Export) -> str:
    """What stands for the export in an id."""
    return digest(f"{export.server}\0{export.path}")[:12]


def id_of(export: nfs.Export, name: str, prefix: str) -> str:
    """The same for the same name on the same share, so that a creation may be repeated by another controller."""
    own = f"{prefix}{key(export)}-{digest(name)[:20]}"
    whole = f"{own}.{_packed(f'{export.server}:{export.path}')}"
    return whole if len(whole) <= _LONGEST else own


def name_of(name: str, path: str = "") -> str:
    """What an id's second part is made from. `path`: the export of the volume's directory, where its records, and so
    its id, are of another one."""
    return f"{name}\0{path}" if path else name


def short(one_id: str) -> str:
    """What the volume or snapshot is called on its share."""
    return one_id.partition(".")[0]


def export_of(one_id: str) -> nfs.Export | None:
    """The export that the id says, in the usual version; None for one that says none, or not its own."""
    packed = one_id.partition(".")[2]
    text = _unpacked(packed) if packed else None
    if text is None or ":/" not in text:
        return None
    server, _, path = text.partition(":/")
    found = nfs.Export(server=server, path=f"/{path}", version=nfs.DEFAULT_VERSION)
    return found if is_of(one_id, found) else None


def is_of(one_id: str, export: nfs.Export) -> bool:
    """Whether the volume or snapshot of this id lies there."""
    return f"-{key(export)}-" in short(one_id)


def above(one_id: str, export: nfs.Export) -> nfs.Export | None:
    """Of a directory that a volume has on an export: the export. None where it is of another."""
    path = export.path
    while len(path) <= _MOST:
        found = dataclasses.replace(export, path=path)
        if is_of(one_id, found):
            return found
        if path == "/":
            break
        path = path.rpartition("/")[0] or "/"
    return None


def _packed(text: str) -> str:
    raw = text.encode()
    squeezer = zlib.compressobj(9, wbits=-15, zdict=_WORDS)
    content = min(_PLAIN + raw, _DEFLATED + squeezer.compress(raw) + squeezer.flush(), key=len)
    return base64.b32encode(content).decode().rstrip("=").lower()


def _unpacked(packed: str) -> str | None:
    try:
        content = base64.b32decode(packed.upper() + "=" * (-len(packed) % 8))
        raw = content[1:]
        if content[:1] == _DEFLATED:
            raw = zlib.decompressobj(wbits=-15, zdict=_WORDS).decompress(raw, _MOST)
        return raw.decode()
    except (binascii.Error, zlib.error, UnicodeDecodeError):
        return None
