"""What the NRI plugin counts, and that it stands in the table."""

from __future__ import annotations

import urllib.request
from pathlib import Path

from guestmount import Claims, nri, nri_metrics
from runvol import metric_table
from runvol_proto import nri_pb2 as pb
from tests.monitoring.prometheus import free_port


def test_containers_are_counted_by_what_became_of_them(tmp_path: Path) -> None:
    book, port = nri_metrics.Book(), free_port()
    plugin = nri.Plugin(Claims(str(tmp_path)), None, book)
    request = pb.CreateContainerRequest()
    request.container.name = "c"
    for _ in range(3):
        plugin.CreateContainer(request)
    book.answered(nri_metrics.REFUSED, 3.0)  # longer than every bound
    nri_metrics.serve(f"127.0.0.1:{port}", version="1", book=book, connected=lambda: True)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    assert 'runvol_nri_containers_total{outcome="unchanged"} 3.0' in text
    assert 'runvol_nri_containers_total{outcome="refused"} 1.0' in text
    # A Prometheus sees only what rises from a number to another one.
    assert 'runvol_nri_containers_total{outcome="placeholder"} 0.0' in text
    assert "runvol_nri_connected 1.0" in text
    assert "runvol_nri_call_seconds_count 4.0" in text
    assert 'runvol_nri_call_seconds_bucket{le="2.0"} 3.0' in text
    names = {line.split("{")[0].split(" ")[0] for line in text.splitlines() if line.startswith("runvol_")}
    assert names <= metric_table.sample_names()
