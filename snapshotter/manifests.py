"""What a shared image is, as it is written beside it; read strictly, since anybody may have written it."""

from __future__ import annotations

import json
import re

import msgspec

from blockdev import filesystems
from snapshotter import bases, verity

CHAIN = re.compile(r"sha256:[0-9a-f]{64}\Z")
_ROOT = re.compile(r"[0-9a-f]{64}\Z")
_SALT = re.compile(r"([0-9a-f]{2})*\Z")


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`manifest.json`, as every release writes and reads it. `size` is in bytes; `root` and `salt` are dm-verity's, in
    hexadecimal."""

    chain: str
    fstype: str
    size: int
    root: str
    salt: str
    made: str


class _Signed(Manifest, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The content of `manifest.signed`."""

    version: int


def encode(manifest: Manifest) -> bytes:
    return msgspec.json.encode(manifest)


def encode_signed(manifest: Manifest) -> bytes:
    """The content that is signed: one line."""
    return msgspec.json.encode(_Signed(version=1, **msgspec.structs.asdict(manifest)))


def decode(chain: str, raw: bytes, *, signed: bool = False) -> Manifest:
    """The manifest of this chain. ValueError, with what is wrong, for anything else."""
    try:
        json.loads(raw, object_pairs_hook=_each_once)
        found = msgspec.json.decode(raw, type=_Signed if signed else Manifest)
    except msgspec.MsgspecError as error:
        raise ValueError(str(error)) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is no JSON: {error}") from None
    if isinstance(found, _Signed):
        if found.version != 1:
            raise ValueError(f"its format {found.version} is not known here")
        found = Manifest(**{name: getattr(found, name) for name in Manifest.__struct_fields__})
    _check(chain, found)
    return found


def _each_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


def _check(chain: str, it: Manifest) -> None:
    if it.chain != chain or not CHAIN.match(it.chain):
        raise ValueError("it describes another chain")
    if not _ROOT.match(it.root):
        raise ValueError("its root is not 64 hexadecimal digits")
    if not _SALT.match(it.salt) or len(it.salt) > 2 * verity.LONGEST_SALT:
        raise ValueError(f"its salt is not at most {verity.LONGEST_SALT} bytes in hexadecimal digits")
    if it.fstype not in filesystems.SUPPORTED:
        raise ValueError(f"its filesystem is none of {', '.join(filesystems.SUPPORTED)}")
    if not filesystems.SMALLEST[it.fstype] <= it.size <= bases.LARGEST or it.size % verity.BLOCK:
        raise ValueError("its size is not one that an image can have")
    if len(it.made) > 64 or not it.made.isprintable():
        raise ValueError("when it was made is no time")
