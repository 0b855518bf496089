"""kill -9 between every two steps of every call: the next start finishes or undoes, and the same call succeeds."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from blockdev import Deadline
from snapshotter.errors import AlreadyExists, NotFound
from snapshotter.model import LABEL_REF
from tests.kernel.inside.killpoints import Steps
from tests.kernel.inside.lab import MIB, Lab, in_child

_CONTENT = b"what was committed stays as it is\n" * 1000
_MOST_STEPS = 200


@dataclass(frozen=True)
class Scene:
    """What stands before the call, the call, and whether what it wanted is there."""

    before: Callable[[Lab], object]
    call: Callable[[Lab], object]
    holds: Callable[[Lab], bool]
    verity: bool = False


def _active(lab: Lab, key: str) -> bool:
    return key in lab and os.path.exists(lab.mounts(key)[0].source)


SCENES = {
    "prepare of nothing, with a new base": Scene(
        lambda lab: None,
        # Another size each time, as a base is made only once.
        lambda lab: lab.prepare("k", size=str((40 + len(lab.bases())) * MIB)),
        lambda lab: _active(lab, "k"),
    ),
    "prepare of a parent": Scene(
        lambda lab: None, lambda lab: lab.prepare("k", "layer"), lambda lab: _active(lab, "k")
    ),
    "prepare of a parent that is still mapped": Scene(
        lambda lab: (lab.prepare("a"), lab.commit("warm", "a")),
        lambda lab: lab.prepare("k", "warm"),
        lambda lab: _active(lab, "k"),
    ),
    "prepare of a larger child": Scene(
        lambda lab: None,
        lambda lab: lab.prepare("k", "layer", size=str(64 * MIB)),
        lambda lab: _active(lab, "k") and lab.stat("k").size == 64 * MIB,
    ),
    "prepare of a larger child, of what grows for all": Scene(
        lambda lab: lab.prepare("first", "layer", size=str(64 * MIB)),
        lambda lab: [lab.prepare(key, "layer", size=str(64 * MIB)) for key in ("second", "k") if key not in lab],
        lambda lab: _active(lab, "k") and lab.stat("k").size == 64 * MIB and _forgets_bases(lab),
    ),
    "view": Scene(lambda lab: None, lambda lab: lab.view("k", "layer"), lambda lab: _active(lab, "k")),
    "sealing a layer": Scene(
        lambda lab: (lab.prepare("a", "layer"), lab.commit("b", "a")),
        lambda lab: lab.seal("b"),
        lambda lab: lab.node.seals is not None and lab.node.seals.of(lab.stat("b").device) is not None,
        verity=True,
    ),
    "view of a sealed layer": Scene(
        lambda lab: lab.seal("layer"),
        lambda lab: lab.view("k", "layer"),
        lambda lab: _active(lab, "k") and lab.mounts("k")[0].source.startswith("/dev/loop"),
        verity=True,
    ),
    "remove of a sealed layer's view, and of the layer": Scene(
        lambda lab: (lab.prepare("a", "layer"), lab.commit("b", "a"), lab.seal("b"), lab.view("k", "b")),
        lambda lab: (lab.remove("k"), lab.remove("b"), lab.reap()),
        lambda lab: "b" not in lab,
        verity=True,
    ),
    "commit": Scene(
        lambda lab: lab.prepare("a", "layer"), lambda lab: lab.commit("done", "a"), lambda lab: "done" in lab
    ),
    "commit of what somebody has open": Scene(
        lambda lab: _hold(lab, lab.prepare("a", "layer")[0].source),
        lambda lab: lab.commit("done", "a"),
        lambda lab: "done" in lab and _let_go(lab),
    ),
    "commit of what somebody opens meanwhile": Scene(
        lambda lab: _hold(lab, lab.prepare("a", "layer")[0].source),
        lambda lab: _unseen(lab, lambda: lab.commit("done", "a")),
        lambda lab: "done" in lab and _let_go(lab),
    ),
    "prepare of a layer that another namespace has": Scene(
        lambda lab: _unpacked(lab, "k8s.io"),
        lambda lab: _claimed(lab, "moby"),
        lambda lab: any(name.startswith("runvol-layer/moby/") for name in lab.names()),
    ),
    "remove, and what is done behind": Scene(
        lambda lab: lab.prepare("a", "layer"),
        lambda lab: (lab.remove("a"), lab.reap()),
        lambda lab: "a" not in lab,
    ),
    "remove of a committed one": Scene(
        lambda lab: (lab.prepare("a", "layer"), lab.commit("b", "a")),
        lambda lab: (lab.remove("b"), lab.reap()),
        lambda lab: "b" not in lab,
    ),
    "mounts after a reboot": Scene(
        lambda lab: (lab.prepare("k", "layer"), lab.reboot()),
        lambda lab: lab.mounts("k"),
        lambda lab: _active(lab, "k"),
    ),
    "unmapping what is idle": Scene(
        lambda lab: lab.prepare("k", "layer"),
        lambda lab: (lab.mounts("k"), lab.reap_idle()),
        lambda lab: _active(lab, "k"),
    ),
    "unmapping an idle view of a sealed layer": Scene(
        lambda lab: (lab.seal("layer"), lab.view("k", "layer")),
        lambda lab: (lab.mounts("k"), lab.reap_idle()),
        lambda lab: _active(lab, "k") and lab.mounts("k")[0].source.startswith("/dev/loop"),
        verity=True,
    ),
    "shortening the kernel's list": Scene(
        lambda lab: (lab.prepare("k", "layer"), lab.reap_idle()),
        lambda lab: (lab.mounts("k"), lab.reap_idle(), setattr(lab.node.reaper.entries, "kept", 0), lab.reap()),
        lambda lab: _active(lab, "k"),
    ),
    "a start": Scene(
        lambda lab: (lab.prepare("k", "layer"), lab.prepare("gone", "layer"), lab.remove("gone")),
        lambda lab: (lab.restart(), lab.reap()),
        lambda lab: _active(lab, "k"),
    ),
    "a start after a reboot": Scene(
        lambda lab: lab.prepare("k", "layer"),
        lambda lab: lab.reboot(),
        lambda lab: _active(lab, "k"),
    ),
    "extending": Scene(
        lambda lab: None,
        lambda lab: lab.extender().extend("data", 16 * MIB, _soon()),
        lambda lab: lab.status().data_total > 256 * 16,
    ),
}


_CHAIN = f"sha256:{'a' * 64}"


def _unpacked(lab: Lab, namespace: str) -> None:
    lab.prepare("extract")
    lab.commit(f"{namespace}/8/{_CHAIN}", "extract")


def _claimed(lab: Lab, namespace: str) -> None:
    with pytest.raises(AlreadyExists):
        lab.node.snapshots.prepare(f"{namespace}/7/x", "", {LABEL_REF: _CHAIN}, Deadline.after(60))


def _forgets_bases(lab: Lab) -> bool:
    lab.node.bases.unused_after, lab.node.bases._looked = 0, -1e9
    lab.reap()
    return True


_HELD: dict[Path, int] = {}


def _hold(lab: Lab, path: str) -> None:
    _HELD[lab.directory] = os.open(path, os.O_RDWR)


def _let_go(lab: Lab) -> bool:
    os.close(_HELD.pop(lab.directory))
    return True


def _unseen(lab: Lab, work: Callable[[], object]) -> None:
    """As if nobody had it open at the first look."""
    seen = lab.node.pool.in_use
    lab.node.pool.in_use = lambda _device: False  # type: ignore[method-assign]
    try:
        work()
    finally:
        lab.node.pool.in_use = seen  # type: ignore[method-assign]


def _soon() -> object:
    from tests.kernel.inside.lab import soon

    return soon()


# Whose steps are mostly another one's.
_LONG = (
    "prepare of a parent that is still mapped", "prepare of a larger child", "view of a sealed layer",
    "remove of a sealed layer's view, and of the layer", "commit of what somebody has open",
    "prepare of a layer that another namespace has", "unmapping an idle view of a sealed layer",
    "remove of a committed one", "a start",
)  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long) if name in _LONG else name for name in SCENES]
)
def test_a_kill_in_front_of_every_step_loses_and_leaks_nothing(
    make_lab: Callable[..., Lab], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    scene = SCENES[name]
    lab = make_lab(verity=scene.verity)
    lab.layer("layer", files={"content": _CONTENT})
    points = 0
    for number in range(1, _MOST_STEPS):
        scene.before(lab)
        lab.stop()
        status = in_child(partial(_die, lab, scene, number))
        lab.start()
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGKILL
            points += 1
            # The call may have ended before the kill, as far as anybody can see.
            with contextlib.suppress(AlreadyExists, NotFound):
                scene.call(lab)
            if name.startswith("remove of a sealed"):
                with contextlib.suppress(NotFound):
                    lab.remove("b")
        else:
            assert status == 0, "the call failed by itself"
        assert scene.holds(lab), f"after a kill in front of step {number} of {name}"
        _clear(lab)
        assert not lab.leaks(), f"after a kill in front of step {number} of {name}"
        assert lab.read("layer", "content") == _CONTENT
        assert not lab.node.store.quarantined(), "what is ours was not known to be ours"
        if status == 0:
            break
    else:
        pytest.fail(f"{name} has more than {_MOST_STEPS} steps")
    with capsys.disabled():
        print(f"\n  {name}: {points} kill points, 0 leaks, 0 losses ", end="")
    assert points > 0


def _die(lab: Lab, scene: Scene, number: int) -> None:
    lab.start(recover=False)
    steps = Steps(number)
    steps.install()
    scene.call(lab)


def _clear(lab: Lab) -> None:
    """Remove everything but the layer, children first."""
    while others := [key for key in lab.names() if key != "layer"]:
        for key in others:
            if not lab.node.store.children(key):
                lab.remove(key)
    lab.reap()


def test_making_a_pool_is_finished_by_the_same_call(tmp_path: Path) -> None:
    for number in range(1, 40):
        directory = tmp_path / str(number)
        status = in_child(partial(_die_making, directory, number))
        # The first call may have ended before the kill, and then there is a pool.
        lab = Lab(directory, made=(directory / "state" / "pool.made").exists())
        try:
            lab.prepare("k")
            assert lab.ids() == {lab.stat("k").device, *lab.bases()}
        finally:
            lab.destroy()
        if status == 0:
            break
    else:
        pytest.fail("too many steps")
    assert number > 4


def _die_making(directory: Path, number: int) -> None:
    Steps(number).install()
    Lab.make_pool(directory)
