"""The cluster that the tests of this room share; one that does harm to a cluster for good has its own."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.cluster import programs
from tests.cluster.cluster import Cluster


@pytest.fixture(scope="session")
def built() -> None:
    """Without the programs a test is skipped, but not where this tier was asked for."""
    if missing := programs.missing():
        if os.environ.get("RUNVOL_CLUSTER_TIER") == "1":
            pytest.fail(f"{programs.NOT_BUILT} (missing: {', '.join(missing)})")
        pytest.skip(programs.NOT_BUILT)


@pytest.fixture(scope="session")
def cluster(built: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster with one node, node1, which runs all session long."""
    with Cluster(tmp_path_factory.mktemp("cluster")) as running:
        yield running
    assert running.left() == []
