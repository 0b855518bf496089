"""The kernel's proof that nobody has a device, against real holders."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from blockdev import DeviceBusy, exclusivity, filesystems, loops, mounts

pytestmark = pytest.mark.kernel

_HOLD = "import os,sys,time; fd=os.open(sys.argv[1], {flags}); print('open', flush=True); time.sleep(60)"


def hold(path, flags="os.O_RDWR", prefix=()):
    process = subprocess.Popen([*prefix, sys.executable, "-c", _HOLD.format(flags=flags), path], stdout=subprocess.PIPE)
    process.stdout.readline()
    return process


def test_a_file_that_nobody_has_open_is_free(image):
    exclusivity.prove_free(image(), past_known=False)


@pytest.mark.parametrize("flags", ["os.O_RDWR", "os.O_RDONLY", "os.O_WRONLY"])
def test_a_process_with_the_file_open_is_named(image, flags):
    path = image()
    holder = hold(path, flags)
    try:
        with pytest.raises(DeviceBusy, match=f"pid {holder.pid}"):
            exclusivity.prove_free(path, past_known=True)
    finally:
        holder.kill()
        holder.wait()
    exclusivity.prove_free(path, past_known=False)


def test_a_holder_in_another_pid_and_mount_namespace_is_seen(image):
    path = image()
    holder = hold(path, prefix=("unshare", "--pid", "--mount", "--fork", "--kill-child"))
    try:
        assert not exclusivity.is_free(path)
    finally:
        holder.kill()
        holder.wait()


def test_a_loop_device_on_the_file_counts_although_no_process_has_it_open(image, soon):
    path = image()
    device = loops.attach(path, deadline=soon)
    with pytest.raises(DeviceBusy, match=device):
        exclusivity.prove_free(path, past_known=True)


def test_a_mounted_device_is_busy_and_the_place_is_named(image, mount_point, soon):
    path = image()
    filesystems.make(path, "ext4", soon)
    device = loops.attach(path, deadline=soon)
    mounts.mount(device, mount_point, "ext4", [], soon)
    with pytest.raises(DeviceBusy, match=mount_point):
        exclusivity.prove_free(device, past_known=True)


def test_a_mount_in_a_namespace_of_somebodys_own_is_found(image, mount_point, soon):
    path = image()
    filesystems.make(path, "ext4", soon)
    device = loops.attach(path, deadline=soon)
    process = subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", f"mount {device} {mount_point} && echo mounted && exec sleep 60"],
        stdout=subprocess.PIPE,
    )
    process.stdout.readline()
    try:
        assert not mounts.is_mount_point(mount_point)
        with pytest.raises(DeviceBusy, match="mount namespace of pid"):
            exclusivity.prove_free(device, past_known=True)
    finally:
        process.kill()
        process.wait()
        soon.poll("the namespace to end", lambda: exclusivity.is_free(device, past_known=True))


def test_a_block_node_that_a_vmm_has_open_without_o_excl_needs_the_look_at_processes(image, soon):
    device = loops.attach(image(), deadline=soon)
    holder = hold(device)
    try:
        exclusivity.prove_free(device, past_known=True)  # O_EXCL alone cannot see it
        with pytest.raises(DeviceBusy, match=f"pid {holder.pid}"):
            exclusivity.prove_free(device, past_known=False)
    finally:
        holder.kill()
        holder.wait()


def test_the_question_leaves_no_lease_behind(image):
    path = image()
    exclusivity.prove_free(path, past_known=False)
    fd = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    os.close(fd)
