"""Loop devices on the real kernel."""

from __future__ import annotations

import os
import subprocess
import threading

import pytest

from blockdev import Deadline, DeviceBusy, WaitExpired, filesystems, ioctls, loops, mounts

pytestmark = pytest.mark.kernel


def test_an_attached_device_has_the_files_size_and_direct_io(image, soon):
    path = image(64)
    device = loops.attach(path, deadline=soon)
    assert ioctls.is_block(device)
    assert ioctls.size_bytes(device) == 64 << 20
    backing = loops.backing(device)
    assert backing is not None and backing.direct_io and not backing.read_only


def test_a_read_only_device_refuses_writes(image, soon):
    device = loops.attach(image(), deadline=soon, read_only=True)
    assert ioctls.is_read_only(device)
    with pytest.raises(OSError), open(device, "r+b", buffering=0) as node:
        node.write(bytes(512))


def test_a_restarted_process_finds_its_device_by_the_file_even_after_a_rename(image, soon):
    path = image()
    device = loops.attach(path, deadline=soon)
    os.rename(path, path + ".renamed")
    assert loops.find(path) == []
    assert loops.find(path + ".renamed") == [device]
    loops.detach(device, path + ".renamed", soon)


@pytest.fixture
def strangers():
    """Makes a loop device as somebody does who looks inside a file; detached at the end."""
    made = []

    def make(path, *options):
        done = subprocess.run(["losetup", "--show", *options, "-f", path], capture_output=True, text=True, check=True)
        made.append(done.stdout.strip())
        return made[-1]

    yield make
    for device in made:
        subprocess.run(["losetup", "-d", device], check=False)


@pytest.mark.parametrize("options", [("-o", "1M"), ("--sizelimit", "1M"), ("-r", "-o", "4K")])
def test_a_window_on_a_file_is_not_the_whole_of_it(image, soon, strangers, options):
    path = image()
    strangers(path, *options)
    assert loops.whole(path) is None
    ours = loops.attach(path, deadline=soon)
    assert loops.whole(path) == loops.whole(path, writable=True) == ours


def test_a_read_only_device_is_taken_by_who_only_reads(image, strangers):
    path = image()
    theirs = strangers(path, "-r")
    assert loops.whole(path, writable=True) is None
    assert loops.whole(path) == theirs


@pytest.mark.parametrize("options", [["-r", "--direct-io=on"], ["-r", "-b", "4096"]])
def test_what_takes_no_small_reads_through_the_cache_is_not_taken_for_what_does(image, soon, strangers, options):
    path = image()
    theirs = strangers(path, *options)
    assert loops.whole(path, through_cache=True) is None
    assert loops.whole(path) == theirs


def test_a_whole_device_stays_although_whoever_made_it_lets_it_go(image, strangers):
    path = image()
    theirs = strangers(path)
    with open(theirs, "rb"):
        subprocess.run(["losetup", "-d", theirs], check=True)  # it clears itself at the last close
        assert loops.whole(path) == theirs
    assert loops.stands_on(theirs, path)


def test_detach_leaves_a_device_alone_that_stands_on_another_file_by_now(image, soon):
    first, second = image(), image()
    device = loops.attach(second, deadline=soon)
    loops.detach(device, first, soon)
    assert loops.stands_on(device, second)


def test_detach_can_be_repeated(image, soon):
    path = image()
    device = loops.attach(path, deadline=soon)
    loops.detach(device, path, soon)
    loops.detach(device, path, soon)
    assert loops.backing(device) is None


def test_detach_of_a_mounted_device_is_refused_with_the_place(image, mount_point, soon):
    path = image()
    filesystems.make(path, "ext4", soon)
    device = loops.attach(path, deadline=soon)
    mounts.mount(device, mount_point, "ext4", [], soon)
    with pytest.raises(DeviceBusy, match=mount_point):
        loops.detach(device, path, Deadline.after(1))
    assert loops.stands_on(device, path)


def test_a_device_grows_with_its_file(image, soon):
    path = image(16)
    device = loops.attach(path, deadline=soon)
    os.truncate(path, 32 << 20)
    loops.resize(device)
    assert ioctls.size_bytes(device) == 32 << 20


def test_many_allocators_race_and_each_gets_a_device_of_its_own(image):
    paths = [image(1) for _ in range(24)]
    devices, errors = [], []

    def attach(path):
        try:
            devices.append(loops.attach(path, deadline=Deadline.after(30)))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=attach, args=(path,)) for path in paths]
    # Another program races for the same numbers.
    other = image(1)
    rival = subprocess.Popen(
        ["sh", "-c", f"for i in 1 2 3 4 5 6 7 8; do d=$(losetup --show -f {other}) && losetup -d $d; done"]
    )
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rival.wait()
    assert not errors
    assert len(set(devices)) == len(paths)
    assert all(loops.find(path) for path in paths)


def test_a_deadline_that_is_over_attaches_nothing(image):
    path = image()
    with pytest.raises(WaitExpired):
        loops.attach(path, deadline=Deadline.after(0))
    assert loops.find(path) == []


def test_an_autoclear_device_goes_with_its_last_descriptor(image, soon):
    path = image()
    device, keeper = loops.open_private(path, deadline=soon)
    assert loops.stands_on(device, path)
    os.close(keeper)
    soon.poll("the device to clear itself", lambda: not loops.stands_on(device, path))
