"""Labels among mount options: parsed whole, told to the host's kernel once, and only where it runs SELinux."""

from __future__ import annotations

import pytest

from blockdev import mounts, selinux

# As kubelet writes it, with a pod's two categories.
LABEL = "system_u:object_r:container_file_t:s0:c10,c20"
QUOTED = f'context="{LABEL}"'


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """`kernel(filesystem, label)`: what it tells of itself and of this process; no label for no answer."""

    def tell(filesystem="selinuxfs", label="system_u:system_r:container_t:s0\n"):
        (tmp_path / "filesystems").write_text(f"nodev\tsysfs\nnodev\t{filesystem}\n\text4\n")
        if label is not None:
            (tmp_path / "current").write_text(label)
        monkeypatch.setattr(selinux, "_FILESYSTEMS", str(tmp_path / "filesystems"))
        monkeypatch.setattr(selinux, "_OWN_LABEL", str(tmp_path / "current"))

    return tell


@pytest.fixture
def enforcing(kernel):
    kernel()


@pytest.mark.parametrize(
    ("filesystem", "label", "on"),
    [
        ("selinuxfs", "system_u:system_r:container_t:s0:c1,c2\x00", True),
        ("selinuxfs", "u:r:t\n", True),
        # It was started with SELinux, and nobody gave it a policy: then it refuses labels.
        ("selinuxfs", "kernel\x00", False),
        ("selinuxfs", None, False),
        ("securityfs", "unconfined\n", False),
    ],
)
def test_selinux_is_on_where_the_kernel_has_a_policy(kernel, filesystem, label, on):
    kernel(filesystem, label)
    assert selinux.is_on() is on


def test_a_label_with_a_comma_stays_whole_among_others():
    words = mounts.words(f"noatime,{QUOTED},discard")
    assert words == ["noatime", QUOTED, "discard"]
    assert selinux.context_of(words) == LABEL
    assert selinux.wrong(words) is None


@pytest.mark.parametrize("flags", [("noatime",), (), ("seclabel",), ("fscontext=a:b:c",)])
def test_without_a_context_there_is_none(flags):
    assert selinux.context_of(flags) == "" and selinux.wrong(flags) is None


def test_another_kernel_is_told_no_label_of_any_kind():
    flags = ("noatime", QUOTED, "fscontext=a:b:c", 'defcontext="a:b:c"', "rootcontext=a:b:c", "nocontextual")
    assert selinux.without(flags) == ("noatime", "nocontextual")


def test_the_hosts_kernel_is_told_as_mount_does_it(enforcing):
    flags = ("noatime", QUOTED, f"context={LABEL.split(',', maxsplit=1)[0]}", "fscontext=a:b:c")
    assert selinux.of_host(flags) == flags
    # kubelet's beside the same of the PersistentVolume's: a second one is EINVAL.
    assert selinux.of_host(("context=a:b:c", "noatime", 'context="a:b:c"')) == ('context="a:b:c"', "noatime")


def test_a_kernel_without_selinux_is_told_none_since_it_knows_no_such_option(kernel):
    kernel("tmpfs", None)
    assert selinux.of_host(("noatime", QUOTED)) == ("noatime",)


@pytest.mark.parametrize(
    ("flags", "option", "words"),
    [
        (mounts.words(f"context={LABEL}"), "context=system_u:object_r:container_file_t:s0:c10", "double quotes"),
        (("context=a:b:c:s0:c1", "c2.c5"), "context=a:b:c:s0:c1", "'c2.c5'"),
        (("context=",), "context=", "user:role:type"),
        (('context=""',), 'context=""', "user:role:type"),
        (('context="a:b:c',), 'context="a:b:c', "user:role:type"),
        (('context="a:b:c"x',), 'context="a:b:c"x', "user:role:type"),
        (("context=container_file_t",), "context=container_file_t", "user:role:type"),
        (("context=a::c",), "context=a::c", "user:role:type"),
        (("rootcontext=x",), "rootcontext=x", "user:role:type"),
        (("context=a:b:c", "context=a:b:d"), "context=a:b:d", "a second label"),
    ],
)
def test_half_a_label_is_refused_by_name(flags, option, words):
    found = selinux.wrong(flags)
    assert found is not None and found[0] == option and words in found[1]


@pytest.mark.parametrize("flags", [("c10",), ("noatime", "c10"), ("context=a:b:c", "noatime", "c10")])
def test_what_follows_no_label_is_no_part_of_one(flags):
    """The kernel says itself that it knows no such option."""
    assert selinux.wrong(flags) is None
