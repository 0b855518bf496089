"""Which handlers a configuration file gives containerd: what each version of it says, and what runvol makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from blockdev import Deadline
from guestmount import Detector, DetectSettings, PodRef, RuntimeUnknown, containerd_readings
from guestmount.containerd_files import CRI, RUNTIME, Version, in_force, load
from guestmount.containerd_readings import of
from tests.deploy.containerds import VERSIONS, dump, dumped
from tests.guestmount.test_running_containerd import Pods, detected

KATA, RUNC = "io.containerd.kata.v2", "io.containerd.runc.v2"


def runtime(name: str, *lines: str, plugin: str = CRI) -> str:
    return "\n".join((f'[plugins."{plugin}".containerd.runtimes.{name}]', *lines, ""))


def of_type(name: str, kind: str, plugin: str = CRI) -> str:
    return runtime(name, f'runtime_type = "{kind}"', plugin=plugin)


HEAD = "version = 2\n"
# File name to content; `DIR` is where they lie.
NODES = {
    "breadth first": {
        "config": 'version = 2\nimports = ["DIR/a.toml", "DIR/b.toml"]\n' + of_type("secure", RUNC),
        "a": 'version = 2\nimports = ["DIR/deep.toml"]\n' + of_type("secure", RUNC),
        "b": HEAD + of_type("secure", RUNC),
        "deep": HEAD + of_type("secure", KATA),
    },
    "a patch of one field": {
        "config": 'version = 2\nimports = ["DIR/a.toml"]\n' + of_type("secure", KATA) + of_type("other", KATA),
        "a": HEAD + runtime("secure", "privileged_without_host_devices = true"),
    },
    "a patch of nothing of it": {
        "config": 'version = 2\nimports = ["DIR/a.toml"]\n' + of_type("secure", KATA),
        "a": HEAD + f'[plugins."{CRI}"]\nsandbox_image = "registry.local/pause:3.9"\n',
    },
    "a default": {
        "config": f'version = 2\nimports = ["DIR/a.toml"]\n[plugins."{CRI}".containerd]\ndefault_runtime_name = "runc"\n',
        "a": f'version = 2\n[plugins."{CRI}".containerd]\ndefault_runtime_name = "secure"\n' + of_type("secure", KATA),
    },
    "the first form": {"config": of_type("secure", KATA, "cri") + of_type("other", KATA, CRI)},
    "the first form without its name": {"config": of_type("secure", KATA, CRI)},
    "another form's name": {"config": HEAD + of_type("secure", KATA, "cri") + of_type("other", RUNC)},
    "both names": {"config": HEAD + of_type("secure", KATA) + of_type("other", RUNC, RUNTIME)},
    "patterns": {
        "config": 'version = 2\nimports = ["DIR/conf-*"]\n' + of_type("secure", RUNC),
        "conf-1": HEAD + of_type("secure", KATA),
        "conf-2": HEAD + of_type("secure", RUNC),
    },
    "itself": {"config": 'version = 2\nimports = ["DIR/config.toml"]\n' + of_type("secure", KATA)},
}


def put(tmp_path: Path, node: str) -> Path:
    for name, content in NODES[node].items():
        (tmp_path / f"{name}.toml").write_text(content.replace("DIR", str(tmp_path)))
    return tmp_path / "config.toml"


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("node", NODES)
def test_a_file_is_read_as_containerd_reads_it(version: str, node: str, tmp_path: Path) -> None:
    file = put(tmp_path, node)
    if node == "another form's name" and version.startswith("v1"):
        assert dump(version, file).returncode != 0
        return
    known = Version.parse(version)
    ours = of(in_force(load(str(file), known), known), known, "it")
    theirs = dumped(version, file)["plugins"][RUNTIME if known.merges else CRI]["containerd"]
    said = {name: one["runtime_type"] for name, one in theirs["runtimes"].items() if name != "runc"}
    assert {name: one.runtime_type for name, one in ours.handlers.items() if name != "runc"} == said
    assert ours.default_handler == theirs["default_runtime_name"]
    assert any(one == ours for one in (of(in_force(load(str(file), each), each), each, "it") for each in
                                       (Version(major=1, minor=7), Version(major=2, minor=4))))  # fmt: skip


# By 1.x and by 2.x, where they agree; None where they do not.
ANSWERS = {
    "breadth first": "sandbox", "a patch of one field": None, "a patch of nothing of it": "sandbox",
    "a default": "sandbox", "the first form": "sandbox", "the first form without its name": "sandbox",
    "patterns": "host", "itself": "sandbox",
}  # fmt: skip


@pytest.mark.parametrize("node", ANSWERS)
def test_what_the_versions_differ_in_is_not_known_while_containerd_does_not_tell(node: str, tmp_path: Path) -> None:
    file = put(tmp_path, node)
    settings = DetectSettings(containerd_config=str(file), cri_endpoint="", root=str(tmp_path))
    one = Detector(settings, Pods("secure"))
    if ANSWERS[node] is not None:
        assert detected(one)[0] == ANSWERS[node]
        assert one.of_handler("secure").kind == ANSWERS[node]
        return
    words = r"its versions 1 and 2 read .*config\.toml with its imports differently; set cri\.endpoint"
    with pytest.raises(RuntimeUnknown, match=words):
        detected(one)
    with pytest.raises(RuntimeUnknown, match=words):
        one.of_handler("secure")
    with pytest.raises(RuntimeUnknown):  # not even without its pod: one of them has a sandbox
        Detector(settings).detect(PodRef(uid="uid-1"), "", Deadline.after(5))


def test_a_file_that_no_containerd_starts_with_says_nothing(tmp_path: Path) -> None:
    """Its imports may be what has the sandboxes: on a filesystem that is not mounted here, or not yet."""
    file = tmp_path / "config.toml"
    file.write_text(f'version = 2\nimports = ["{tmp_path}/kata.toml"]\n' + of_type("other", RUNC))
    found = containerd_readings.read(str(file))
    assert not found.found and f"imports {tmp_path}/kata.toml, which does not exist" in found.why
    with pytest.raises(RuntimeUnknown, match=r"kata\.toml, which does not exist"):
        detected(Detector(DetectSettings(containerd_config=str(file), cri_endpoint=""), Pods()))
    assert containerd_readings.read(str(tmp_path / "none.toml")).why == "does not exist"
