"""A real Prometheus (Debian's) on the loopback, which scrapes and is asked."""

from __future__ import annotations

import json
import socket
import subprocess
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.until import until


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Prometheus:
    """Scrapes the targets every second; a context manager. `rules`: files of alerts."""

    def __init__(self, targets: Mapping[str, Sequence[str]], rules: Sequence[Path] = ()) -> None:
        """`targets`: addresses, by job."""
        self._place = tempfile.TemporaryDirectory(prefix="rv-prometheus-")
        self.port = free_port()
        config = {
            "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(path) for path in rules],
            "scrape_configs": [
                {"job_name": job, "honor_labels": True, "static_configs": [{"targets": list(addresses)}]}
                for job, addresses in targets.items()
            ],
        }
        self._config = Path(self._place.name) / "prometheus.yml"
        self._config.write_text(json.dumps(config))  # JSON is YAML
        self.log = Path(self._place.name) / "log"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Prometheus:
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                ["prometheus", f"--config.file={self._config}", f"--web.listen-address=127.0.0.1:{self.port}",
                 f"--storage.tsdb.path={self._place.name}/data", "--log.level=warn"],
                stdout=log, stderr=log,
            )  # fmt: skip
        until(self._ready, 30)
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(20)
        self._place.cleanup()

    def _ready(self) -> bool:
        assert self._process is not None and self._process.poll() is None, self.log.read_text()
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/-/ready", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def _ask(self, path: str, **query: Any) -> Any:
        address = f"http://127.0.0.1:{self.port}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(address, timeout=10) as answer:
            return json.loads(answer.read())["data"]

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """The vector now: labels and value of each."""
        return [(one["metric"], float(one["value"][1])) for one in self._ask("query", query=expression)["result"]]

    def value(self, expression: str) -> float:
        """Of an expression that has one; 0 where there is none."""
        found = self.query(expression)
        assert len(found) < 2, found
        return found[0][1] if found else 0.0

    def series(self, expression: str, seconds: float, step: float = 1.0) -> list[dict[str, Any]]:
        """The last so many seconds, as Prometheus has them."""
        now = time.time()
        found: list[dict[str, Any]] = self._ask(
            "query_range", query=expression, start=now - seconds, end=now, step=step
        )["result"]
        return found

    def targets(self) -> list[dict[str, Any]]:
        """What is scraped, and how that goes."""
        found: list[dict[str, Any]] = self._ask("targets")["activeTargets"]
        return found
