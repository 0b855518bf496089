"""What a command ends with: a status, and a sentence that names what was typed or set."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from csi import server
from runvol import config, schemas
from runvol.config import ConfigError
from runvol.options import SETTINGS
from snapshotter import backing
from tests.dead import dead as dead_directory

ROOT = Path(__file__).resolve().parents[2]
SIZE = ("--size", "64Mi")


def run(*words: str | Path, status: int | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "runvol", *map(str, words)], capture_output=True, text=True, check=False, cwd=ROOT,
        env={"PATH": os.environ["PATH"], **environment}, timeout=60,
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    assert status is None or done.returncode == status, (done.returncode, done.stderr)
    return done


@pytest.fixture(scope="module")
def unwritable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    place = tmp_path_factory.mktemp("read-only")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", place], check=True)
    yield place
    subprocess.run(["umount", place], check=True)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("wrong") / "file"
    made.touch()
    return made


LOOKS = [("volumes",), ("volumes", "snapshots"), ("handoffs",), ("where", "a/b"), ("pool", "status"), ("snapshots",)]


@pytest.mark.kernel
@pytest.mark.parametrize("words", LOOKS, ids=" ".join)
def test_what_cannot_be_looked_at_is_status_3_with_the_path(words: tuple[str, ...], file: Path) -> None:
    assert str(file) in run("--state-dir", file, *words, status=3).stderr


@pytest.mark.kernel
@pytest.mark.parametrize("place", ["file", "unwritable"])
@pytest.mark.parametrize(
    "words",
    [("volumes", "create", "x", *SIZE, "--state-dir", "{}/s"), ("--state-dir", "{}/s", "gc"),
     ("csi", "--run-dir", "{}/r"), ("nri", "--run-dir", "{}/r"),
     ("flexvolume", "install", "--plugin-dir", "{}/p"), ("flexvolume", "uninstall", "--plugin-dir", "{}"),
     ("images", "keygen", "{}/k"), ("migrate", "flexvolume", "--write", "{}/m", "--anywhere", "{pv}"),
     ("snapshotter", "--state-dir", "{}/s")],
    ids=" ".join,
)  # fmt: skip
def test_what_cannot_be_written_is_a_sentence(
    words: tuple[str, ...], place: str, file: Path, unwritable: Path, tmp_path: Path
) -> None:
    at = str(file if place == "file" else unwritable)
    volume = tmp_path / "pv.yaml"
    volume.write_text("kind: PersistentVolume\nmetadata: {name: a}\nspec: {flexVolume: {driver: runvol/runvol, "
                      "options: {volume: loop-1}}, capacity: {storage: 1Gi}}\n")  # fmt: skip
    apart = {"RUNVOL_PATHS_RUN_DIR": str(tmp_path / "run"), "RUNVOL_CSI_ENDPOINT": f"unix://{tmp_path}/x.sock"}
    done = run(*(word.replace("{pv}", str(volume)).replace("{}", at) for word in words), **apart)
    assert done.returncode != 0 or "nothing is left over" in done.stdout, done
    assert "Errno" not in done.stderr + done.stdout
    last = done.stderr.strip().splitlines()[-1] if done.returncode != 3 else ""
    assert at in (last or done.stdout + done.stderr)


def test_a_reader_that_goes_is_no_trouble() -> None:
    with subprocess.Popen([sys.executable, "-m", "runvol", "config"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          cwd=ROOT) as process:  # fmt: skip
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("volumes", "create", "x", "--size", "0"), "0: a volume has a size"),
        (("volumes", "create", "x", "--size", "10GiB"), "'10GiB' is no size: bytes, or a quantity like 10Gi"),
        (("volumes", "create", "x", *SIZE, "-p", "quota"), "'quota': takes KEY=VALUE"),
        (("volumes", "create", "x", *SIZE, "-p", "colour=red"), "parameter 'colour' = 'red': is not known"),
        (("volumes", "create", "x", *SIZE, "-p", "backend=nfs", "-p", "options=minorversion=1"),
         "the option minorversion is set by runvol itself"),
        (("volumes", "create", "x", *SIZE, "-p", "backend=nfs", "-p", "options=vers=5"),
         "the option vers=5 names no version"),
        (("pool", "extend", "--by", "0"), "a pool only grows"),
        (("pool", "quarantine", "--key", "x"), "go with --adopt only"),
        (("detect", "a"), "takes NAMESPACE/NAME"),
        (("--json", "csi"), "tells nothing that could be JSON"),
        (("migrate", "flexvolume"), "name a FILE or --kubeconfig"),
        (("nonsense",), "No such command"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_wrong_usage_is_status_2(words: tuple[str, ...], said: str, tmp_path: Path) -> None:
    assert said in run("--state-dir", tmp_path, *words, status=2).stderr


@pytest.mark.parametrize("before", [True, False])
def test_the_options_of_runvol_itself_work_anywhere(before: bool, tmp_path: Path) -> None:
    file = tmp_path / "runvol.toml"
    file.write_text('[node]\nid = "here"\n')
    options = ["--config", file, "--state-dir", "/s", "--run-dir", "/r", "--log-level", "error", "--json"]
    done = run(*options, "config") if before else run("config", *options)
    shown = {one.key: one for one in schemas.read(json.loads(done.stdout)) if isinstance(one, schemas.Setting)}
    values = {key: shown[key].value for key in ("node.id", "paths.state_dir", "paths.run_dir", "log.level")}
    assert list(values.values()) == ["here", "/s", "/r", "error"]
    assert [shown[key].said_by for key in values] == [str(file), *SETTINGS.keys() - {"--config"}] or [
        shown[key].said_by for key in values
    ] == [str(file), "--state-dir", "--run-dir", "--log-level"]


def test_the_last_of_two_options_counts_and_json_before_a_subcommand_is_its_own(tmp_path: Path) -> None:
    done = run("--state-dir", "/nowhere", "volumes", "--json", "work", "--run-dir", tmp_path)
    assert json.loads(done.stdout) == {"apiVersion": "runvol.io/v1", "kind": "WorkList", "items": []}
    shown = run("--state-dir", "/a", "config", "--state-dir", "/b").stdout
    assert 'paths.state_dir = "/b"\n    from --state-dir; the default is "/var/lib/runvol"\n' in shown


def load(environment: dict[str, str] | None = None, **flags: str) -> config.Config:
    given = {key.replace("__", "."): value for key, value in flags.items()}
    return config.load(file=None, environment=environment or {}, flags=given)


def test_what_belongs_together_follows_the_two_directories(tmp_path: Path) -> None:
    loaded = load({"RUNVOL_PATHS_STATE_DIR": f"{tmp_path}/"}, paths__run_dir="/r")
    followed = {key: (loaded.text(key), loaded.sources[key]) for key in config.FOLLOWS}
    assert followed == {
        "csi.endpoint": ("unix:///r/csi.sock", "paths.run_dir"),
        "snapshotter.endpoint": ("unix:///r/snapshotter.sock", "paths.run_dir"),
        "snapshotter.state_dir": (f"{tmp_path}/snapshotter", "paths.state_dir"),
    }
    assert load(paths__run_dir="/r", csi__endpoint="unix:///x.sock").text("csi.endpoint") == "unix:///x.sock"
    assert load().text("snapshotter.state_dir") == "/var/lib/runvol/snapshotter"


def test_a_pool_that_an_earlier_release_described_stays_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert config.POOL_FILE == backing.FILE
    assert config.SERVICES == server.SERVICES
    old = tmp_path / "old"
    setting = config.Setting(default=str(old), meaning="")
    monkeypatch.setattr(config, "TABLE", {**config.TABLE, "snapshotter.state_dir": setting})
    assert load(paths__state_dir=f"{tmp_path}/new").text("snapshotter.state_dir") == f"{tmp_path}/new/snapshotter"
    old.mkdir()
    (old / config.POOL_FILE).touch()
    assert load(paths__state_dir=f"{tmp_path}/new").text("snapshotter.state_dir") == str(old)
    (tmp_path / "new/snapshotter").mkdir(parents=True)
    (tmp_path / "new/snapshotter" / config.POOL_FILE).touch()
    assert load(paths__state_dir=f"{tmp_path}/new").text("snapshotter.state_dir") == f"{tmp_path}/new/snapshotter"


@pytest.mark.parametrize(
    ("name", "hint"),
    [("RUNVOL_LOG_COLOUR", "a setting's is RUNVOL_<SECTION>_<KEY>"),
     ("RUNVOL_PATHS_STATEDIR", "is RUNVOL_PATHS_STATE_DIR meant?"),
     ("RUNVOL_SNAPSHOTER_FSTYPE", "is RUNVOL_SNAPSHOTTER_FSTYPE meant?"),
     ("RUNVOL_CONFG", "is RUNVOL_CONFIG meant?")],
)  # fmt: skip
def test_a_variable_that_is_not_known_is_refused(name: str, hint: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load({name: "x"})
    assert str(refused.value).startswith(f"the variable {name} is not known; {hint}")


def test_a_variable_that_is_somebody_elses_is_passed_over() -> None:
    """Those of Services, and those of other programs, such as these tests."""
    ours = set(re.findall(r"RUNVOL_[A-Z_]+[A-Z]", (ROOT / "Makefile").read_text()))
    services = ("SERVICE_HOST", "SERVICE_PORT_GRPC", "PORT", "PORT_443_TCP_ADDR", "PORT_443_TCP")
    for name in ("PATH", "RUNVOL_CACHE", "RUNVOL_TEST_DIR", "RUNVOL_FLEXVOLUME_LOG", *ours):
        load({name: "/x"})
    for name in services:
        load({f"RUNVOL_{name}": "x", f"RUNVOL_CSI_{name}": "x"})
    assert len(ours) > 5


def test_a_slip_of_one_letter_is_noticed_in_every_variable() -> None:
    known = {config.variable_of(key) for key in config.TABLE}
    for name in known:
        for at in range(len("RUNVOL_"), len(name)):
            slip = name[:at] + name[at + 1 :]
            if slip not in known:
                with pytest.raises(ConfigError, match="is not known"):
                    load({slip: "x"})


def test_the_file_of_the_variable_holds_and_the_flag_is_nearer(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(f'[node]\nid = "{name}"\n')
    said = {"RUNVOL_CONFIG": f"{tmp_path}/a"}
    assert config.load(environment=said).node_id == "a"
    assert config.load(environment=said, file=f"{tmp_path}/b").node_id == "b"


@pytest.mark.parametrize(
    ("text", "words", "said"),
    [('[csi]\nservices = ["foo"]\n', ("csi",), "csi.services = ['foo'] (from {}): takes any of identity"),
     ('[csi]\nendpoint = "tcp://x"\n', ("csi",), "csi.endpoint = 'tcp://x' (from {}): must be unix://"),
     ('[snapshotter]\nendpoint = "x"\n', ("snapshotter",), "snapshotter.endpoint = 'x' (from {}): must be unix://"),
     ('[log]\nformat = "xml"\n', ("volumes",), "log.format = 'xml' (from {}): takes text, json"),
     ('[loop]\ncapacity_bytes = "1 GB"\n', ("volumes",), "loop.capacity_bytes = '1 GB' (from {}): is no size"),
     ('[volumes]\nbackends = ["tape"]\n', ("volumes",), "volumes.backends = ['tape'] (from {}): takes any of loop")],
)  # fmt: skip
def test_an_error_of_a_setting_names_the_file(text: str, words: tuple[str, ...], said: str, tmp_path: Path) -> None:
    file = tmp_path / "runvol.toml"
    file.write_text(text)
    assert said.format(file) in run(*words, "--config", file, status=2).stderr


def test_sizes_are_bytes_or_quantities_in_every_setting() -> None:
    said = {"RUNVOL_LOOP_CAPACITY_BYTES": "1Ti", "RUNVOL_SNAPSHOTTER_NAMESPACE_SIZES": "k8s.io=20Gi,a=9000000"}
    loaded = load(said, directory__capacity_bytes="1.5Gi", snapshotter__size_bytes="10737418240")
    assert loaded.number("loop.capacity_bytes") == 1 << 40
    assert loaded.number("directory.capacity_bytes") == 3 << 29
    assert loaded.number("snapshotter.size_bytes") == 10 << 30


def test_the_flexvolume_driver_tells_the_same_sentences(tmp_path: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "RUNVOL_FLEXVOLUME_LOG": str(tmp_path / "log")}
    for wrong, said in (
        ({"RUNVOL_PATHS_STATEDIR": "/x"}, "the variable RUNVOL_PATHS_STATEDIR is not known; is RUNVOL_PATHS_STATE_DIR"),
        ({"RUNVOL_CONFIG": f"{tmp_path}/none.toml"}, f"the configuration file {tmp_path}/none.toml does not exist"),
        ({"RUNVOL_LOG_LEVEL": "loud"}, "log.level = 'loud' (from RUNVOL_LOG_LEVEL): takes debug, info"),
    ):
        done = subprocess.run([sys.executable, "-m", "runvol.flexvolume_driver", "unmount", "/x"], capture_output=True,
                              text=True, check=False, cwd=ROOT, env=environment | wrong, timeout=60)  # fmt: skip
        reply = json.loads(done.stdout)
        assert (done.returncode, reply["status"], done.stderr) == (1, "Failure", "")
        assert reply["message"].startswith(said), reply


def test_an_installed_flexvolume_driver_has_the_settings_of_its_command_line(tmp_path: Path) -> None:
    file = tmp_path / "runvol.toml"
    file.touch()
    run("--config", file, "--run-dir", tmp_path / "r", "flexvolume", "install", "--plugin-dir", tmp_path / "p",
        "--state-dir", tmp_path / "s", status=0)  # fmt: skip
    text = (tmp_path / "p/runvol~runvol/runvol").read_text()
    for name, value in (("CONFIG", file), ("PATHS_RUN_DIR", tmp_path / "r"), ("PATHS_STATE_DIR", tmp_path / "s")):
        assert f"os.environ.setdefault('RUNVOL_{name}', '{value}')" in text


def test_a_file_of_settings_is_read_as_a_strangers(tmp_path: Path) -> None:
    """It is named by whoever types the command."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for name, content in (
        ("deep", "a = " + "[" * 100_000), ("digits", "[csi]\nmax_volumes = " + "1" * 5000),
        ("long", "#" * (5 << 20)),
    ):  # fmt: skip
        (tmp_path / name).write_text(content)
    for file, said in (
        (fifo, "cannot be read: it is no regular file"), (tmp_path, "cannot be read: Is a directory"),
        (Path("/dev/zero"), "has more than"), (tmp_path / "deep", "is no TOML: it is nested too deeply"),
        (tmp_path / "digits", "is no TOML: Exceeds the limit"), (tmp_path / "long", "has more than"),
    ):  # fmt: skip
        assert f"{file} {said}" in run("--config", file, "config", status=2).stderr.replace(
            "cannot be read: it has", "has"
        )
    assert run("--config", "/dev/null", "config", status=0)


@pytest.mark.parametrize("text", ["1_0", "\u0661\u0662", "+5", " 7", "0x10", "1e3", "9" * 19, "-1", "1048577", "NaN"])
def test_a_number_is_a_number_as_everybody_reads_it(text: str) -> None:
    with pytest.raises(ConfigError, match=r"csi\.max_volumes"):
        config.load(file="/dev/null", environment={"RUNVOL_CSI_MAX_VOLUMES": text})


@pytest.mark.parametrize("key", ["LOOP_CAPACITY_BYTES", "DIRECTORY_CAPACITY_BYTES", "SNAPSHOTTER_SIZE_BYTES"])
@pytest.mark.parametrize("text", ["8Ei", "99999999999999999999Ei", "-1", "\u0661Gi", "10gi", "1e30", "inf"])
def test_a_size_is_none_that_nothing_counts_to(key: str, text: str) -> None:
    with pytest.raises(ConfigError):
        config.load(file="/dev/null", environment={f"RUNVOL_{key}": text})
    assert "is no size" in run("volumes", "create", "v", f"--size={text}", status=2).stderr


@pytest.mark.parametrize("key", ["csi", "nri", "snapshotter"])
@pytest.mark.parametrize(
    "text", ["x", ":9090", "127.0.0.1:", "127.0.0.1:0", "127.0.0.1:65536", "h:\u0669\u0660", "a b:90"]
)
def test_an_address_that_cannot_be_one_is_a_setting_that_cannot_be(key: str, text: str) -> None:
    with pytest.raises(ConfigError, match="takes HOST:PORT"):
        config.load(file="/dev/null", environment={f"RUNVOL_{key.upper()}_METRICS": text})
    assert config.load(file="/dev/null", environment={f"RUNVOL_{key.upper()}_METRICS": "[::1]:9090"})


def test_what_may_not_be_seen_is_not_said_to_be_absent(tmp_path: Path) -> None:
    state = tmp_path / "snapshotter"
    state.mkdir(mode=0o700)
    (state / "snapshots.db").touch()
    tmp_path.chmod(0o755)
    for words in (("snapshots",), ("images",), ("csi", "--endpoint", f"unix://{state}/csi.sock")):
        done = subprocess.run(
            ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", sys.executable, "-m", "runvol", *words],
            cwd=ROOT, capture_output=True, text=True, check=False, timeout=60,
            env={"PATH": os.environ["PATH"], "RUNVOL_SNAPSHOTTER_STATE_DIR": str(state),
                 "RUNVOL_SNAPSHOTTER_IMAGES": str(tmp_path), "RUNVOL_PATHS_RUN_DIR": "/dev/shm/no",
                 "RUNVOL_PATHS_STATE_DIR": "/dev/shm/no"},
        )  # fmt: skip
        assert "Traceback" not in done.stderr and "permission denied" in done.stderr, done.stderr
        assert done.returncode == (1 if words[0] == "csi" else 3)


def test_doctor_ends_whatever_lies_in_the_place_of_what_it_reads(tmp_path: Path) -> None:
    (tmp_path / "state/snapshotter").mkdir(parents=True)
    for name in ("state/volumes.db", "state/directories.db", "state/snapshotter/pool.json", "containerd.toml"):
        os.mkfifo(tmp_path / name)
    done = run(
        "--state-dir", tmp_path / "state", "--run-dir", tmp_path / "run", "doctor", "--json", status=1,
        RUNVOL_PATHS_CONTAINERD_CONFIG=str(tmp_path / "containerd.toml"), RUNVOL_CRI_ENDPOINT="",
        RUNVOL_NODE_ROOTS=str(tmp_path / "kubelet"),
    )  # fmt: skip
    found = {(one["id"], one["state"]): one["finding"] for one in json.loads(done.stdout)["items"]}
    assert "it is no regular file" in found["volumes.store-unreadable", "broken"]
    assert "it is no regular file" in found["pool.description-damaged", "broken"]
    assert "it is no regular file" in found["containerd.not-found", "warning"]


@pytest.fixture
def dead(tmp_path: Path) -> Iterator[Path]:
    with dead_directory(tmp_path / "dead") as place:
        yield place


@pytest.mark.parametrize(
    ("words", "setting"),
    [
        (("where", "a/b"), "RUNVOL_PATHS_POD_LOGS"), (("handoffs",), "RUNVOL_PATHS_DIRECT_VOLUMES"),
        (("volumes",), "RUNVOL_PATHS_STATE_DIR"), (("volumes", "snapshots"), "RUNVOL_PATHS_STATE_DIR"),
        (("volumes", "work"), "RUNVOL_PATHS_RUN_DIR"), (("gc", "--dry-run"), "RUNVOL_PATHS_STATE_DIR"),
        (("config",), "RUNVOL_CONFIG"), (("snapshots",), "RUNVOL_SNAPSHOTTER_STATE_DIR"),
        (("detect", "a/b"), "RUNVOL_PATHS_CONTAINERD_CONFIG"),
    ],
)  # fmt: skip
def test_a_directory_that_never_answers_is_status_3_in_time(
    dead: Path, words: tuple[str, ...], setting: str, tmp_path: Path
) -> None:
    code = (
        "import sys; from runvol import entry, troubles\n"
        f"troubles.LOOKING = 2.0\nsys.argv = ['runvol', *{words!r}]\nentry.main()\n"
    )
    settings = {
        "RUNVOL_PATHS_STATE_DIR": str(tmp_path), "RUNVOL_PATHS_RUN_DIR": str(tmp_path / "run"),
        "RUNVOL_CRI_ENDPOINT": "", setting: str(dead / "a" if "CONFIG" in setting else dead),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={"PATH": os.environ["PATH"], **settings}, capture_output=True,
        text=True, check=False, timeout=30,
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert done.stderr.startswith("Error: this did not end within 2 s: a disk or a server does not answer")


@pytest.mark.parametrize("setting", ["RUNVOL_PATHS_CONTAINERD_CONFIG", "RUNVOL_PATHS_DIRECT_VOLUMES"])
def test_doctor_goes_on_past_a_directory_that_never_answers(dead: Path, setting: str, tmp_path: Path) -> None:
    code = (
        "import sys; from runvol import doctor, entry\n"
        "doctor._LONGEST = 2.0\ndoctor.ended.__defaults__ = (2.0,)\nsys.argv = ['runvol', 'doctor']\nentry.main()\n"
    )
    settings = {
        "RUNVOL_PATHS_STATE_DIR": str(tmp_path), "RUNVOL_PATHS_RUN_DIR": str(tmp_path / "run"),
        "RUNVOL_NODE_ROOTS": str(tmp_path / "kubelet"), "RUNVOL_CRI_ENDPOINT": "",
        setting: str(dead / "a" if "CONFIG" in setting else dead),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={"PATH": os.environ["PATH"], **settings}, capture_output=True,
        text=True, check=False, timeout=100,
    )  # fmt: skip
    assert done.returncode in (1, 3), done.stderr
    assert "did not end within 2.0 s" in done.stdout and "Traceback" not in done.stderr
    assert "volumes on this node" in done.stdout or "on this node" in done.stdout, "the rest is told"


@pytest.mark.parametrize(("setting", "ids"), [
    ("RUNVOL_NODE_ROOTS", {"kubelet.root-silent", "kubelet.mounts-unproved", "doctor.not-looked"}),
    ("RUNVOL_PATHS_STATE_DIR", {"state.silent"}), ("RUNVOL_CSI_PLUGINS_REGISTRY", {"doctor.not-looked"}),
])  # fmt: skip
def test_doctor_names_a_directory_that_never_answers_and_does_not_wait_for_it_again(
    dead: Path, tmp_path: Path, setting: str, ids: set[str]
) -> None:
    settings = {
        "RUNVOL_PATHS_STATE_DIR": str(tmp_path), "RUNVOL_PATHS_RUN_DIR": str(tmp_path / "run"),
        "RUNVOL_NODE_ROOTS": str(tmp_path / "kubelet"), "RUNVOL_CRI_ENDPOINT": "", setting: str(dead),
    }  # fmt: skip
    code = (
        "import sys; from runvol import doctor_kubelet, entry\n"
        "doctor_kubelet._LOOKING = 2.0\nsys.argv = ['runvol', 'doctor', '--json']\nentry.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={"PATH": os.environ["PATH"], **settings}, capture_output=True,
        text=True, check=False, timeout=100,
    )  # fmt: skip
    assert done.returncode in (1, 3) and "Traceback" not in done.stderr, done.stderr
    found = [one for one in json.loads(done.stdout)["items"] if one["state"] == "unknown"]
    told = {one["id"]: one["finding"] for one in found if str(dead) in one["finding"]}
    assert told.keys() >= ids, found
    assert '"id": "containerd.' in done.stdout, "the rest is told"
    assert not [one["finding"] for one in found if "did not end within 60" in one["finding"]]
