"""A small pool of its own for each test, taken apart afterwards; whatever stays mapped is an error of that test."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blockdev.devicemapper import Mapper
from tests.kernel.inside.lab import Lab


_mine: dict[str, bool] = {}
# Whether it is the round that has all, as `make test-long` runs it.
_IS_LONG = int(os.environ.get("RUNVOL_SUITES", "1")) > 1
# What takes minutes, the longest first, as the table at the end says.
_LONG = ("test_crashes.py", "test_nfs_archives.py", "test_lost_store.py", "test_nri.py", "test_containerd.py",
         "test_past_crashes.py", "test_many.py", "test_gauge.py", "test_nfs_sanity.py", "test_faults_model.py",
         "test_nfs.py", "test_images.py", "test_conformance.py")  # fmt: skip


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of machines that share the tests, the first ones begin with what takes longest, so that they end together."""
    if not _IS_LONG:
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("long")])
        items[:] = [item for item in items if not item.get_closest_marker("long")]
    machine = os.environ.get("RUNVOL_MACHINE")
    if machine is not None:
        files = list(dict.fromkeys(item.path for item in items))
        turn = int(machine) * len(files) // 2
        order = {path: place for place, path in enumerate(files[turn:] + files[:turn], len(_LONG))}
        order |= {path: _LONG.index(path.name) for path in files if path.name in _LONG}
        items.sort(key=lambda item: order[item.path])


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    """Whoever first makes a directory with a file's name runs its tests."""
    taken, name = os.environ.get("RUNVOL_TAKEN"), item.path.name
    if not taken:
        return None
    if name not in _mine:
        try:
            os.mkdir(os.path.join(taken, name))
            _mine[name] = True
        except FileExistsError:
            _mine[name] = False
    return None if _mine[name] else True


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Where the time went, as the tier has a budget."""
    spent: dict[str, float] = {}
    for report in (one for reports in terminalreporter.stats.values() for one in reports if hasattr(one, "duration")):
        name = os.path.basename(report.nodeid.split("::")[0])
        spent[name] = spent.get(name, 0) + report.duration
    if len(spent) > 1:
        terminalreporter.section("seconds by file")
        for name, seconds in sorted(spent.items(), key=lambda one: -one[1]):
            if seconds >= 5:
                terminalreporter.write_line(f"{seconds:7.0f}  {name}")


@pytest.fixture
def mapper() -> Iterator[Mapper]:
    with Mapper() as opened:
        before = {entry.name for entry in opened.devices()}
        yield opened
        left = {entry.name for entry in opened.devices()} - before
        for name in sorted(left):
            opened.remove(name)
        assert not left, f"left mapped: {sorted(left)}"


@pytest.fixture
def make_lab(tmp_path: Path, mapper: Mapper) -> Iterator[Callable[..., Lab]]:
    made: list[Lab] = []

    def make(**wishes: object) -> Lab:
        made.append(Lab(tmp_path / f"lab{len(made)}", **wishes))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for one in made:
        one.destroy()


@pytest.fixture
def lab(make_lab: Callable[..., Lab]) -> Lab:
    """A pool of 256 MiB with ext4 filesystems of 32 MiB."""
    return make_lab()
