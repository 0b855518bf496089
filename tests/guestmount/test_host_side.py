"""Paths from requests, the placeholder, and a pod's group, on the real kernel."""

from __future__ import annotations

import os
import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockdev import MountFailed, filesystems, mounts
from blockdev.detached import private_mount
from guestmount import BadRequest, groups, paths, placeholder

pytestmark = pytest.mark.kernel


@pytest.mark.parametrize(
    ("path", "words"),
    [("", "must be given"), ("relative", "absolute"), ("/other/x", "lie under"), ("{root}", "lie under"), ("{root}/../x", "plain"),
     ("{root}/a/", "plain"), ("{root}//a", "plain"), ("{root}/./a", "plain"), ("/{root}/a", "plain"), ("{root}/a\0b", "control"),
     ("{root}/a\nb", "control"), ("{root}/" + "x" * 5000, "longer"), ("{root}-evil/a", "lie under")],
)  # fmt: skip
def test_a_path_that_is_not_plain_and_ours_is_refused_with_field_and_rule(tmp_path, path, words):
    with pytest.raises(BadRequest, match=rf"target_path.*{words}"):
        paths.check("target_path", path.replace("{root}", str(tmp_path)), [str(tmp_path)])


def test_a_link_that_leads_out_is_refused(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    (root / "link").symlink_to(outside)
    (root / "target").symlink_to(outside / "x")
    with pytest.raises(BadRequest, match="symbolic link"):
        paths.check("target_path", str(root / "link" / "x"), [str(root)])
    with pytest.raises(BadRequest, match="symbolic link"):
        paths.check("target_path", str(root / "target"), [str(root)])
    (root / "inside").mkdir()
    (root / "fine").symlink_to(root / "inside")
    assert paths.check("target_path", str(root / "fine" / "x"), [str(root)])


def test_a_root_that_is_itself_a_link_is_fine(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "kubelet").symlink_to(tmp_path / "real")
    assert paths.check("target_path", str(tmp_path / "kubelet" / "x"), [str(tmp_path / "kubelet")])


@given(st.text(max_size=60))
def test_any_text_is_either_a_plain_path_under_the_root_or_refused(text):
    try:
        path = paths.check("target_path", text, ["/var/lib/kubelet"])
    except BadRequest as error:
        assert "target_path" in str(error)
    else:
        assert path == text and os.path.normpath(path) == path and path.startswith("/var/lib/kubelet/")


@pytest.fixture
def target(tmp_path, soon):
    path = tmp_path / "target"
    path.mkdir()
    yield str(path)
    mounts.be_unmounted(str(path), soon)


def test_the_placeholder_refuses_writes_and_says_what_it_is(target, soon):
    placeholder.be_placed(target, soon)
    assert placeholder.stands(target)
    for attempt in (lambda: open(f"{target}/x", "w"), lambda: os.mkdir(f"{target}/d"), lambda: os.chmod(target, 0o777),
                    lambda: os.unlink(f"{target}/{placeholder.NOTE}")):  # fmt: skip
        with pytest.raises(OSError, match="Read-only"):
            attempt()
    with open(f"{target}/{placeholder.NOTE}") as note:
        assert "runvol doctor" in note.read()


def test_placing_it_again_changes_nothing(target, soon):
    placeholder.be_placed(target, soon)
    before = os.stat(target).st_dev
    placeholder.be_placed(target, soon)
    assert os.stat(target).st_dev == before
    mounts.be_absent(target, soon)
    assert not os.path.exists(target)


def test_somebody_elses_mount_is_not_covered(target, soon):
    mounts.mount("none", target, "tmpfs", [], soon)
    with pytest.raises(MountFailed, match="something else is mounted"):
        placeholder.be_placed(target, soon)


def test_a_bind_of_the_placeholder_is_read_only_too(target, tmp_path, soon):
    """What containerd does with it for a runtime that ignores the hand-off."""
    placeholder.be_placed(target, soon)
    other = tmp_path / "bind"
    other.mkdir()
    mounts.bind(target, str(other), read_only=False)
    with pytest.raises(OSError, match="Read-only"):
        open(other / "x", "w").close()
    mounts.be_unmounted(str(other), soon)


@pytest.fixture
def tree(tmp_path, soon):
    path = str(tmp_path / "fs.img")
    open(path, "w").close()
    os.truncate(path, 16 << 20)
    filesystems.make(path, "ext4", soon)
    with private_mount(path, "ext4", deadline=soon) as root:
        os.mkdir("dir", 0o700, dir_fd=root)
        os.close(os.open("dir/file", os.O_CREAT | os.O_WRONLY, 0o600, dir_fd=root))
        os.symlink("/etc/passwd", "link", dir_fd=root)
        yield root


def test_a_group_gets_the_whole_tree_and_links_are_not_followed(tree, soon):
    before = os.stat("/etc/passwd")
    assert groups.apply(tree, 2000, soon)
    facts = {name: os.stat(name, dir_fd=tree, follow_symlinks=False) for name in ("dir", "dir/file", "link")}
    assert {one.st_gid for one in facts.values()} == {2000} and os.fstat(tree).st_gid == 2000
    assert stat.S_IMODE(facts["dir"].st_mode) == 0o2770
    assert stat.S_IMODE(facts["dir/file"].st_mode) == 0o660
    assert os.fstat(tree).st_mode & stat.S_ISGID
    assert (before.st_gid, before.st_mode) == (os.stat("/etc/passwd").st_gid, os.stat("/etc/passwd").st_mode)


def test_a_root_that_has_the_group_already_is_left_alone(tree, soon):
    assert groups.apply(tree, 2000, soon)
    os.chown("dir/file", -1, 0, dir_fd=tree)
    assert not groups.apply(tree, 2000, soon)
    assert os.stat("dir/file", dir_fd=tree).st_gid == 0
    assert groups.apply(tree, 3000, soon)
    assert os.stat("dir/file", dir_fd=tree).st_gid == 3000
