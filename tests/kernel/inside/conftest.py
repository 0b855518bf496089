"""A small pool of its own for each test, taken apart afterwards; whatever stays mapped is an error of that test."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blockdev.devicemapper import Mapper
from tests.kernel.inside.lab import Lab


_mine: dict[str, bool] = {}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of two machines that share the tests, the second begins at the end."""
    if os.environ.get("RUNVOL_MACHINE") == "1":
        files = list(dict.fromkeys(item.path for item in items))
        items.sort(key=lambda item: -files.index(item.path))


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
