"""Fixtures that many rooms share, and two guards: no silent skip, and no test that quietly disappears."""

from __future__ import annotations

import fnmatch
import os

# Tests fork (mkfs) in a process that has gRPC channels; its fork handlers would abort the child.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

import ctypes
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockdev import Deadline
from tests.allowed_skips import ALLOWED
from tests.driver import Driver

RECORDS = {
    "tests": Path(__file__).with_name("recorded.txt"),
    "tests/kernel/inside": Path(__file__).parent / "kernel" / "recorded.txt",
}


@pytest.fixture
def soon() -> Deadline:
    """A deadline that no healthy call reaches."""
    return Deadline.after(20)


@pytest.fixture
def driver() -> Iterator[Driver]:
    """The real driver on a socket of its own; whatever a test leaves is an error of that test."""
    with Driver() as running:
        yield running
        left = [*running.mounts(), *running.loop_devices()]
        assert not left, f"left on the node: {left}"


@pytest.fixture(scope="session")
def shared_driver() -> Iterator[Driver]:
    """One driver for tests that only ask questions."""
    with Driver() as running:
        yield running


_CLONE_NEWNS = 0x20000


_kubelet: list[subprocess.Popen[bytes]] = []


def pytest_configure() -> None:
    """A worker has mounts of its own: namespaces that a test makes would copy, and so hold, those of another's tests.

    A process there stands for kubelet's.
    """
    if "PYTEST_XDIST_WORKER" in os.environ and os.geteuid() == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(_CLONE_NEWNS) != 0:
            raise OSError(ctypes.get_errno(), "unshare")
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        _kubelet.append(subprocess.Popen(["cat"], stdin=subprocess.PIPE))  # ends with this process
        os.environ["RUNVOL_NODE_KUBELET_PROCESS"] = str(_kubelet[0].pid)


# What takes minutes goes first, so that several workers, who share the files, end together.
LONG = ("kernel/test_tier.py", "sandbox/", "sanity/", "kernel/", "package/", "kill/")


def _place(item: pytest.Item) -> int:
    path = item.nodeid.removeprefix("tests/")
    return next((place for place, start in enumerate(LONG) if path.startswith(start)), len(LONG))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=_place)
    if os.geteuid() != 0:
        for item in items:
            item.add_marker(pytest.mark.skip(reason="needs root: loop devices and mounts"))


def _functions(items: list[pytest.Item]) -> set[str]:
    return {re.sub(r"\[.*", "", item.nodeid, flags=re.DOTALL) for item in items}


_left_to_another_tier: list[pytest.Item] = []


def pytest_deselected(items: list[pytest.Item]) -> None:
    _left_to_another_tier.extend(items)


def pytest_collection_finish(session: pytest.Session) -> None:
    """A whole run has every test that is on record; `RUNVOL_RECORD=1` writes the record anew."""
    record = RECORDS.get(" ".join(session.config.args))
    if session.config.option.keyword or session.config.option.markexpr or record is None:
        return
    found = _functions([*session.items, *_left_to_another_tier])
    if os.environ.get("RUNVOL_RECORD"):
        record.write_text("".join(f"{name}\n" for name in sorted(found)))
    missing = sorted(set(record.read_text().split("\n")) - {""} - found)
    if missing:
        raise pytest.UsageError(f"{len(missing)} recorded tests are gone: {missing[:10]}; if meant, RUNVOL_RECORD=1")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not any(fnmatch.fnmatch(report.nodeid, pattern) and words in reason for pattern, words in ALLOWED):
            terminalreporter.write_line(f"a skip that is not allowed: {report.nodeid}: {reason}", red=True)
            terminalreporter._session.exitstatus = 1  # type: ignore[union-attr]


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    for report in reporter.stats.get("skipped", []) if reporter else []:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not any(fnmatch.fnmatch(report.nodeid, pattern) and words in reason for pattern, words in ALLOWED):
            session.exitstatus = 1
