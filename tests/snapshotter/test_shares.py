"""The share as an enemy would leave it: what is read of it is bounded, and only what a key has signed is believed."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from blockdev import Deadline, sparse
from snapshotter import manifests, shares, signatures, verity
from snapshotter.errors import BadRequest, NotFound, SnapshotterError, Unavailable
from snapshotter.manifests import Manifest
from snapshotter.shares import PATIENCE, Said, Share
from snapshotter.signatures import PrivateKey, PublicKey
from snapshotter.trust import DAMAGED, REPLACED, UNSIGNED, UNTRUSTED, Trust, pin_of

MIB = 1 << 20
CHAIN = "sha256:" + hashlib.sha256(b"layer").hexdigest()


@pytest.fixture
def key(tmp_path: Path) -> PrivateKey:
    return signatures.make_key(str(tmp_path / "key"))[0]


@pytest.fixture
def trust(tmp_path: Path, key: PrivateKey) -> Trust:
    return Trust([str(tmp_path / "key.pub")])


@pytest.fixture
def share(tmp_path: Path) -> Share:
    (tmp_path / "share").mkdir()
    return Share(str(tmp_path / "share"))


@pytest.fixture
def layer(tmp_path: Path) -> str:
    """Stands for a layer's device."""
    path = tmp_path / "layer"
    with open(path, "wb") as opened:
        opened.truncate(8 * MIB)
        opened.seek(5 * MIB)
        opened.write(os.urandom(100_000))
    return str(path)


def said(share: Share) -> Said:
    found = share.said(CHAIN, Deadline.after(10))
    assert found is not None
    return found


def lines(share: Share) -> list[bytes]:
    return Path(share.place(CHAIN), "manifest.signed").read_bytes().split(b"\n")


def write(share: Share, name: str, content: bytes) -> None:
    Path(share.place(CHAIN), name).write_bytes(content)


# -- signatures ---------------------------------------------------------------------------------------------------------


def test_a_signed_image_is_used_and_an_unsigned_one_is_not(
    share: Share, layer: str, key: PrivateKey, trust: Trust
) -> None:
    before = os.umask(0o077)
    made = share.make(CHAIN, layer, "ext4", key=key)
    os.umask(before)
    # Nodes may come as nobody.
    place = Path(share.place(CHAIN))
    assert {stat.S_IMODE(path.stat().st_mode) for path in (place, *place.iterdir())} == {0o755, 0o644}
    verdict = trust.judge(said(share))
    assert (verdict.manifest, verdict.by) == (made, f"signed by {key.public.name}")
    os.unlink(Path(share.place(CHAIN), "manifest.signed"))
    verdict = trust.judge(said(share))
    assert (verdict.manifest, verdict.reason) == (None, UNSIGNED)
    assert f"runvol images sign {CHAIN}" in verdict.advice
    assert Trust(unsigned=True).judge(said(share)).manifest == made


def test_no_byte_of_what_is_signed_can_be_another(share: Share, layer: str, key: PrivateKey, trust: Trust) -> None:
    share.make(CHAIN, layer, "ext4", key=key)
    whole = b"\n".join(lines(share))
    first, content, signature, _ = lines(share)
    for at in range(len(first) + len(content) + len(signature) + 2):
        changed = bytearray(whole)
        changed[at] ^= 1
        write(share, "manifest.signed", bytes(changed))
        assert trust.judge(said(share)).manifest is None, f"byte {at} does not matter"
    write(share, "manifest.signed", whole)
    assert trust.judge(said(share)).manifest is not None


def test_a_signature_is_of_its_chain_alone(share: Share, layer: str, key: PrivateKey, trust: Trust) -> None:
    """A signed image under another chain's name is not that chain's."""
    share.make(CHAIN, layer, "ext4", key=key)
    other = "sha256:" + "ab" * 32
    os.rename(share.place(CHAIN), share.place(other))
    found = share.said(other, Deadline.after(10))
    assert found is not None
    verdict = trust.judge(found)
    assert (verdict.manifest, verdict.reason) == (None, DAMAGED)
    assert "another chain" in verdict.why


def test_what_stands_beside_the_signature_is_not_believed(
    share: Share, layer: str, key: PrivateKey, trust: Trust
) -> None:
    """manifest.json, which older releases read, may say what it wants."""
    made = share.make(CHAIN, layer, "ext4", key=key)
    write(share, "manifest.json", manifests.encode(Manifest(**{**_fields(made), "root": "0" * 64})))
    assert trust.judge(said(share)).manifest == made
    assert "differ" in share.check(CHAIN)
    with pytest.raises(SnapshotterError, match="differ"):
        share.sign(CHAIN, key)


def _fields(manifest: Manifest) -> dict[str, object]:
    return {name: getattr(manifest, name) for name in Manifest.__struct_fields__}


def test_another_key_is_not_trusted_until_it_is_named(
    share: Share, layer: str, tmp_path: Path, key: PrivateKey
) -> None:
    folder = tmp_path / "keys"
    folder.mkdir()
    trust = Trust([str(folder)])
    share.make(CHAIN, layer, "ext4", key=key)
    verdict = trust.judge(said(share))
    assert (verdict.manifest, verdict.reason) == (None, UNTRUSTED)
    assert key.public.name in verdict.why
    (folder / "first.pub").write_bytes((tmp_path / "key.pub").read_bytes())
    assert trust.judge(said(share)).manifest is not None
    second, _ = signatures.make_key(str(folder / "second"))
    assert sorted(trust.names()) == sorted([key.public.name, second.public.name])
    (folder / "first.pub").unlink()
    assert trust.judge(said(share)).reason == UNTRUSTED
    # Keys change: the same image is signed once more, and either key will do.
    share.sign(CHAIN, second)
    assert trust.judge(said(share)).by == f"signed by {second.public.name}"
    assert Trust([str(tmp_path / "key.pub")]).judge(said(share)).by == f"signed by {key.public.name}"
    assert share.check(CHAIN) == ""


def test_many_false_signatures_are_not_looked_at(share: Share, layer: str, key: PrivateKey, trust: Trust) -> None:
    share.make(CHAIN, layer, "ext4", key=key)
    first, content, signature, _ = lines(share)
    false = [
        b"ed25519 \x1b[2J " + b"A" * 88,
        b"ed25519 " + key.public.name.encode() + b" " + b"A" * 86 + b"==",
        b"ed25519 x",
        b"\xff \xff \xff",
        b"",
    ]
    write(share, "manifest.signed", b"\n".join([first, content, *false, signature]))
    assert trust.judge(said(share)).manifest is not None
    write(share, "manifest.signed", b"\n".join([first, content, *false * 100, signature]))
    verdict = trust.judge(said(share))
    assert verdict.manifest is None
    assert verdict.why.isprintable()


def test_an_older_releases_image_is_signed_after_it_was_read(
    share: Share, layer: str, key: PrivateKey, trust: Trust
) -> None:
    made = share.make(CHAIN, layer, "ext4")
    assert sorted(os.listdir(share.place(CHAIN))) == ["hashes", "image", "manifest.json"]
    with pytest.raises(SnapshotterError, match=f"not signed by the key {key.public.name}"):
        share.make(CHAIN, layer, "ext4", key=key)
    share.sign(CHAIN, key)
    share.sign(CHAIN, key)
    assert trust.judge(said(share)).manifest == made
    assert share.make(CHAIN, layer, "ext4", key=key) == made
    assert len(lines(share)) == 4
    assert sorted(os.listdir(share.place(CHAIN))) == ["hashes", "image", "manifest.json", "manifest.signed"]


@pytest.mark.parametrize("part", ["image", "hashes"])
def test_what_is_not_what_it_was_is_not_signed(share: Share, layer: str, key: PrivateKey, part: str) -> None:
    share.make(CHAIN, layer, "ext4")
    with open(os.path.join(share.place(CHAIN), part), "r+b") as opened:
        opened.seek(4096)
        opened.write(b"x")
    assert f"{part} is not what it was" in share.check(CHAIN)
    with pytest.raises(SnapshotterError, match=f"{part} is not what it was"):
        share.sign(CHAIN, key)
    assert said(share).envelope is None


# -- the list -----------------------------------------------------------------------------------------------------------


def test_what_the_operator_lists_is_used_without_a_signature(share: Share, layer: str, tmp_path: Path) -> None:
    made, listed = share.make(CHAIN, layer, "ext4"), tmp_path / "roots"
    trust = Trust(roots=str(listed))
    assert trust.judge(said(share)).manifest is None
    assert "No such file" in trust.troubles()[0]
    listed.write_text(f"# ours\n\n{CHAIN} {'0' * 64}\n{CHAIN} {made.root} # the second make\n")
    verdict = trust.judge(said(share))
    assert (verdict.manifest, verdict.by, trust.troubles()) == (made, "listed", [])
    listed.write_text(f"{CHAIN} {'0' * 64}\n")
    assert trust.judge(said(share)).reason == UNSIGNED


@pytest.mark.parametrize("line", ["sha256:00 00", CHAIN, f"{CHAIN} {'0' * 63}", f"{CHAIN} {'A' * 64}", f"{CHAIN}  x y",
                                  f"{CHAIN} {'0' * 63}\u0660"])  # fmt: skip
def test_a_list_with_a_wrong_line_is_not_used(share: Share, layer: str, tmp_path: Path, line: str) -> None:
    made, listed = share.make(CHAIN, layer, "ext4"), tmp_path / "roots"
    listed.write_text(f"{CHAIN} {made.root}\n{line}\n")
    trust = Trust(roots=str(listed))
    assert trust.judge(said(share)).manifest is None
    assert "line 2" in trust.troubles()[0] or "no text" in trust.troubles()[0]


# -- what a node has used -------------------------------------------------------------------------------------------------


def test_what_was_used_goes_on_unsigned_and_another_one_does_not(share: Share, layer: str, key: PrivateKey) -> None:
    made = share.make(CHAIN, layer, "ext4")
    pin = pin_of(made)
    # As the first releases have written it.
    assert json.loads(pin) == [made.root, made.salt, made.size]
    assert Trust().judge(said(share), pin).manifest == made
    share.remove(CHAIN)
    share.make(CHAIN, layer, "ext4", key=key)
    verdict = Trust(unsigned=True).judge(said(share), pin)
    assert (verdict.manifest, verdict.reason) == (None, REPLACED)
    assert f"runvol images forget {CHAIN}" in verdict.advice


# -- an enemy's share ---------------------------------------------------------------------------------------------------


def _manifest(**changed: object) -> bytes:
    whole = {"chain": CHAIN, "fstype": "ext4", "size": 8 * MIB, "root": "0" * 64, "salt": "00", "made": "now"}
    return json.dumps({**whole, **changed}).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{}", b"[1]", b"\xff", b"null", b"[" * 60_000, b"{" + b'"a":{' * 9000,
        _manifest(chain=CHAIN.upper()), _manifest(chain=CHAIN.replace("a", "\u0430")), _manifest(chain=CHAIN + "\n"),
        _manifest(chain="sha256:" + "ab" * 32), _manifest(more=1), _manifest(size="8"), _manifest(size=8.5),
        _manifest(size=0), _manifest(size=-4096), _manifest(size=8 * MIB + 512), _manifest(size=1 << 62),
        _manifest(size=10**400), _manifest(size=4 * MIB), _manifest(fstype="btrfs"), _manifest(fstype="ext4 "),
        _manifest(root="0" * 63), _manifest(root="0" * 62 + "  "), _manifest(root="A" * 64), _manifest(root="\u0660" * 64),
        _manifest(salt="0"), _manifest(salt="00 01"), _manifest(salt="zz"), _manifest(salt="00" * 257),
        _manifest(made="x" * 65), _manifest(made="\x1b[2J"),
        _manifest()[:-1] + b',"root":"' + b"1" * 64 + b'"}', _manifest() + _manifest(), _manifest() + b" " * 70_000,
        _manifest().decode().encode("utf-16"), _manifest(**{"\x1b[2J" * 50: 1}),
    ],
    ids=range(37),
)  # fmt: skip
def test_a_manifest_that_is_none_is_passed_over(share: Share, content: bytes) -> None:
    os.mkdir(share.place(CHAIN))
    write(share, "manifest.json", content)
    verdict = Trust(unsigned=True).judge(said(share))
    assert (verdict.manifest, verdict.reason) == (None, DAMAGED)
    assert verdict.why
    assert len(verdict.why) < 500
    assert verdict.why.isprintable()
    with pytest.raises(SnapshotterError, match="make it again"):
        share.manifest(CHAIN, Deadline.after(10))


def test_the_smallest_and_the_longest_that_are_right_are_taken() -> None:
    for right in ({}, {"salt": ""}, {"salt": "ff" * 256}, {"size": 1 << 50}, {"fstype": "xfs", "size": 300 * MIB}):
        assert manifests.decode(CHAIN, _manifest(**right)).chain == CHAIN


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _device(path: Path) -> None:
    os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))


def _socket(path: Path) -> None:
    os.mknod(path, stat.S_IFSOCK | 0o600)


def _elsewhere(path: Path) -> None:
    elsewhere = path.parent.parent.parent / f"elsewhere-{path.name}"
    elsewhere.write_bytes(_manifest())
    path.symlink_to(elsewhere)


def _huge(path: Path) -> None:
    with open(path, "wb") as opened:
        opened.truncate(1 << 40)


@pytest.mark.parametrize("put", [_fifo, _device, _socket, _elsewhere, Path.mkdir, _huge])
@pytest.mark.parametrize("name", ["manifest.json", "manifest.signed", "image", "hashes"])
def test_what_is_no_file_in_the_place_of_one_is_told_at_once(
    share: Share, layer: str, key: PrivateKey, name: str, put: Callable[[Path], None]
) -> None:
    share.make(CHAIN, layer, "ext4", key=key)
    path = Path(share.place(CHAIN), name)
    path.unlink()
    put(path)
    started = time.monotonic()
    if (name, put) == ("hashes", _huge):
        # Longer than needed: dm-verity reads no more of it than the tree.
        assert "hashes is not what it was" in share.check(CHAIN)
    elif name in ("image", "hashes"):
        try:
            assert f"{name} has" in share.check(CHAIN)
        except SnapshotterError as error:
            assert f"{name} is no regular file" in str(error)
        with pytest.raises(SnapshotterError):
            share.sign(CHAIN, key)
    else:
        assert len(said(share).manifests) == 1
        assert name in share.check(CHAIN)
    assert time.monotonic() - started < PATIENCE


def test_the_directory_of_an_image_is_no_link_and_no_file(share: Share, layer: str, tmp_path: Path) -> None:
    share.make(CHAIN, layer, "ext4")
    os.rename(share.place(CHAIN), tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", share.place(CHAIN))
    assert "is no directory" in said(share).troubles[0]
    with pytest.raises(SnapshotterError, match="is no directory"):
        share.make(CHAIN, layer, "ext4")
    share.remove(CHAIN)
    assert sorted(os.listdir(tmp_path / "elsewhere")) == ["hashes", "image", "manifest.json"]
    Path(share.place(CHAIN)).write_bytes(b"")
    assert "is no directory" in said(share).troubles[0]
    share.remove(CHAIN)
    assert os.listdir(share.directory) == []


@pytest.mark.parametrize("chain", ["", "sha256:", "../../etc", "sha256:../../../etc/passwd", CHAIN + "\n", CHAIN[:-1],
                                   CHAIN.upper(), "sha512:" + CHAIN[7:], CHAIN.replace("a", "\u0430")])  # fmt: skip
def test_what_is_no_chain_id_reaches_no_path(share: Share, layer: str, key: PrivateKey, chain: str) -> None:
    assert share.said(chain, Deadline.after(1)) is None
    for call in (lambda: share.make(chain, layer, "ext4"), lambda: share.sign(chain, key), lambda: share.check(chain)):
        with pytest.raises(BadRequest, match="64 hexadecimal digits"):
            call()
    with pytest.raises(NotFound):
        share.remove(chain)
    assert os.listdir(share.directory) == []


def test_a_tree_that_is_too_short_is_told(share: Share, layer: str, key: PrivateKey) -> None:
    share.make(CHAIN, layer, "ext4", key=key)
    path = Path(share.place(CHAIN), "hashes")
    wanted = path.stat().st_size
    assert wanted == verity.tree_bytes(8 * MIB)
    os.truncate(path, wanted - 4096)
    assert f"hashes has {wanted - 4096} bytes instead of {wanted}" in share.check(CHAIN)
    with pytest.raises(SnapshotterError, match=f"hashes has {wanted - 4096} bytes"):
        share.make(CHAIN, layer, "ext4", key=key)


@pytest.mark.parametrize("blocks", [1, 2, 128, 129, 128 * 128, 128 * 128 + 1])
def test_how_long_a_tree_is(tmp_path: Path, blocks: int) -> None:
    path = tmp_path / "data"
    with open(path, "wb") as opened:
        opened.truncate(blocks * 4096)
    levels, root = verity.tree(str(path), b"salt")
    assert sum(map(len, levels)) == verity.tree_bytes(blocks * 4096)
    assert verity.build(str(path), str(tmp_path / "tree"), b"salt") == root
    assert (tmp_path / "tree").stat().st_size == verity.tree_bytes(blocks * 4096)


# -- making -------------------------------------------------------------------------------------------------------------


def test_what_is_signed_is_the_layer_and_not_what_the_share_gives_back(
    share: Share, layer: str, key: PrivateKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody who writes to the share changes the copy before it is hashed."""
    before = sparse.copy_written

    def copied(source: str, target: str, progress: Callable[[int], object] | None = None) -> int:
        done = before(source, target, progress)
        with open(target, "r+b") as opened:
            opened.seek(5 * MIB)
            opened.write(b"evil")
        return done

    monkeypatch.setattr(shares.sparse, "copy_written", copied)
    made = share.make(CHAIN, layer, "ext4", key=key)
    assert made.root == verity.tree(layer, bytes.fromhex(made.salt))[1]
    assert "image is not what it was" in share.check(CHAIN)


def test_of_two_at_once_one_is_the_image_and_both_are_told_the_same(share: Share, layer: str, key: PrivateKey) -> None:
    made: list[Manifest] = []
    barrier = threading.Barrier(2)

    def make() -> None:
        def wait(what: str, done: int) -> None:
            if what == "hashing" and done == 8 * MIB:
                barrier.wait(20)

        made.append(Share(share.directory).make(CHAIN, layer, "ext4", key=key, progress=wait))

    threads = [threading.Thread(target=make) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 2
    assert made[0] == made[1] == said(share).signed
    assert os.listdir(share.directory) == [CHAIN[7:]]


def test_who_was_faster_must_have_signed_it_too(share: Share, layer: str, key: PrivateKey) -> None:
    def unsigned(what: str, done: int) -> None:
        if what == "hashing" and done == 8 * MIB:
            Share(share.directory).make(CHAIN, layer, "ext4")

    with pytest.raises(SnapshotterError, match="is there already, and not signed"):
        share.make(CHAIN, layer, "ext4", key=key, progress=unsigned)
    assert os.listdir(share.directory) == [CHAIN[7:]]


def test_who_was_faster_must_have_made_all_of_it(share: Share, layer: str, key: PrivateKey) -> None:
    def spoilt(what: str, done: int) -> None:
        if what == "hashing" and done == 8 * MIB and not os.path.exists(share.place(CHAIN)):
            Share(share.directory).make(CHAIN, layer, "ext4", key=key)
            with open(os.path.join(share.place(CHAIN), "image"), "r+b") as opened:
                opened.write(b"x")

    with pytest.raises(SnapshotterError, match="meanwhile: .*image is not what it was"):
        share.make(CHAIN, layer, "ext4", key=key, progress=spoilt)


def test_a_rename_that_fails_is_told(share: Share, layer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, name in ((28, "No space left"), (13, "Permission denied"), (30, "Read-only"), (116, "Stale")):

        def fails(*_: object, number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(shares.os, "rename", fails)
        with pytest.raises(Unavailable, match=f"cannot be made in {share.directory}: {name}"):
            share.make(CHAIN, layer, "ext4")
        monkeypatch.undo()
    assert os.listdir(share.directory) == []
    Path(share.directory).rmdir()
    with pytest.raises(Unavailable, match="cannot be made in .*: No such file"):
        share.make(CHAIN, layer, "ext4")


def test_what_killed_calls_have_left_goes(share: Share, layer: str) -> None:
    old, new, going = (
        Path(share.directory, f".{'0' * 64}.{name}") for name in ("0000000a", "0000000b", "0000000c.removed")
    )
    for path in (old, new, going):
        path.mkdir()
        (path / "image").write_bytes(b"half")
    long_ago = time.time() - 2 * 86400
    for path in (old, old / "image"):
        os.utime(path, (long_ago, long_ago))
    strange = Path(share.directory, ".snapshot")
    strange.mkdir()
    share.make(CHAIN, layer, "ext4")
    assert sorted(os.listdir(share.directory)) == sorted([new.name, strange.name, CHAIN[7:]])


# -- keys' files --------------------------------------------------------------------------------------------------------


def test_a_private_key_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "key"
    key, public = signatures.make_key(str(path))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert signatures.public_key(public) == key.public == signatures.private_key(str(path)).public
    with pytest.raises(BadRequest, match="exists already"):
        signatures.make_key(str(path))
    # A call that was killed between the two files.
    os.unlink(public)
    assert signatures.make_key(str(path))[0].public == key.public
    path.chmod(0o640)
    with pytest.raises(BadRequest, match="chmod 600"):
        signatures.private_key(str(path))
    Path(public).chmod(0o646)
    with pytest.raises(ValueError, match="chmod go-w"):
        signatures.public_key(public)


@pytest.mark.parametrize("put", [_fifo, _device, Path.mkdir, _huge, Path.touch, lambda path: None])
def test_what_is_no_key_is_told(tmp_path: Path, put: Callable[[Path], None]) -> None:
    path = tmp_path / "key"
    put(path)
    if path.exists():
        path.chmod(0o600)
    with pytest.raises(BadRequest, match=f"--key = '{path}': (cannot be read|holds no Ed25519)"):
        signatures.private_key(str(path))
    with pytest.raises(ValueError, match="cannot be read|holds no Ed25519"):
        signatures.public_key(str(path))
    trust = Trust([str(path)])
    assert trust.names() == []
    assert len(trust.troubles()) == (0 if put is Path.mkdir else 1)


def test_a_key_of_another_kind_is_none(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed448 import Ed448PrivateKey

    other = Ed448PrivateKey.generate()
    form, kind = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    for content in (
        other.private_bytes(form, kind, serialization.NoEncryption()),
        other.private_bytes(form, kind, serialization.BestAvailableEncryption(b"secret")),
        other.public_key().public_bytes(form, serialization.PublicFormat.SubjectPublicKeyInfo),
        b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
    ):
        path = tmp_path / "other"
        path.write_bytes(content)
        path.chmod(0o600)
        with pytest.raises(BadRequest, match="holds no Ed25519 private key"):
            signatures.private_key(str(path))
        with pytest.raises(ValueError, match="holds no Ed25519 public key"):
            signatures.public_key(str(path))


def test_signatures_are_those_of_rfc_8032() -> None:
    """Its third test vector."""
    public = PublicKey(raw=bytes.fromhex("fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025"))
    signature = bytes.fromhex(
        "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac"
        "18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a"
    )
    assert public.verifies(signature, bytes.fromhex("af82"))
    assert not public.verifies(signature, bytes.fromhex("af83"))
    assert not public.verifies(signature[:-1], bytes.fromhex("af82"))


def test_what_a_sweep_cannot_look_at_keeps_nothing_else(share: Share) -> None:
    place = Path(share.directory)
    for number in range(8):
        (place / f".{CHAIN[7:]}.{number:08x}").symlink_to("nowhere")
        (place / f".{CHAIN[7:]}.{number + 8:08x}.removed").mkdir()
    assert len(share.sweep()) == 8
    assert len(list(place.iterdir())) == 8
