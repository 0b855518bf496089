"""Settings of the snapshotter that cannot work are refused at start, by name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from blockdev import filesystems
from runvol import config
from runvol.config import ConfigError
from runvol.serve_snapshots import settings_of

WRONG = [
    ({"namespace_sizes": "k8s.io=1"}, "namespace_sizes = 'k8s.io=1' (from flag): an ext4 filesystem has 8388608 to"),
    ({"namespace_sizes": "k8s.io=8388608", "fstype": "xfs"}, "'k8s.io=8388608' (from flag): an xfs filesystem has 314572800 to"),
    ({"namespace_sizes": f"k8s.io={(1 << 50) + 1}"}, f"'k8s.io={(1 << 50) + 1}' (from flag): an ext4 filesystem has"),
    ({"namespace_sizes": "k8s.io=²"}, "takes NAMESPACE=SIZE; a size is bytes, or a quantity like 10Gi"),
    ({"namespace_sizes": "k8s/io=8388608"}, "no namespace of the name 'k8s/io'"),
    ({"namespace_sizes": "=8388608"}, "no namespace of the name ''"),
    ({"namespace_sizes": "a=8388608,a=9000000"}, "a has a size already"),
    ({"size_bytes": "8388608", "fstype": "xfs"}, "snapshotter.size_bytes = 8388608 (from flag): an xfs filesystem has 314572800"),
    ({"unmap_idle_seconds": "59"}, "unmap_idle_seconds = 59 (from flag): must not be below snapshotter.call_seconds = 60"),
    ({"fstype": "btrfs"}, "takes ext4, xfs"),
    ({"images": "share"}, "must be an absolute path"),
    ({"gauge": "gauge"}, "snapshotter.gauge = 'gauge' (from flag): must be a plain absolute path, `auto`, or empty"),
    ({"gauge": "/a/../b"}, "must be a plain absolute path"),
    ({"gauge": "/"}, "must be a plain absolute path"),
]  # fmt: skip


def flags(given: dict[str, str]) -> dict[str, str]:
    return {f"snapshotter.{key}": value for key, value in given.items()}


@pytest.mark.parametrize(("given", "said"), WRONG)
def test_what_cannot_work_is_refused(given: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.load(file=None, flags=flags(given), environment={})
    assert said in str(caught.value)


def test_what_works_is_taken() -> None:
    loaded = config.load(
        file=None, environment={}, flags=flags({"namespace_sizes": "k8s.io=8388608,a.b=9000000", "call_seconds": "900"})
    )
    found = settings_of(loaded)
    assert found.by_namespace == {"k8s.io": 8388608, "a.b": 9000000}
    # The default is never below what a call may take.
    assert found.unmap_idle == 900
    never = config.load(file=None, environment={}, flags=flags({"unmap_idle_seconds": "0"}))
    assert settings_of(never).unmap_idle == 0


@pytest.mark.parametrize(
    ("said", "place"), [(None, "/s/gauge"), ("auto", "/s/gauge"), ("/run/gauge", "/run/gauge"), ("", "")]
)
def test_where_the_gauge_is(said: str | None, place: str) -> None:
    given = {"snapshotter.state_dir": "/s"} | ({} if said is None else {"snapshotter.gauge": said})
    assert settings_of(config.load(file=None, environment={}, flags=given)).gauge == place


def test_the_smallest_sizes_are_those_of_the_filesystems() -> None:
    assert filesystems.SMALLEST == config.SMALLEST


@pytest.mark.parametrize("kind", ["nothing", "file"])
def test_a_directory_of_images_that_is_none_keeps_the_service_from_starting(kind: str, tmp_path: Path) -> None:
    place = tmp_path / "images"
    if kind == "file":
        place.write_text("")
    said = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-m", "runvol", "snapshotter", "--endpoint", f"unix://{tmp_path}/s.sock"],
            env={"PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "RUNVOL_SNAPSHOTTER_IMAGES": str(place),
                 "RUNVOL_SNAPSHOTTER_STATE_DIR": str(tmp_path / "state")},
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 2
        said.append(done.stderr)
    assert said[0] == said[1]
    word = "does not exist" if kind == "nothing" else "is no directory"
    assert f"snapshotter.images = '{place}' (from RUNVOL_SNAPSHOTTER_IMAGES): {word}" in said[0]
