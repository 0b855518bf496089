"""Mounts that kubelet does not see are not answered with OK: pods would write to the host's disk."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from guestmount import Reach
from guestmount.errors import Refused
from tests.csi.helpers import PODS, refused
from tests.driver import Driver

pytestmark = pytest.mark.kernel
A = PODS[0]
_ASK = """
import sys
from guestmount import Reach
doubt = Reach(roots=[sys.argv[1]], process=sys.argv[2]).doubt()
print("seen" if doubt is None else f"{doubt.certain} {doubt.why}")
"""


@pytest.mark.parametrize("propagation", ["private", "slave"])
@pytest.mark.parametrize("runtime", ["runc", "kata"])
def test_a_plugin_whose_mounts_stay_in_its_own_namespace_publishes_nothing(soon, propagation, runtime):
    with Driver(prefix=("unshare", "-m", "--propagation", propagation)) as driver:
        volume = driver.create("pvc")
        driver.stage(volume)
        with refused("FAILED_PRECONDITION", "Bidirectional", str(driver.kubelet)):
            driver.publish(volume, A, runtime=runtime)
        files = driver.create("files", backend="directory", quota="none")
        driver.stage(files)
        with refused("FAILED_PRECONDITION", "Bidirectional"):
            driver.publish(files, A, runtime="runc")
        (health,) = driver.client.NodeGetStorageHealth().backend_health
        assert health.reason == "MountsNotSeen"
        assert "mounts may not reach kubelet" in driver.log.read_text()
        doctor = driver.cli("doctor", "--json", check=False)
        assert "the mounts of kubelet's process" in doctor.stdout or "propagates nothing" in doctor.stdout
        driver.unstage(volume)
        driver.unstage(files)


def ask(directory: Path, process: object, *prefix: str) -> str:
    command = [*prefix, sys.executable, "-c", _ASK, str(directory), str(process)]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2]).stdout


@pytest.fixture
def shared(tmp_path):
    """A directory that propagates, as kubelet's does on a node with systemd."""
    place = tmp_path / "kubelet"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", place], check=True)
    subprocess.run(["mount", "--make-shared", place], check=True)
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_in_the_namespace_of_the_first_process_there_is_nothing_to_prove(tmp_path):
    # A worker of pytest's has one of its own; who started it has not.
    out = ("nsenter", f"--mount=/proc/{os.getppid()}/ns/mnt", f"--wd={os.getcwd()}")
    assert ask(tmp_path, 1, *(out if "PYTEST_XDIST_WORKER" in os.environ else ())) == "seen\n"


def test_a_namespace_that_shares_the_directory_is_enough(shared):
    # What Bidirectional gives a container; kubelet's process stands in this test's own namespace.
    assert ask(shared, os.getpid(), "unshare", "-m", "--propagation", "unchanged") == "seen\n"


def test_one_that_only_receives_is_not(shared):
    said = ask(shared, os.getpid(), "unshare", "-m", "--propagation", "slave")
    assert said.startswith("True ") and "propagates nothing" in said


def test_a_peer_group_of_somebody_elses_is_not(shared):
    script = f'mount -t tmpfs other {shared} && mount --make-shared {shared} && exec "$@"'
    said = ask(shared, os.getpid(), "unshare", "-m", "--propagation", "private", "sh", "-c", script, "sh")
    assert said.startswith("True ") and "another mount" in said


def test_another_directory_of_the_same_filesystem_is_not(shared):
    """A container's directory that was bound from elsewhere on the same, shared mount."""
    (shared / "a").mkdir()
    (shared / "b").mkdir()
    script = f'mount --bind {shared}/b {shared}/a && exec "$@"'
    said = ask(shared / "a", os.getpid(), "unshare", "-m", "--propagation", "unchanged", "sh", "-c",
               f"mount --make-private {shared} && {script}", "sh")  # fmt: skip
    assert said.startswith("True ")


def test_what_cannot_be_read_is_refused_unless_the_setting_allows_it(shared):
    said = ask(shared, "no-such-program", "unshare", "-m", "--propagation", "unchanged")
    assert said.startswith("False ") and "cannot be read" in said
    with pytest.raises(Refused, match="node.unproved_mounts"):
        Reach(roots=[str(shared)], process="no-such-program").check()
    Reach(roots=[str(shared)], process="no-such-program", unproved=True).check()


def test_what_is_certain_is_refused_whatever_the_setting_says(shared):
    ask_and_allow = _ASK.replace("process=sys.argv[2])", "process=sys.argv[2], unproved=True)").replace(
        "doubt = ", "r = "
    )
    ask_and_allow = ask_and_allow.replace(".doubt()", "").replace("doubt is None", "r.check() is None")
    done = subprocess.run(
        ["unshare", "-m", "--propagation", "private", sys.executable, "-c", ask_and_allow, str(shared), str(os.getpid())],
        check=False, capture_output=True, text=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 1 and "Refused" in done.stderr and "unproved_mounts" not in done.stderr


@pytest.mark.parametrize("prefix", [
    ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"),
    ("unshare", "--pid", "--fork", "--kill-child"),
])  # fmt: skip
def test_a_process_that_a_pod_calls_kubelet_speaks_for_nobody(shared, prefix):
    """Of another user, or in a container: neither is taken although it has the name and the mounts."""
    name = "runvol-kubelet"
    called = "import ctypes,sys,time; ctypes.CDLL(None).prctl(15, sys.argv[1].encode()); print('named', flush=True); time.sleep(60)"
    python = os.path.realpath(sys.executable)
    impostor = subprocess.Popen([*prefix, python, "-c", called, name], stdout=subprocess.PIPE, text=True)
    try:
        assert impostor.stdout.readline() == "named\n"
        said = ask(shared, name, "unshare", "-m", "--propagation", "unchanged")
        assert said.startswith("False ") and "cannot be read" in said
        real = subprocess.Popen([python, "-c", called, name], stdout=subprocess.PIPE, text=True)
        try:
            assert real.stdout.readline() == "named\n"
            assert ask(shared, name, "unshare", "-m", "--propagation", "unchanged") == "seen\n"
        finally:
            real.kill()
            real.wait()
    finally:
        impostor.kill()
        impostor.wait()
