"""`runvol support-bundle`: everything in one file, bounded, and none of this node's secrets in any byte of it."""

from __future__ import annotations

import base64
import json
import os
import stat
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from runvol import bundle
from runvol.bundle import Part
from runvol.masking import MASK, Masked
from tests.driver import Driver, mount_capability
from tests.installation import ROOT, Installation

# Each is planted somewhere, and looked for in every byte.
SECRETS = {
    name: f"planted-{name}-{number:04d}-Zq8"
    for number, name in enumerate((
        "class", "registry-password", "registry-auth", "identity-token", "header", "inline", "proxy", "kubeconfig-token",
        "kubeconfig-key", "kubeconfig-password", "environment", "nfs-option", "url-setting", "log-bearer", "log-basic",
        "log-json", "log-nested", "flag", "kata", "claim", "yaml-words", "metrics", "pem", "drop-in", "argument",
    ))
}  # fmt: skip
PEM = "-----BEGIN PRIVATE KEY-----\n{}\n-----END PRIVATE KEY-----\n"
CONTAINERD = """
version = 3
imports = ["conf.d/*.toml"]
[proxy_plugins.other]
address = "https://user:{inline}@registry.example.com/x"
[plugins."io.containerd.cri.v1.images".registry.configs."r.example.com".auth]
username = "somebody"
password = "{registry-password}"
auth = '{registry-auth}'
identitytoken = "{identity-token}"
[plugins."io.containerd.cri.v1.images".registry.headers]
X-Meta-Something = [
  "{header}",
]
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.kata]
runtime_type = "io.containerd.kata.v2"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.kata.options]
ConfigPath = "/etc/kata-containers/kata.toml"
"""
KATA = """
[hypervisor.qemu]
shared_fs = "virtio-fs"
guest_pull_proxy = "http://me:{proxy}@10.0.0.1:3128"
[agent.kata]
kernel_params = "agent.aa_kbc_params=x agent.image_registry_auth=token:{kata}"
"""
KUBECONFIG = """
apiVersion: v1
kind: Config
clusters: [{{name: c, cluster: {{server: "http://127.0.0.1:1"}}}}]
contexts: [{{name: c, context: {{cluster: c, user: u}}}}]
current-context: c
users:
- name: u
  user:
    token: {kubeconfig-token}
    password: "{kubeconfig-password}"
    client-key-data: {key}
"""
LOG = (
    'level=info msg="asked" headers="Authorization: Bearer {log-bearer}"\n'
    "time=1 curl -H 'authorization: Basic {log-basic}' https://me:{log-basic}@h/\n"
    '{{"message": "call", "secrets": {{"user": "{log-json}"}}, "password": "{log-json}"}}\n'
    '{{"log": "{{\\"token\\": \\"{log-nested}\\", \\"pwd\\": \\"a\\\\\\"b{log-nested}\\"}}"}}\n'
    "mount.nfs h:/x /y -o rw,sec=sys,password={nfs-option},vers=4\n"
    "started --api-token {flag} --v=2\n"
    "{pem}\nlater line\n"
)


def planted(text: str, **more: str) -> str:
    return text.format(**SECRETS, **more)


def every_form(secret: str) -> list[bytes]:
    """As it is, and as somebody would have written it down who encodes."""
    coded = [base64.b64encode(secret.encode()[shift:]).decode().rstrip("=")[2:-4] for shift in range(3)]
    return [one.encode() for one in (secret, quote(secret, safe=""), secret.encode().hex(), *coded)]


def packed(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as archive:
        found = {}
        for one in archive.getmembers():
            content = archive.extractfile(one)
            assert content is not None and one.mode == 0o600
            found[one.name.partition("/")[2]] = content.read()
        return found


def test_no_planted_secret_is_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Installation() as it, Driver() as driver:
        key = base64.b64encode(PEM.format(SECRETS["kubeconfig-key"]).encode()).decode()
        (it.directory / "kubeconfig").write_text(planted(KUBECONFIG, key=key))
        it.write("etc/containerd/config.toml", planted(CONTAINERD))
        it.write("etc/containerd/conf.d/10.toml", planted('[x]\napi_key = """\n{drop-in}\n"""\n'))
        it.write("etc/kata-containers/kata.toml", planted(KATA))
        it.set(
            node__roots=[str(driver.kubelet)], paths__state_dir=str(driver.state), paths__run_dir=str(driver.run),
            paths__direct_volumes=str(driver.direct_volumes), csi__endpoint=f"unix://{driver.socket}",
            detect__kubeconfig=str(it.directory / "kubeconfig"), paths__host_root=str(it.root),
            paths__kata_root="/", paths__containerd_config="/etc/containerd/config.toml", csi__metrics="127.0.0.1:1",
            detect__api_server=planted("http://admin:{url-setting}@127.0.0.1:1"),
            nfs__exports=[planted("h:/x;password={nfs-option}")],
        )  # fmt: skip
        volume = driver.create("pvc-1", **{"csi.storage.k8s.io__node-stage-secret-name": "s"})
        driver.client.NodeStageVolume(
            volume_id=volume.volume_id, staging_target_path=driver.staging(volume.volume_id),
            volume_capability=mount_capability(), secrets={"user": SECRETS["class"], "password": SECRETS["class"]},
        )  # fmt: skip
        driver.publish(volume, "6dad7281-57ff-49e4-b844-c588ceabec1a", runtime="kata")
        claim = driver.records / "claims" / f"{volume.volume_id}.json"
        claim.write_text(json.dumps({**json.loads(claim.read_text()), "note": {"secret": SECRETS["claim"]}}))
        log = it.directory / "flexvolume.log"
        pem = PEM.format(SECRETS["pem"])
        log.write_text(planted(LOG.replace("{pem}", pem)) + planted("password: two words {yaml-words}\n")
                       + driver.log.read_text())  # fmt: skip
        environment = {
            "RUNVOL_FLEXVOLUME_LOG": str(log), "SOME_API_TOKEN": SECRETS["environment"],
            "HTTPS_PROXY": planted("http://me:{proxy}@10.0.0.1:3128"),
        }  # fmt: skip
        file = tmp_path / "bundle.tar.gz"
        # Its value stands nowhere under a name that tells: known by the environment alone.
        log.write_text(log.read_text() + f"the value is {SECRETS['environment']} now\n")
        done = subprocess.run(
            [sys.executable, "-m", "runvol", "--config", it.file, "support-bundle", file], cwd=ROOT, check=False,
            env={**os.environ, **environment}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 3, done.stderr
        assert "left out: metrics/csi.txt: URLError" in done.stderr
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    found = packed(file)
    everything = b"\n".join(f"{name}\n".encode() + content for name, content in found.items())
    for name, secret in SECRETS.items():
        for form in every_form(secret):
            assert form not in everything, (name, [part for part, content in found.items() if form in content])
            assert form not in (done.stdout + done.stderr).encode()
    # What is there is not empty because of that.
    for name, words in (
        ("containerd/0-config.toml", ("io.containerd.kata.v2", MASK, 'username = "***"')),
        ("containerd/1-10.toml", ("[x]",)), ("kata/kata.toml", ('shared_fs = "virtio-fs"',)),
        ("runvol/doctor.json", ("kubernetes.unreachable",)), ("runvol/doctor.txt", ("fix: ",)),
        ("runvol/config.json", ("detect.kubeconfig", f"http://{MASK}@127.0.0.1:1")),
        ("records/claims.txt", (volume.volume_id, "staging_path")), ("records/handoffs.txt", ("mountInfo.json",)),
        ("runvol/volumes.json", (volume.volume_id,)), ("node/mountinfo.txt", (" / ",)),
        ("logs/0-flexvolume.log", ("later line", "mount.nfs h:/x /y -o rw,sec=sys,password=***,vers=4", "--v=2")),
    ):  # fmt: skip
        assert all(word.encode() in found[name] for word in words), (name, found[name][-3000:].decode())
    said = {one["name"]: one for one in json.loads(found["MANIFEST.json"])}
    assert said["metrics/csi.txt"]["left_out"] and said["runvol/doctor.json"]["bytes"] == len(
        found["runvol/doctor.json"]
    )


def test_a_part_that_hangs_or_fails_is_named_and_left_out_and_none_is_too_large(tmp_path: Path) -> None:
    def fails() -> str:
        raise OSError(5, "Input/output error", "/x?token=planted-failure")

    def hangs() -> str:
        threading.Event().wait(30)
        return ""

    with Installation() as it:
        begun = time.monotonic()
        made = bundle.collect(it.loaded, longest=4, more=(
            Part(name="hangs", make=hangs), Part(name="fails", make=fails),
            Part(name="large", make=lambda: "x" * (5 << 20)), Part(name="end", make=lambda: "x" * (5 << 20) + "END", end=True),
            # Nothing makes the search for secrets slow.
            Part(name="one-word", make=lambda: "a" * (2 << 20)), Part(name="quotes", make=lambda: 'token="' * (1 << 17)),
            Part(name="backslashes", make=lambda: "pass=" + "\\" * (1 << 20)), Part(name="dashes", make=lambda: "--" * (1 << 20)),
        ))  # fmt: skip
        assert time.monotonic() - begun < 40
        said = {one.name: one for one in made.said}
        assert said["hangs"].left_out == "it gave no answer within 4 seconds" and "hangs" not in made.content
        assert said["fails"].left_out == "OSError: [Errno 5] Input/output error: '/x?token=***'"
        assert said["large"].shortened and len(made.content["large"]) == 2 << 20
        assert made.content["end"].endswith(b"END") and len(made.content["end"]) == 2 << 20
        for name in ("one-word", "quotes", "backslashes", "dashes"):
            assert not said[name].left_out, said[name]
        short = bundle.collect(it.loaded, in_all=0)
        assert all(one.left_out == "the whole took too long" for one in short.said)
        path = tmp_path / "b.tar.gz"
        assert bundle.pack(made, str(path), "b") == path.stat().st_size < 1 << 20
        with pytest.raises(FileExistsError):
            bundle.pack(made, str(path), "b")
        link = tmp_path / "link"
        link.symlink_to(tmp_path / "elsewhere")
        with pytest.raises(FileExistsError):
            bundle.pack(made, str(link), "b")
        assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("a=1 b=2", "a=1 b=2"),
        ('{"token": null, "auth": true}', '{"token": null, "auth": true}'),
        ('{"apiToken": "x y", "n": 1}', '{"apiToken": "***", "n": 1}'),
        ("passwords = ['a', 'b']\nnext = 1", 'passwords = "***"\nnext = 1'),
        ("https://h/x?access_token=abc&y=1", "https://h/x?access_token=***&y=1"),
        ("  clientSecret: a b c", "  clientSecret: ***"),
        ("Proxy-Authorization: Digest abc", "Proxy-Authorization: ***"),
        ("eyJhbGciOiJI.eyJzdWIi.c2ln", "***"),
    ],
)
def test_what_is_masked(text: str, masked: str) -> None:
    assert Masked().text(text) == masked


def test_what_is_known_is_found_in_its_other_forms() -> None:
    masked: Any = Masked(["a secret+value", "short"])
    text = " ".join(
        ("a secret+value", quote("a secret+value", safe=""), base64.b64encode(b"a secret+value").decode(), "short")
    )
    assert masked.text(text) == "*** *** *** short"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("password: |\n  planted\n  more planted\nnext: 1", "next: 1"),
        ("auth:\n    user: planted\nnext: 1", "next: 1"),
        ("- secrets:\n  - planted\n- next: 1", "next: 1"),
        ('{"secrets": {"a": {"b": "planted"}, "c": "planted"}, "n": 1}', '"n": 1}'),
        ("token: [[planted], [planted]], next", ", next"),
        ('{"name":"DB_PASSWORD","value":"planted"}, next', "next"),
        ("- name: API_TOKEN\n  value: planted\n- next", "- next"),
        ('{\\"name\\": \\"DB_PASSWORD\\", \\"value\\": \\"planted\\"} next', "next"),
        ("https://user:pl@planted@host/x", "@host/x"),
        ("AccountKey=planted/==;next=1", "next=1"),
        ('--password "two planted" --v=2', "--v=2"),
        ('"token": "has no planted end\nnext', "next"),
        ("x" * 90 + "password=planted next", "next"),
        ("data: eyJhdXRocyI6eyJplantedhdXRoIjoieCJ9fQ== next", "next"),
        ("pushed with ghp_planted0123456789abc next", "next"),
        ("half of it\nMIIplanted\n-----END PRIVATE KEY-----\nnext", "next"),
    ],
)
def test_a_secret_is_masked_whole_however_it_is_written(text: str, left: str) -> None:
    masked = Masked().text(text)
    assert "planted" not in masked and MASK in masked and left in masked


@pytest.mark.parametrize(
    "bite",
    ["\n", " \n", "token=[", "token={", "eyJaaaaaa-", "-----BEGIN KEYKEY", "passpass", "token\n", "name=pass", "- ",
     'token=\\"\\\\\\"', "authorization: ", "a://", "--pass ", "token:\n "],
    ids=repr,
)  # fmt: skip
def test_no_text_that_somebody_wrote_makes_the_search_long(bite: str) -> None:
    """Python holds all threads up while it looks for a pattern: no deadline would end it."""
    masked, seconds = Masked(), []
    for size in (1 << 15, 1 << 17):
        begun = time.process_time()
        masked.text(bite * (size // len(bite)))
        seconds.append(time.process_time() - begun)
    assert seconds[1] < 16 * seconds[0] + 0.5 and seconds[1] < 5


def test_of_what_is_cut_no_half_of_a_secret_is_left() -> None:
    log = "password: plant" + "x" * (2 << 20) + "ed\nlast line\n"
    made, cut = bundle._made(Part(name="log", make=lambda: log, end=True), Masked())
    assert cut and made == b"last line\n"


def test_what_pods_have_and_where_links_lead_is_not_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logs, secret = tmp_path / "logs", tmp_path / "shadow"
    logs.mkdir()
    secret.write_text("root:planted-hash")
    (logs / "0.log").symlink_to(secret)
    (logs / "gone.log").symlink_to(tmp_path / "nowhere")
    os.mkfifo(logs / "fifo.log")
    (logs / "good.log").write_text("good line\n")
    monkeypatch.setattr(bundle, "_LOGS", (f"{logs}/*.log",))
    monkeypatch.setattr(bundle, "_LOG_PLACES", (str(logs),))
    state = tmp_path / "state"
    (state / "directories" / "v1" / "name-of-a-tenant's").mkdir(parents=True)
    (state / "volumes").mkdir()
    (state / "volumes" / "v\x1b.img").touch()
    (state / "link").symlink_to("/etc")
    with Installation() as it:
        it.set(paths__state_dir=str(state), paths__run_dir=str(tmp_path / "run"))
        made = bundle.collect(it.loaded)
    everything = b"".join(made.content.values())
    assert b"planted-hash" not in everything and b"tenant's" not in everything
    listed = made.content["records/state.txt"].decode()
    assert "'v\\x1b.img'" in listed and "'v1'" in listed and "passwd" not in listed
    said = {one.name: one for one in made.said if one.name.startswith("logs/") and ".log" in one.name}
    assert {name.partition("-")[2]: (one.left_out, one.absent) for name, one in said.items()} == {
        "good.log": ("", False),
        "0.log": (f"OSError: [Errno 40] leads elsewhere: '{logs}/0.log'", False),
        "fifo.log": (f"OSError: [Errno 22] is no regular file: '{logs}/fifo.log'", False),
        "gone.log": ("", True),
    }


@pytest.mark.parametrize(("said", "taken"), [("", "runvol-system"), ("storage", "storage")])
def test_of_pods_logs_only_those_of_runvols_own_namespace_are_in_it(said: str, taken: str, tmp_path: Path) -> None:
    """Whoever may make a pod may call it runvol-node-abcde."""
    logs = tmp_path / "pods"
    for namespace in ("tenant", "runvol-system", "storage", "a_storage"):
        place = logs / f"{namespace}_runvol-node-abcde_0f7c" / "runvol"
        place.mkdir(parents=True)
        (place / "0.log").write_text(f"told in {namespace}.\n")
    with Installation() as it:
        it.set(paths__pod_logs=str(logs))
        made = bundle.collect(it.loaded, namespace=said)
    told = b"".join(made.content.values())
    assert [one for one in (b"tenant", b"runvol-system", b"storage", b"a_storage") if b"told in " + one + b"." in told
            ] == [taken.encode()]  # fmt: skip


@pytest.mark.parametrize("name", ["../../etc", "*", "[a]", "a\nb", "A", "-a", "a" * 64])
def test_what_is_no_namespace_is_refused(name: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "runvol", "support-bundle", f"--namespace={name}", tmp_path / "x"],
                          cwd=ROOT, capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 2 and "--namespace" in done.stderr and not (tmp_path / "x").exists()


def test_a_namespace_without_logs_is_told(tmp_path: Path) -> None:
    with Installation() as it:
        it.set(paths__pod_logs=str(tmp_path))
        made = bundle.collect(it.loaded, namespace="another")
    assert f"{tmp_path}/another_*runvol*" in made.content["pods/none.txt"].decode()
    assert [one.absent for one in made.said if one.name == "pods/none.txt"] == [True]


def test_a_kind_of_parts_that_cannot_be_listed_costs_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise ValueError("of nobody's making")

    monkeypatch.setattr(bundle.doctor_containerd, "asked", fails)
    monkeypatch.setattr(bundle, "load", fails)
    with Installation() as it:
        made = bundle.collect(it.loaded)
    (left,) = [one for one in made.left_out if one.name == "containerd/list.txt"]
    assert "ValueError: of nobody's making" in left.left_out
    assert "node/mounts.txt" in made.content


def test_a_program_that_says_too_much_or_never_ends_is_ended() -> None:
    begun = time.monotonic()
    assert len(bundle._said_by("yes")) == pytest.approx(2 << 20, abs=1 << 16)
    assert bundle._said_by("sh", "-c", "yes | head -c 9000000; echo END", end=True).endswith("END\n")
    with pytest.raises(subprocess.TimeoutExpired):
        bundle._said_by("sleep", "60", seconds=0.3)
    with pytest.raises(FileNotFoundError):
        bundle._said_by("no-such-program-here")
    assert "(status 3)" in bundle._said_by("sh", "-c", "exit 3")
    assert time.monotonic() - begun < 20


def test_a_bundle_that_is_killed_or_finds_no_room_is_not_there(tmp_path: Path) -> None:
    code = (
        "import os, signal; from blockdev import durable; from runvol import bundle\n"
        "whole = durable.write_all\n"
        "def half(fd, content):\n    whole(fd, content[:10]); os.kill(os.getpid(), signal.SIGKILL)\n"
        "durable.write_all = half\n"
        f"made = bundle.Bundle(); made.content['x'] = b'y'\nbundle.pack(made, {str(tmp_path / 'b.tar.gz')!r}, 'b')\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith("b.tar.gz.") and left.name.endswith(".new")
    left.unlink()
    made = bundle.Bundle()
    made.content["x"] = os.urandom(1 << 20)
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", place], check=True)
    try:
        with pytest.raises(OSError, match="No space"):
            bundle.pack(made, str(place / "b.tar.gz"), "b")
        assert not [*place.iterdir()]
    finally:
        subprocess.run(["umount", place], check=True)
