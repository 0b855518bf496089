"""What doctor says of shared images: whose are used, which are not, and what to do."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from runvol import config, doctor_snapshots
from runvol.doctor_table import TABLE
from snapshotter import signatures
from snapshotter.node import STORE
from snapshotter.shares import Share
from snapshotter.store import Store
from snapshotter.trust import pin_of

CHAINS = ["sha256:" + hashlib.sha256(str(number).encode()).hexdigest() for number in range(8)]

FIX = TABLE["images.trust-damaged"].fix


@pytest.fixture
def share(tmp_path: Path) -> Share:
    (tmp_path / "share").mkdir()
    with open(tmp_path / "layer", "wb") as opened:
        opened.truncate(8 << 20)
    return Share(str(tmp_path / "share"))


def said(tmp_path: Path, **settings: object) -> list[tuple[str, str, str]]:
    flags = {f"snapshotter.{name}": value for name, value in settings.items()}
    flags |= {"snapshotter.images": str(tmp_path / "share"), "snapshotter.state_dir": str(tmp_path / "state")}
    loaded = config.load(file=None, flags=flags, environment={})
    return [
        (one.state, one.subject, f"{one.finding}; {one.fix}" if one.fix else one.finding)
        for one in doctor_snapshots._images(loaded)
    ]


def test_it_names_what_is_passed_over_and_what_to_do(share: Share, tmp_path: Path) -> None:
    key, public = signatures.make_key(str(tmp_path / "key"))
    for chain in CHAINS:
        share.make(chain, str(tmp_path / "layer"), "ext4")
    named, there, *passed, rest = said(tmp_path)
    assert named[0] == "warning"
    assert "snapshotter.image_keys" in named[2]
    assert "runvol images keygen" in named[2]
    assert there == ("ok", "shared images", f"8 in {share.directory}")
    assert [one[1] for one in passed] == [f"image {chain}" for chain in sorted(CHAINS)[:5]]
    assert f"`runvol images sign {sorted(CHAINS)[0]} --key FILE`" in passed[0][2]
    assert "3 more (unsigned)" in rest[2]
    for chain in CHAINS:
        share.sign(chain, key)
    keys, there = said(tmp_path, image_keys=public)
    assert keys == ("ok", "shared images", f"signed by {key.public.name} are used")
    assert there[0] == "ok"
    # Another key: the signer is named.
    other, public = signatures.make_key(str(tmp_path / "other"))
    found = said(tmp_path, image_keys=public)
    assert found[0][2] == f"signed by {other.public.name} are used"
    assert f"its signatures name {key.public.name}" in found[2][2]


def test_it_names_what_is_used_only_since_it_was_before(share: Share, tmp_path: Path) -> None:
    made = share.make(CHAINS[0], str(tmp_path / "layer"), "ext4")
    share.make(CHAINS[1], str(tmp_path / "layer"), "ext4")
    store = Store(str(tmp_path / "state" / STORE))
    with store.transaction():
        for chain in CHAINS[:2]:
            store.set_fact(f"image {chain}", pin_of(made))
    store.close()
    found = {subject: finding for _, subject, finding in said(tmp_path)}
    assert "is used only since this node has used it before: it is not signed" in found[f"image {CHAINS[0]}"]
    assert f"`runvol images forget {CHAINS[1]}`" in found[f"image {CHAINS[1]}"]


def test_it_says_what_is_wrong_with_the_settings(share: Share, tmp_path: Path) -> None:
    missing, listed = tmp_path / "missing.pub", tmp_path / "roots"
    listed.write_text("nonsense\n")
    found = said(tmp_path, image_keys=str(missing), image_roots=str(listed))
    assert found[0] == (
        "broken",
        "shared images",
        f"snapshotter.image_keys: {missing} cannot be read: No such file or directory; {FIX}",
    )
    assert found[1] == (
        "broken",
        "shared images",
        f"snapshotter.image_roots: {listed}, line 1: takes a chain id and a root hash; {FIX}",
    )
    assert "whoever can write to the share" in said(tmp_path, images_unsigned=1)[0][2]
    os.rename(share.directory, tmp_path / "elsewhere")
    assert said(tmp_path)[-1][0] == "broken"


@pytest.mark.parametrize(
    ("key", "value"), [("image_keys", "relative.pub"), ("image_roots", "relative"), ("images_unsigned", "2")]
)
def test_settings_that_cannot_be_used_are_told(key: str, value: str) -> None:
    with pytest.raises(config.ConfigError, match=f"snapshotter.{key} = .*{value}"):
        config.load(file=None, flags={f"snapshotter.{key}": value}, environment={})
