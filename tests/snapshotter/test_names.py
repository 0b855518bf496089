"""containerd's names for snapshots, and the commands that an operator types."""

from __future__ import annotations

import shlex

import pytest

from snapshotter.names import forgetting, of_containerd


@pytest.mark.parametrize(
    ("key", "namespace", "name"),
    [
        ("k8s.io/12/sha256:ab", "k8s.io", "sha256:ab"),
        ("t/3/extract-1-x sha256:ab", "t", "extract-1-x sha256:ab"),
        ("t/3/a/b 'c'\n$(d)", "t", "a/b 'c'\n$(d)"),
        (f"runvol-layer/k8s.io/sha256:ab/{'0' * 16}", "k8s.io", "sha256:ab"),
    ],
)
def test_what_containerd_knows_is_forgotten_by_one_command(key: str, namespace: str, name: str) -> None:
    assert of_containerd(key) == (namespace, name)
    typed = shlex.split(forgetting(key))
    assert typed == ["ctr", "-n", namespace, "snapshots", "--snapshotter", "runvol", "rm", name]


@pytest.mark.parametrize("key", ["layer", "t/x/name", "/1/name", "t/1/", "runvol-images/77-1", ""])
def test_other_keys_are_not_containerds(key: str) -> None:
    assert (of_containerd(key), forgetting(key)) == (None, "")
