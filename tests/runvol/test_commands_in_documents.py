"""Every command that stands in a page can be typed as it stands: runvol's own are parsed, and run where this machine can;
of others what they name exists. A command that is in no list here fails."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import yaml

from runvol.cli import main
from tests.csi.helpers import PODS
from tests.documents import PAGES, ROOT, Typed, blocks, commands, inline, said_by_the_code
from tests.driver import Driver
import itertools

ALL = list({(one.words, one.whole): one for one in commands()}.values())
OWN = [one for one in ALL if one.program == "runvol"]
OTHERS = [one for one in ALL if one.program != "runvol"]
MANIFESTS = "".join(file.read_text() for file in sorted((ROOT / "deploy/manifests").glob("*.yaml")))


def told(one: Typed) -> str:
    return f"{one.page}: {one.text}"


def parsed(words: tuple[str, ...], *, whole: bool) -> list[str]:
    """The command's name in words. ClickException where it cannot be typed so; a name alone is allowed in a sentence."""
    words = tuple("volumes" if word == "COMMAND" else word.strip("[]") for word in words)
    if "…" in words:
        words, whole = words[: words.index("…")], False
    command: click.Command = main
    named: list[str] = []
    rest = list(words)
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        with click.Context(command) as context:
            found = command.get_command(context, rest[0])
        if found is None:
            raise click.UsageError(f"no command {' '.join([*named, rest[0]])!r}")
        command = found
        named.append(rest.pop(0))
    if rest or whole:
        # What stands for a number, and for a file that is there.
        rest = ["7" if word == "ID" and "volumes" not in named else word for word in rest]
        rest = [str(ROOT / "LICENSE") if word == "FILE" else word for word in rest]
        takes = {
            name for one in command.params if isinstance(one, click.Option) and not one.is_flag for name in one.opts
        }
        if not whole and rest[-1] in takes:
            rest.append("7")  # the option is spoken of, without its value
        try:
            command.make_context(" ".join(["runvol", *named]), list(rest))
        except click.exceptions.Exit:
            assert set(rest) & {"--help", "--version"}, rest
    return named


@pytest.mark.parametrize("one", OWN, ids=told)
def test_a_command_of_runvol_can_be_typed(one: Typed) -> None:
    parsed(one.words[1:], whole=one.whole)


def test_commands_that_the_code_tells_to_type_can_be_typed() -> None:
    """In errors, findings and helps, and in what is deployed: alerts, units, values."""
    deployed = [
        file.read_text() for file in (ROOT / "deploy").rglob("*.*") if file.suffix in (".yaml", ".service", ".txt")
    ]
    found = {text for said in (*said_by_the_code(), *deployed) for text in re.findall(r"`(runvol [^`[]+)`", said)}
    assert len(found) > 20
    for text in sorted(found):
        try:
            parsed(tuple(text.rstrip("…").split()[1:]), whole=False)
        except click.ClickException as error:
            pytest.fail(f"{text}: {error.format_message()}")


def test_words_that_are_a_command_without_its_program_can_be_typed() -> None:
    """`pool status` for `runvol pool status`, as tables have it."""
    with click.Context(main) as context:
        groups = [
            name for name in main.list_commands(context) if isinstance(main.get_command(context, name), click.Group)
        ]
    for page in PAGES:
        for text in inline(page):
            first, *rest = text.split()
            if first in (*groups, "gc") and rest and not {"…", "rm", "="} & set(rest):
                parsed((first, *rest), whole=False)


def test_commands_stand_in_fenced_blocks() -> None:
    """Those that are only indented would be looked at by nobody."""
    for page in PAGES:
        text = re.sub(r"^[ \t]*```.*?^[ \t]*```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        assert not re.findall(r"^ {4,}(?:runvol|kubectl|helm|systemctl) .*", text, re.MULTILINE), page.name


def test_an_image_that_is_named_is_this_version() -> None:
    from runvol import version

    for page in PAGES:
        assert set(re.findall(r"/runvol:(\d[\w.]*)", page.read_text())) <= {version()}, page.name


# -- run as typed

# What a page's words stand for on the node of these tests, and what has to be said besides there.
_PLUGINS = ("--plugin-dir", "{tmp}/plugins", "--log", "{tmp}/flexvolume.log")
_VERSION = ("--containerd-version", "2.0")
# Statuses that a node without a pool, shared images and an API ends with: docs/cli.md.
RUN: dict[str, tuple[tuple[str, ...], set[int]]] = {
    "--version": ((), {0}),
    "COMMAND --help": ((), {0}),
    "volumes": ((), {0}),
    "volumes create": (("more", "--size", "64Mi"), {0}),
    "volumes create data --size 10Gi": ((), {0}),
    "volumes create data --size 1Gi": ((), {0}),
    "volumes create files --size 1Gi -p backend=directory -p quota=none": ((), {0}),
    "volumes snapshots": ((), {0}),
    "volumes work": ((), {0}),
    "volumes forget ID": (("--yes",), {0, 1}),
    "volumes adopt": (("{tmp}/state-disk.img", "--name", "adopted"), {0}),
    "volumes adopt FILE --name NAME": ((), {0}),
    "handoffs": ((), {0}),
    "where POD": ((), {0}),
    "where NAMESPACE/POD": ((), {0}),
    "detect NAMESPACE/NAME": ((), {0, 3}),
    "doctor": ((), {0, 1, 3}),
    "doctor --json": ((), {0, 1, 3}),
    "support-bundle [FILE]": ((), {0, 3}),
    "gc --dry-run": ((), {0}),
    "gc": ((), {0}),
    "config": ((), {0}),
    "parameters": ((), {0}),
    "bench publish": (("--endpoint", "unix://{socket}", "--samples", "2"), {0, 3}),
    "flexvolume install": (_PLUGINS, {0}),
    "flexvolume install --as alicloud/disk": (_PLUGINS, {0}),
    "flexvolume install --as alicloud/nas": (_PLUGINS, {0}),
    "flexvolume uninstall": (_PLUGINS[:2], {0}),
    "migrate flexvolume -": (("--anywhere",), {0}),
    "migrate flexvolume - --write out": (("--anywhere",), {0}),
    "snapshotter containerd-config": (_VERSION, {0}),
    "snapshotter containerd-config --write": (_VERSION, {0}),
    "snapshotter containerd-config --all-runtimes --write": (_VERSION, {0}),
    "snapshots": ((), {3}),
    "pool status": ((), {3}),
    "pool extend": ((), {1, 3}),
    "pool extend --metadata": ((), {1, 3}),
    "pool gauge": ((), {3}),
    "pool quarantine": ((), {3}),
    "images": ((), {2}),
    "images keygen FILE": ((), {0}),
}
# What takes device-mapper, a service that stays, or another machine: the test that runs it, or the verb behind it, and
# words that stand there.
ELSEWHERE: dict[str, tuple[str, str]] = {
    "csi": ("tests/driver.py", '"csi"'),
    "nri": ("tests/kernel/inside/test_nri.py", '"nri"'),
    "snapshotter": ("tests/kernel/inside/server.py", '"snapshotter"'),
    "migrate flexvolume": ("tests/flexvolume/test_migrate.py", '"migrate", "flexvolume"'),
    "support-bundle": ("tests/runvol/test_bundle.py", "support-bundle"),
    "volumes delete": ("tests/runvol/test_cli.py", '"volumes", "delete"'),
    "pool init": ("tests/kernel/inside/server.py", '"pool", "init"'),
    "pool init --vg": ("tests/kernel/inside/test_unit.py", '"--vg"'),
    "pool init --loop": ("tests/kernel/inside/server.py", '"--loop"'),
    "pool init --device": ("tests/kernel/inside/test_making.py", "device"),
    "pool adopt": ("tests/kernel/inside/test_adopting.py", "adopting.adopt("),
    "pool check": ("tests/kernel/inside/test_service.py", '"pool", "check"'),
    "pool gauge --remove": ("tests/kernel/inside/test_gauge.py", '"--remove"'),
    "pool quarantine --free-all": ("tests/kernel/inside/test_service.py", '"--free-all"'),
    "pool quarantine --adopt": ("tests/kernel/inside/test_adopting.py", "quarantine.adopt("),
    "pool repair-store": ("tests/kernel/inside/test_lost_store.py", '"pool", "repair-store"'),
    "images make": ("tests/kernel/inside/test_shared_images.py", '"images", "make"'),
    "images sign": ("tests/kernel/inside/test_shared_images.py", '"images", "sign"'),
    "images check": ("tests/kernel/inside/test_shared_images.py", '"images", "check"'),
    "images remove": ("tests/kernel/inside/test_shared_images.py", '"images", "remove"'),
    "images forget": ("tests/kernel/inside/test_shared_images.py", '"forget"'),
    "images --json": ("tests/kernel/inside/test_shared_images.py", '"--json"'),
}


@pytest.mark.parametrize("one", OWN, ids=told)
def test_a_command_of_runvol_is_run_by_a_test(one: Typed) -> None:
    words = " ".join(word for word in one.words[1:] if word != "…")
    if words in RUN:
        return
    known = [key for key in ELSEWHERE if f"{words} ".startswith(f"{key} ")]
    assert known, f"{told(one)}: no test runs it"
    file, there = ELSEWHERE[max(known, key=len)]
    assert there in (ROOT / file).read_text(), f"{file} runs it no longer"


def test_what_is_run_stands_in_a_page() -> None:
    typed = {" ".join(word for word in one.words[1:] if word != "…") for one in OWN}
    assert set(RUN) - typed == set()


CONTAINERD = """
version = 3
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.kata]
runtime_type = "io.containerd.kata.v2"
"""


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Driver, Path]]:
    """A driver with a volume that a runc pod has, and a directory to type in."""
    here = tmp_path_factory.mktemp("here")
    with Driver() as driver:
        (driver.directory / "containerd.toml").write_text(CONTAINERD)
        volume = driver.create("pvc-1")
        driver.stage(volume)
        driver.publish(volume, PODS[0], runtime="runc", name="web-0")
        yield driver, here
        driver.unpublish(volume, PODS[0])
        driver.unstage(volume)


def typed(driver: Driver, here: Path, words: list[str], stdin: str = "") -> subprocess.CompletedProcess[str]:
    """As somebody types it in the directory `here`."""
    environment = {**os.environ, **driver.environment, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-m", "runvol", *words], env=environment, cwd=here, input=stdin, check=False,
                          capture_output=True, text=True, timeout=300)  # fmt: skip


PV = """
apiVersion: v1
kind: List
items:
- apiVersion: v1
  kind: PersistentVolume
  metadata: {name: old}
  spec:
    capacity: {storage: 1Gi}
    accessModes: [ReadWriteOnce]
    flexVolume: {driver: runvol/runvol, fsType: ext4, options: {volume: loop-0f3c2a5e7f0e4b0c9d3e2b1b7a1c9e55}}
"""


@pytest.mark.kernel
@pytest.mark.parametrize("text", RUN)
def test_it_runs_as_typed(node: tuple[Driver, Path], text: str) -> None:
    driver, here = node
    more, statuses = RUN[text]
    image = driver.directory / "old.img"
    if "adopt" in text:
        image.write_bytes(b"old" + bytes((8 << 20) - 3))
    meant = {"POD": "web-0", "NAMESPACE/POD": "default/web-0", "NAMESPACE/NAME": "default/web-0", "COMMAND": "volumes",
             "FILE": "here.file", "[FILE]": "here.tar.gz", "ID": "loop-0f3c2a5e7f0e4b0c9d3e2b1b7a1c9e55",
             "{tmp}/state-disk.img": str(image)}  # fmt: skip
    if "adopt" in text:
        meant["FILE"] = str(image)
    words = [meant.get(word, word) for word in (*text.split(), *more)]
    words = [word.format(tmp=here, socket=driver.socket) if "{" in word else word for word in words]
    done = typed(driver, here, words, stdin=PV)
    said = f"{words}: {done.returncode}\n{done.stdout[-1500:]}{done.stderr[-1500:]}"
    assert done.returncode in statuses and "Traceback" not in done.stderr, said
    assert done.stdout.strip() or done.stderr.strip(), "it says nothing"
    made = re.search(r"\b(loop|dir)-[0-9a-f-]{32,}\b", done.stdout) if words[:2] != ["volumes", "forget"] else None
    if words[0] == "volumes" and words[1:2] in (["create"], ["adopt"]):
        assert made, said
        assert typed(driver, here, ["volumes", "delete", made[0], "--yes"]).returncode == 0


# -- other programs: what they are given exists

_VERBS = {
    "apply",
    "get",
    "delete",
    "describe",
    "exec",
    "logs",
    "rollout",
    "patch",
    "create",
    "label",
    "run",
    "drain",
    "uncordon",
}
_KINDS = {
    "pod", "pods", "pv", "pvc", "csidriver", "csinode", "csistoragecapacities", "deployment", "namespace", "crd", "node", "nodes",
    "volumesnapshotcontents", "status",
}  # fmt: skip


def _kubectl(words: list[str]) -> None:
    words = words[: words.index("--")] if "--" in words else words
    verb = next(word for word in words if word in _VERBS)
    for option, value in itertools.pairwise(words):
        if option == "-f":
            assert (ROOT / value).is_file(), value
        elif option == "-n":
            assert value in ("runvol-system", "NAMESPACE"), value
        elif option == "-c":
            assert f"name: {value}\n" in MANIFESTS, value
        elif option == "-l":
            key, _, is_ = value.partition("=")
            assert key.endswith("managed-by") or f"{key}: {is_}" in MANIFESTS, value
    after = [word for word in words[words.index(verb) + 1 :] if not word.startswith("-")]
    if (
        verb in ("get", "describe", "delete", "patch", "create", "label")
        and after
        and "--raw" not in words
        and "-f" not in words
    ):
        for word in after[:1] if "/" not in after[0] else after:
            kind, _, name = word.partition("/")
            assert kind in _KINDS, word
    if verb == "rollout":
        kind, _, name = after[1].partition("/")
        assert f"kind: {kind}\n".lower() in MANIFESTS.lower() and f"name: {name}\n" in MANIFESTS
    if "crd" in words and verb == "get":
        assert f"name: {after[1]}" in (ROOT / "deploy/crds/volumesnapshots.yaml").read_text()


def _helm(words: list[str]) -> None:
    assert words[1] in ("install", "upgrade", "rollback", "uninstall", "test", "lint")
    values = yaml.safe_load((ROOT / "deploy/helm/runvol/values.yaml").read_text())
    for option, value in itertools.pairwise(words):
        if option == "--set":
            found = values
            for key in value.partition("=")[0].split("."):
                assert key in found, value
                found = found[key]
    assert all((ROOT / word / "Chart.yaml").is_file() for word in words if word.startswith("deploy/"))


def _make(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for word in words[1:]:
        name, given, value = word.partition("=")
        if given:
            assert "$(ARGS)" in makefile and name == "ARGS"
            assert all((ROOT / path).exists() for path in value.split() if path.startswith("tests/")), word
        else:
            assert re.search(rf"^{re.escape(name)}:", makefile, re.MULTILINE), word


def _python(words: list[str]) -> None:
    if words[1:3] == ["-m", "venv"]:
        return
    if words[1] == "-m":
        assert words[2] == "pytest" or importlib.util.find_spec(words[2]), words[2]
    for word in words[1:]:
        if word.startswith(("tests/", "deploy/")):
            assert (ROOT / word).exists(), word
    if words[1].endswith(".py"):
        assert all(f'"{word}"' in (ROOT / words[1]).read_text() for word in words[2:] if word.startswith("--")), words


def _systemctl(words: list[str]) -> None:
    for word in words[2:]:
        if not word.startswith("-"):
            known = (ROOT / f"deploy/systemd/{word}.service").is_file()
            assert known or word in ("containerd", "chronyd", "UNIT", "kubelet"), word


def _cp(words: list[str]) -> None:
    for word in words:
        if word.startswith("deploy/"):
            assert (ROOT / word).is_file(), word


CHECKED = {
    "kubectl": _kubectl, "helm": _helm, "make": _make, "python": _python, "python3": _python, "systemctl": _systemctl, "cp": _cp,
}  # fmt: skip
# Those of which only the form is known here, each as it stands: what it is for is other programs' own.
FORM = {
    "pip install .", "ln -s /opt/runvol/bin/runvol /usr/local/bin/runvol", "install -d /etc/runvol", "cat",
    "apt-get install python3-venv e2fsprogs xfsprogs util-linux tar",
    "apt-get install thin-provisioning-tools e2fsprogs xfsprogs lvm2", "modprobe -a dm_mod dm_thin_pool", "modprobe dm_thin_pool",
    "modprobe loop", "modprobe nfs", "rm FILE", "rm -r", "chattr -i", "chattr +A", "blkdiscard -z DEVICE", "findmnt -T PATH", "truncate -s 0 FILE",
    "truncate -s BYTES FILE", "losetup -l", "journalctl -u runvol-csi", "sh -c nc -w 3 SERVER 2049 < /dev/null && echo reached",
    "skopeo copy oci-archive:runvol-image.tar docker://REGISTRY/runvol:0.1.0",
    "ctr -n k8s.io images import runvol-image.tar", "ctr -n NAMESPACE images check --snapshotter runvol",
    "ctr -n NAMESPACE tasks rm -f CONTAINER", "ctr -n NAMESPACE containers rm CONTAINER",
    "ctr -n NAMESPACE images rm --sync IMAGE", "grep snapshot-controller", "grep csi.runvol.io", 'jq select(.volume == "ID")',
    "systemd-analyze verify", "systemd-analyze security --offline=true", "lvcreate --type thin-pool", "dmsetup remove",
    "crictl rmp -fa", "crictl rmi --all",
}  # fmt: skip


@pytest.mark.parametrize("one", OTHERS, ids=told)
def test_what_another_program_is_given_exists(one: Typed) -> None:
    if one.program in CHECKED:
        CHECKED[one.program]([one.program, *one.words[1:]])
    elif one.words != ("…",):
        assert " ".join([one.program, *one.words[1:]]) in FORM, told(one)


# Where a real cluster or containerd is told to do it; `tests/cluster/test_typed.py` has the programs read all of the words.
DONE = {
    "helm install": ("tests/cluster/installed.py", '"upgrade", "--install"'),
    "helm upgrade": ("tests/cluster/installed.py", '"upgrade", "--install"'),
    "helm install --take-ownership": ("tests/cluster/test_taken_over.py", '"--take-ownership"'),
    "helm uninstall": ("tests/cluster/installed.py", '"uninstall"'),
    "helm test": ("tests/cluster/test_install.py", '"test"'),
    "helm lint": ("tests/cluster/test_typed.py", '"lint", "--strict"'),
    "kubectl drain": ("tests/cluster/test_two_nodes.py", '"drain"'),
    "kubectl uncordon": ("tests/cluster/test_two_nodes.py", '"uncordon"'),
    "kubectl patch": ("tests/cluster/test_two_nodes.py", '"--type=merge"'),
    "kubectl delete csistoragecapacities": ("tests/cluster/test_two_nodes.py", '"csistoragecapacities"'),
    "kubectl apply deploy/kubernetes/csidrivers.yaml": ("tests/cluster/test_cluster.py", "csidrivers.yaml"),
    "kubectl apply deploy/examples/block.yaml": ("tests/cluster/examples.py", "deploy/examples"),
    "ctr images check": ("tests/kernel/inside/test_lost_store.py", '"images", "check"'),
    "ctr tasks rm": ("tests/kernel/inside/test_lost_store.py", '"tasks", "rm"'),
    "ctr containers rm": ("tests/kernel/inside/test_lost_store.py", '"containers", "rm"'),
    "ctr images rm": ("tests/kernel/inside/test_shared_layers.py", '"images", "rm", "--sync"'),
}


@pytest.mark.parametrize("text", DONE)
def test_what_is_done_by_another_test_stands_there_and_in_a_page(text: str) -> None:
    file, there = DONE[text]
    assert there in (ROOT / file).read_text(), file
    assert any(set(text.split()) <= {one.program, *one.words} for one in OTHERS)


def test_examples_of_other_files_are_files_of_that_kind(tmp_path: Path) -> None:
    """TOML, YAML and JSON parse; what is a file of runvol's settings is loaded, what is a class has parameters that are."""
    import json
    import tomllib

    from flexvolume.options import parse
    from runvol import config
    from volumes import parameters

    sections = {key.partition(".")[0] for key in config.TABLE}
    known = {one.key for one in parameters.TABLE}
    loaded = 0
    for page in PAGES:
        assert not re.findall(r"<<-?\s*[A-Za-z]", page.read_text()), (
            f"{page}: quote the word, or backquotes are executed"
        )
        settings = re.findall(
            r"> /etc/runvol/runvol.toml <<'END'\n(.*?)^END$", page.read_text(), re.DOTALL | re.MULTILINE
        )
        for text in (*blocks(page, "toml"), *(one.replace("NODE", "node-1") for one in settings)):
            if set(tomllib.loads(text)) <= sections:
                file = tmp_path / "runvol.toml"
                file.write_text(text)
                config.load(file=str(file), environment={})
                loaded += 1
        for text in blocks(page, "yaml"):
            found = yaml.safe_load(text)
            assert set(found.get("parameters", {})) <= known, page
            for volume in found.get("volumes", []):
                parse(json.dumps({**volume["flexVolume"]["options"], "kubernetes.io/fsType": "ext4"}), driver="runvol")
        for text in blocks(page, "json"):
            json.loads(text)
    assert loaded >= 3
