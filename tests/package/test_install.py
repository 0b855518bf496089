"""The package installs from a clean clone and from a wheel, with its stubs inside; no generated file is committed."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
_TRY = "import runvol_proto.csi_pb2 as c, csi, guestmount, blockdev, volumes; print(c.NodePublishVolumeRequest.DESCRIPTOR.full_name)"


def run(*command, **more):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, **more)
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The tracked files as they are in the work tree, without anything built here."""
    place = tmp_path_factory.mktemp("clone")
    names = run("git", "ls-files", "-z", cwd=ROOT).split("\0")
    for name in filter(None, names):
        source = ROOT / name
        if source.exists():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes(source.read_bytes())
    return place


def works_in(place: Path) -> None:
    # Away from the checkout, so that only what was installed can be imported.
    assert run(place / "bin/runvol", "--version", cwd="/").startswith("runvol")
    assert "csi.v1.NodePublishVolumeRequest" in run(place / "bin/python", "-c", _TRY, cwd="/")
    assert "preallocate" in run(place / "bin/runvol", "parameters", cwd="/")


def test_pip_install_from_a_clean_clone_gives_a_working_program(clone, tmp_path):
    venv.create(tmp_path / "venv", with_pip=True)
    run(tmp_path / "venv/bin/pip", "install", "-q", "--disable-pip-version-check", clone)
    works_in(tmp_path / "venv")


def test_a_built_wheel_has_the_stubs_and_their_types_and_works(clone, tmp_path):
    run(sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path, clone)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {
        "runvol_proto/csi_pb2.py",
        "runvol_proto/csi_pb2.pyi",
        "runvol_proto/py.typed",
        "runvol_proto/kata_agent_pb2.py",
    } <= set(names)
    assert not [name for name in names if name.startswith("tests/")]
    # The dependencies are those of this environment: that they are declared is what the clean clone shows.
    venv.create(tmp_path / "venv", with_pip=True)
    place = Path(
        run(tmp_path / "venv/bin/python", "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])").strip()
    )
    (place / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    run(tmp_path / "venv/bin/pip", "install", "-q", "--disable-pip-version-check", "--no-deps", "--no-index", wheel)
    where = run(tmp_path / "venv/bin/python", "-c", "import csi; print(csi.__file__)", cwd="/")
    assert where.startswith(str(place))
    works_in(tmp_path / "venv")


def test_a_source_distribution_has_what_an_installation_copies_and_the_pages(clone, tmp_path):
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", tmp_path, clone)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    tracked = run("git", "ls-files", cwd=ROOT).splitlines()
    needed = {
        name for name in tracked if name.startswith(("deploy/", "docs/")) or ("/" not in name and name.endswith(".md"))
    }
    assert len(needed) > 60 and needed - names == set()


def test_no_generated_file_is_tracked():
    tracked = run("git", "ls-files", cwd=ROOT)
    assert "_pb2" not in tracked and "egg-info" not in tracked and "runvol_proto/" not in tracked
