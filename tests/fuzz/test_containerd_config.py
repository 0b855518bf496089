"""containerd's file, with anything where a table or a word should be: merged, or refused in a sentence."""

from __future__ import annotations

import copy
import os
import random
import tomllib
from pathlib import Path
from typing import Any

import pytest

from guestmount.containerd_files import Version, in_force, load
from guestmount.errors import Refused
from runvol import doctor_proxy_plugin, toml_text
from runvol.containerd_commands import merged
from runvol.containerd_wish import Wish
from tests.deploy.test_containerd_config import NODE, NODE_3

ROUNDS = int(os.environ.get("RUNVOL_FUZZ", "20000")) // 200
VALUES: tuple[Any, ...] = (
    3,
    "",
    "runvol",
    True,
    [],
    [1],
    [{}],
    {},
    {"a": 1},
    {"snapshotter": "runvol"},
    1.5,
    'x\n"\\\x7f',
)
EXTRA = """
[plugins."io.containerd.transfer.v1.local"]
unpack_config = [{ platform = "linux", snapshotter = "a" }]
[proxy_plugins.runvol]
type = "snapshot"
exports = { root = "/r" }
"""


def places(document: Any) -> list[tuple[Any, Any]]:
    keys = document if isinstance(document, dict) else range(len(document)) if isinstance(document, list) else ()
    return [place for key in keys for place in ((document, key), *places(document[key]))]


@pytest.mark.parametrize("version", ["1.6", "1.7", "2.0", "2.4"])
def test_whatever_stands_there(version: str, tmp_path: Path) -> None:
    chosen = random.Random(version)
    known, file = Version.parse(version), tmp_path / "config.toml"
    wish = Wish(address="/a", root="/r", platform="linux/amd64", everything=version == "1.6")
    done = 0
    for _ in range(ROUNDS):
        document = tomllib.loads(f"{chosen.choice((NODE, NODE_3))}{EXTRA}")
        if version < "2":
            document["version"] = 2
        for _ in range(chosen.randrange(3)):
            table, key = chosen.choice(places(document))
            table[key] = copy.deepcopy(chosen.choice(VALUES))
        text = toml_text.written(document)
        assert tomllib.loads(text) == document
        file.write_text(text)
        try:
            files = load(str(file), known)
            made = merged(files, known, wish)
        except Refused as error:
            assert len(str(error)) < 2000
            continue
        finally:
            assert file.read_text() == text
        done += 1
        assert tomllib.loads(made.text) == toml_text.applied(document, made.changes)
        file.write_text(made.text)
        again = load(str(file), known)
        assert not merged(again, known, wish).changes
        list(doctor_proxy_plugin._platforms(in_force(again, known)))
        list(doctor_proxy_plugin._users(in_force(again, known)))
    assert done > ROUNDS // 10
