"""The executable as kubelet runs it: arguments in, exactly one JSON object out, and nothing left behind."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import pytest

from flexvolume import Reply, Status
from runvol import flexvolume_driver
from tests.dead import dead
from tests.driver import Driver

POD = "88945909-57ff-49e4-b844-c588ceabec{}"


class Flex:
    """kubelet's side of the protocol, with a node's directories of its own."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.environment = {
            **os.environ, **driver.environment, "RUNVOL_FLEXVOLUME_LOG": str(driver.directory / "log/flexvolume.log"),
        }  # fmt: skip
        self.program = driver.directory / "runvol"
        self.program.write_text(f"#!{sys.executable}\nfrom runvol.flexvolume_driver import main\n\nmain()\n")
        self.program.chmod(0o755)

    @property
    def log(self) -> str:
        return Path(self.environment["RUNVOL_FLEXVOLUME_LOG"]).read_text()

    def run(self, *words: str, **more: str) -> tuple[int, dict[str, object]]:
        done = subprocess.run([self.program, *words], env=self.environment | more, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True, check=False, timeout=60)  # fmt: skip
        reply = json.loads(done.stdout)
        assert isinstance(reply, dict)
        assert (done.returncode == 0) == (reply["status"] == "Success"), reply
        return done.returncode, reply

    def ok(self, *words: str) -> dict[str, object]:
        _, reply = self.run(*words)
        assert reply["status"] == "Success", reply
        return reply

    def fails(self, *words: str) -> str:
        _, reply = self.run(*words)
        assert reply["status"] == "Failure", reply
        return str(reply["message"])

    def target(self, volume: str, pod: int = 10) -> str:
        """As kubelet makes it before it calls."""
        path = self.driver.kubelet / "pods" / POD.format(pod) / "volumes/runvol~runvol" / volume
        path.mkdir(parents=True, exist_ok=True)
        return str(path)

    def options(self, volume: str, *, pod: int = 10, **more: str) -> str:
        return json.dumps({
            "kubernetes.io/fsType": "ext4", "kubernetes.io/pod.name": "p", "kubernetes.io/pod.namespace": "default",
            "kubernetes.io/pod.uid": POD.format(pod), "kubernetes.io/pvOrVolumeName": "v", "kubernetes.io/readwrite": "rw",
            "kubernetes.io/secret/user": "c2VjcmV0LXdvcmQ=", "kubernetes.io/serviceAccount.name": "default",
            "volume": volume, **{key.replace("__", "/"): value for key, value in more.items()},
        })  # fmt: skip

    def mount(self, volume: str, *, pod: int = 10, **more: str) -> str:
        target = self.target(volume, pod)
        self.ok("mount", target, self.options(volume, pod=pod, **more))
        return target

    def create(self, name: str, *parameters: str, size: int = 64 << 20) -> str:
        words = [word for one in parameters for word in ("-p", one)]
        done = self.driver.cli("volumes", "create", name, "--size", str(size), "--json", *words)
        return str(json.loads(done.stdout)["items"][0]["volume"])


@pytest.fixture
def flex() -> Iterator[Flex]:
    """No node plugin runs: the calls work alone."""
    driver = Driver()
    one = Flex(driver)
    yield one
    left = [*driver.mounts(), *driver.loop_devices()]
    driver.remove()
    assert not left, left


@pytest.fixture
def volume(flex: Flex) -> Iterator[str]:
    made = flex.create("one")
    yield made
    for pod in range(10, 40):
        path = flex.driver.kubelet / "pods" / POD.format(pod) / "volumes/runvol~runvol" / made
        if path.exists():
            flex.ok("unmount", str(path))
    flex.driver.cli("volumes", "delete", "--yes", made)
    handed = flex.driver.direct_volumes
    assert not handed.exists() or not os.listdir(handed)
    assert not list(flex.driver.records.glob("claims/*"))
    records = flex.driver.records / "flexvolume/targets"
    assert not records.exists() or not os.listdir(records)


def test_init_says_what_the_driver_does(flex):
    reply = flex.ok("init")
    assert reply["capabilities"] == {
        "attach": False, "fsGroup": False, "selinuxRelabel": False, "supportsMetrics": False, "requiresFSResize": True,
    }  # fmt: skip
    from flexvolume.calls import CAPABILITIES

    assert reply["capabilities"] == CAPABILITIES


def test_a_runc_pod_writes_to_the_volume_and_finds_it_again(flex, volume):
    target = flex.mount(volume, runtime="runc")
    (Path(target) / "f").write_text("x")
    flex.ok("unmount", target)
    assert not Path(target).exists()
    flex.ok("unmount", target)
    again = flex.mount(volume, pod=11, runtime="runc")
    assert (Path(again) / "f").read_text() == "x"


def test_a_sandbox_gets_the_device_and_the_target_a_placeholder(flex, volume):
    target = flex.mount(volume, runtime="kata")
    assert os.listdir(target) == ["RUNVOL-PLACEHOLDER"]
    (one,) = json.loads(flex.driver.cli("handoffs", "--json").stdout)["items"]
    assert one["volume"] == volume
    assert one["target"] == target
    assert "belongs to the guest of pod default/p" in flex.fails(
        "mount", flex.target(volume, 11), flex.options(volume, pod=11, runtime="runc")
    )
    # As kubelet does after its restart.
    flex.mount(volume, runtime="kata")
    flex.ok("unmount", target)
    assert json.loads(flex.driver.cli("handoffs", "--json").stdout)["items"] == []


def test_several_volumes_of_a_pod_do_not_meet(flex, volume):
    other = flex.create("two")
    targets = [flex.mount(one, runtime="kata") for one in (volume, other)]
    assert len(json.loads(flex.driver.cli("handoffs", "--json").stdout)["items"]) == 2
    flex.ok("unmount", targets[1])
    assert [one["volume"] for one in json.loads(flex.driver.cli("handoffs", "--json").stdout)["items"]] == [volume]
    flex.driver.cli("volumes", "delete", "--yes", other)


def test_read_only_groups_and_mount_options(flex, volume):
    target = flex.mount(
        volume, runtime="runc", mountOptions="noatime", **{"kubernetes.io__mounterArgs.FsGroup": "2000"}
    )
    assert os.stat(target).st_gid == 2000
    assert any("noatime" in line for line in Path("/proc/self/mounts").read_text().splitlines() if target in line)
    flex.ok("unmount", target)
    target = flex.target(volume)
    flex.ok("mount", target, flex.options(volume, runtime="runc", **{"kubernetes.io__readwrite": "ro"}))
    with pytest.raises(OSError, match="Read-only"):
        (Path(target) / "f").write_text("x")


def test_a_directory_is_shared(flex):
    volume = flex.create("files", "backend=directory", "quota=none")
    targets = [flex.mount(volume, pod=pod, runtime=runtime) for pod, runtime in ((10, "runc"), (11, "kata"))]
    (Path(targets[0]) / "f").write_text("x")
    assert (Path(targets[1]) / "f").read_text() == "x"
    for target in targets:
        flex.ok("unmount", target)
    flex.driver.cli("volumes", "delete", "--yes", volume)


def test_not_knowing_the_runtime_is_a_failure_and_leaves_kubelets_directory(flex, volume):
    target = flex.target(volume)
    assert "which runtime will run default/p is not known" in flex.fails("mount", target, flex.options(volume))
    assert os.listdir(target) == []
    flex.ok("unmount", target)


def test_a_volume_grows_while_it_is_mounted(flex):
    volume = flex.create("grows", "csi.storage.k8s.io/fstype=xfs", size=320 << 20)
    target = flex.mount(volume, runtime="runc", **{"kubernetes.io__fsType": "xfs"})
    before = os.statvfs(target).f_blocks
    options = flex.options(volume, **{"kubernetes.io__fsType": "xfs"})
    flex.ok("expandfs", options, "", target, str(512 << 20), str(320 << 20))
    assert os.statvfs(target).f_blocks > before * 1.4
    flex.ok("unmount", target)
    flex.driver.cli("volumes", "delete", "--yes", volume)


@pytest.mark.parametrize("call", ["attach", "detach", "waitforattach", "isattached", "mountdevice", "unmountdevice",
                                  "expandvolume", "nonsense"])  # fmt: skip
def test_calls_that_mean_nothing_here_are_not_supported(flex, call):
    _, reply = flex.run(call, "a", "b")
    assert reply["status"] == "Not supported"


@pytest.mark.parametrize(
    "words", [[], ["mount"], ["mount", "/x"], ["unmount"], ["mount", "/x", "{}", "more"], ["expandfs"]]
)
def test_a_wrong_number_of_arguments_is_told(flex, words):
    _, reply = flex.run(*words)
    assert reply["status"] in ("Failure", "Not supported")
    assert reply["message"]


@pytest.mark.parametrize(
    "options",
    ["", "null", "[]", "{", '{"volume": 5}', '{"volume": ""}', '{"volume": null}', "{}", '"x"', "1" * 5000, '{"a": "b"}',
     '{"volume": "../../etc"}', '{"volume": "loop-$(reboot)"}', '{"volume": "; rm -rf /"}', '{"volume": "loop-x"}',
     '{"volume": "loop-x", "mountOptions": "bind"}', '{"volume": "x", "runtime": "`id`"}', "[" * 100_000,
     '{"volume": "loop-x", "volumeId": "loop-y"}', '{"volume": "loop-\\u0000"}'],
    ids=range(20),
)  # fmt: skip
def test_bad_options_are_refused_with_one_sentence(flex, options):
    target = flex.target("v")
    message = flex.fails("mount", target, options)
    assert message
    assert "Traceback" not in message
    assert os.listdir(target) == []


@pytest.mark.parametrize(
    "target", ["/etc", "relative", "/", "", "{kubelet}/../../etc/x", "{kubelet}/pods/../../x", "{kubelet}"]
)
def test_no_path_outside_of_kubelets_directory_is_touched(flex, volume, target):
    path = target.format(kubelet=flex.driver.kubelet)
    for words in (("mount", path, flex.options(volume, runtime="runc")), ("unmount", path)):
        assert "the target" in flex.fails(*words)


def test_secrets_reach_neither_log_nor_reply(flex, volume):
    options = flex.options(volume, unknown="x")
    message = flex.fails("mount", flex.target(volume), options)
    flex.mount(volume, runtime="runc")
    broken = flex.fails("mount", flex.target(volume), options[:-1])
    for text in (message, broken, flex.log):
        assert "c2VjcmV0" not in text
    assert '"call": "mount"' in flex.log


def test_the_disk_driver_of_alicloud_is_understood(flex, volume):
    disk = flex.driver.directory / "disk"
    disk.write_text(flex.program.read_text())
    disk.chmod(0o755)
    flex.program = disk
    options = json.loads(flex.options(volume, runtime="runc"))
    options["volumeId"] = options.pop("volume")
    target = flex.target(volume)
    flex.ok("mount", target, json.dumps(options))
    assert os.path.ismount(target)


def test_an_unmount_without_its_record_finds_the_claim(flex, volume):
    target = flex.mount(volume, runtime="kata")
    for record in (flex.driver.records / "flexvolume/targets").iterdir():
        record.unlink()
    flex.ok("unmount", target)
    assert json.loads(flex.driver.cli("handoffs", "--json").stdout)["items"] == []


def test_calls_beside_each_other(flex):
    volumes = [flex.create(f"v{number}") for number in range(10)]
    pods = range(10, 20)
    with futures.ThreadPoolExecutor(10) as callers:
        targets = list(
            callers.map(lambda pair: flex.mount(pair[0], pod=pair[1], runtime="kata"), zip(volumes, pods, strict=True))
        )
        assert len(json.loads(flex.driver.cli("handoffs", "--json").stdout)["items"]) == 10
        list(callers.map(lambda target: flex.ok("unmount", target), targets))
    for volume in volumes:
        flex.driver.cli("volumes", "delete", "--yes", volume)


def test_kill_9_at_any_moment_is_made_good_by_the_same_call(flex, volume):
    target = flex.target(volume)
    for number in range(12):
        for words in (("mount", target, flex.options(volume, runtime="kata")), ("unmount", target)):
            running = subprocess.Popen([flex.program, *words], env=flex.environment, stdout=subprocess.PIPE,
                                       start_new_session=True)  # fmt: skip
            time.sleep(0.02 * number)
            children = subprocess.run(
                ["pgrep", "-P", str(running.pid)], capture_output=True, text=True, check=False
            ).stdout
            for pid in (running.pid, *map(int, children.split())):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            running.wait()
            Path(target).mkdir(parents=True, exist_ok=True)
            flex.ok(*words)


def test_a_call_waits_for_one_that_its_caller_has_left(flex, volume):
    target = flex.target(volume)
    for number in range(6):
        for words in (("mount", target, flex.options(volume, runtime="kata")), ("unmount", target)):
            left = subprocess.Popen([flex.program, *words], env=flex.environment, stdout=subprocess.PIPE)
            time.sleep(0.05 + 0.03 * number)
            left.kill()
            left.wait()
            Path(target).mkdir(parents=True, exist_ok=True)
            flex.ok(*words)


def test_calls_for_one_volume_take_turns(flex, volume):
    pods = range(10, 18)
    targets = {pod: flex.target(volume, pod) for pod in pods}
    mounts = [("mount", target, flex.options(volume, pod=pod, runtime="runc")) for pod, target in targets.items()]
    with futures.ThreadPoolExecutor(len(mounts)) as callers:
        list(callers.map(lambda words: flex.ok(*words), mounts))
        assert all(os.path.ismount(target) for target in targets.values())
        list(callers.map(lambda target: flex.ok("unmount", target), targets.values()))
    # Whose pods come and go: the last unmount of one meets the first mount of the next.
    with futures.ThreadPoolExecutor(2) as callers:
        list(
            callers.map(
                lambda pod: [flex.ok(*words) for words in (mounts[pod], ("unmount", mounts[pod][1])) * 4], range(2)
            )
        )
    assert not any(map(os.path.ismount, targets.values()))


def test_a_volume_that_another_call_keeps_is_told_in_the_end(flex, volume):
    turns = flex.driver.run / "turns"
    turns.mkdir(parents=True)
    turns.mkdir(exist_ok=True)
    with open(turns / volume, "w") as keeper:
        fcntl.flock(keeper, fcntl.LOCK_EX)
        options = flex.options(volume, runtime="runc")
        _, reply = flex.run("mount", flex.target(volume), options, RUNVOL_FLEXVOLUME_CALL_SECONDS="1")
        assert reply["message"] == f"another operation on volume {volume} is under way; try again when it has ended"
        assert not list((flex.driver.records / "flexvolume").glob("targets/*"))
    flex.mount(volume, runtime="runc")


def test_a_call_that_hangs_is_answered_in_time(flex, volume):
    """The configuration lies where nobody answers: whoever opens it waits for ever."""
    with dead(flex.driver.directory / "dead") as place:
        started, file = time.monotonic(), str(place / "config.toml")
        _, reply = flex.run("unmount", flex.target(volume), RUNVOL_CONFIG=file, RUNVOL_FLEXVOLUME_CALL_SECONDS="1")
        assert time.monotonic() - started < 10
        assert "did not end within" in str(reply["message"])


def test_it_is_installed_upgraded_and_removed_under_a_running_kubelet(flex, volume):
    plugins = flex.driver.directory / "exec"
    place = plugins / "runvol~runvol"
    flex.program = place / "runvol"
    for _ in range(2):
        flex.driver.cli(
            "flexvolume", "install", "--plugin-dir", str(plugins), "--log", flex.environment["RUNVOL_FLEXVOLUME_LOG"]
        )
        assert os.listdir(place) == ["runvol"]
        flex.ok("init")
    target = flex.mount(volume, runtime="runc")
    assert os.path.ismount(target)
    flex.ok("unmount", target)
    flex.driver.cli("flexvolume", "uninstall", "--plugin-dir", str(plugins))
    assert not place.exists()
    assert flex.driver.cli("flexvolume", "install", "--as", "../x", check=False).returncode == 2


def test_kubelet_never_sees_a_half_written_driver(flex):
    plugins = flex.driver.directory / "exec"
    flex.driver.cli("flexvolume", "install", "--plugin-dir", str(plugins))
    flex.program = plugins / "runvol~runvol/runvol"
    stop = threading.Event()
    upgrading = threading.Thread(target=lambda: [flex.driver.cli("flexvolume", "install", "--plugin-dir", str(plugins))
                                                 for _ in iter(stop.is_set, True)])  # fmt: skip
    upgrading.start()
    for _ in range(30):
        flex.ok("init")
    stop.set()
    upgrading.join()


@pytest.mark.parametrize("seconds", ["inf", "nan", "1e300", "-1", "x"])
def test_a_limit_that_is_none_is_no_reason_to_say_nothing(flex, seconds):
    flex.ok("unmount", flex.target("v"))
    _, reply = flex.run("unmount", flex.target("v"), RUNVOL_FLEXVOLUME_CALL_SECONDS=seconds)
    assert reply["status"] == "Success"


def test_a_log_that_nobody_reads_holds_no_call_up(flex):
    fifo = flex.driver.directory / "fifo"
    os.mkfifo(fifo)
    _, reply = flex.run("unmount", flex.target("v"), RUNVOL_FLEXVOLUME_LOG=str(fifo))
    assert reply["status"] == "Success"


def test_a_message_of_any_length_is_one_json_object():
    text = json.dumps(Reply(status=Status.FAILURE, message="\N{GRINNING FACE}" * 100_000).document())
    assert len(text) < 64 << 10


def test_the_log_is_rotated(flex):
    log = Path(flex.environment["RUNVOL_FLEXVOLUME_LOG"])
    log.parent.mkdir()
    log.write_bytes(b"x" * (3 << 20))
    flex.ok("init")
    assert log.stat().st_size < 1000
    assert Path(f"{log}.1").stat().st_size == 3 << 20


@pytest.mark.parametrize("streams", [">&-", "<&- >&- 2>&-", ">/dev/full"])
@pytest.mark.parametrize("words", ["init", "mount /nowhere {}"])
def test_a_reply_that_nobody_hears_is_status_1_and_a_line_of_the_log(flex, words, streams):
    done = subprocess.run(["bash", "-c", f"{flex.program} {words} {streams}"], env=flex.environment, capture_output=True,
                          text=True, check=False, timeout=60)  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")
    assert "nobody heard the reply" in flex.log and "Traceback" not in flex.log


def test_init_loads_nothing_of_the_rooms(flex):
    code = "import sys; from runvol import flexvolume_driver; print([n for n in ('blockdev', 'guestmount', 'sqlite3', 'msgspec') if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    code = "import sys; import flexvolume, runvol.assembly; print([n for n in ('grpc', 'kubernetes', 'urllib3', 'click', 'ssl', 'sh') if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_mount_namespace_of_somebodys_own_does_not_fail_an_unmount(flex, volume):
    """kubelet does not ask again once the path is gone: what is left to do is a start's, or gc's."""
    target = flex.mount(volume, runtime="runc")
    keeper = subprocess.Popen(
        ["unshare", "-m", "--propagation", "private", sys.executable, "-c", "import time; print(flush=True); time.sleep(300)"],
        stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert keeper.stdout is not None
        keeper.stdout.readline()
        flex.ok("unmount", target)
        assert not os.path.ismount(target) and flex.driver.loop_devices()
        again = flex.mount(volume, pod=11, runtime="runc")
        flex.ok("unmount", again)
    finally:
        keeper.kill()
        keeper.wait()
    flex.driver.cli("gc")
    assert not flex.driver.left_over()["claims and locks"] and not flex.driver.loop_devices()


def test_however_much_a_checker_says_there_is_one_json_with_what_to_do():
    """An e2fsck of a badly damaged filesystem fills screens."""
    from blockdev.errors import CommandFailed, FilesystemDamaged

    for error in (FilesystemDamaged("/x", "line\n" * 100_000), CommandFailed("mkfs", 1, "word " * 100_000)):
        assert len(str(error)) < 2000
    assert str(FilesystemDamaged("/x", "line\n" * 100_000)).endswith("Run fsck on it by hand")


@pytest.mark.parametrize(
    "text", [b"", b"x", b'{"status"', b"[]", b'{"status": "Perhaps"}', b'{"status": "Success"} more']
)
def test_half_a_reply_is_none(text):
    from runvol import flexvolume_driver

    assert not flexvolume_driver._is_reply(text)
    assert flexvolume_driver._is_reply(b'{"status": "Success"}')


@pytest.mark.parametrize(
    ("said", "seconds"),
    [("5", 5.0), ("0", 1.0), ("-1", 1.0), ("1e9", 3600.0), ("nan", 100.0), ("inf", 100.0), ("x", 100.0)],
)
def test_a_time_that_is_none_is_the_usual_one(said, seconds, monkeypatch):
    monkeypatch.setenv("RUNVOL_FLEXVOLUME_CALL_SECONDS", said)
    assert flexvolume_driver._limit() == seconds
