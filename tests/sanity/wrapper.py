"""csi-sanity against the real server: one run a configuration, every spec as a result of its own."""

from __future__ import annotations

import functools
import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.driver import Driver
from tests.sanity import skips

VERSION = "v5.6.0"
SPECS = Path(__file__).with_name("specs.txt")
# csi-sanity's directories come from these commands, each a fresh one: a leaked mount then fails one spec, not all.
_CREATE = "#!/bin/sh\nmkdir -p {root} && mktemp -d {root}/XXXXXX\n"
_REMOVE = '#!/bin/sh\nrmdir "$1"\n'
_CHECK = '#!/bin/sh\nif [ -d "$1" ]; then echo directory; elif [ -f "$1" ]; then echo file; elif [ -e "$1" ]; then echo other; else echo not_found; fi\n'


@dataclass(frozen=True)
class Configuration:
    """`fstype`: of the volumes; a mounted ext4 can grow only where the kernel grants CAP_SYS_RESOURCE."""

    runtime: str
    access: str
    backend: str = "loop"
    # Under which name: see `csi.drivers`.
    driver: str = "nodes"

    @property
    def skips(self) -> list[str]:
        """Specs that would fail, and whose reason is on record; csi-sanity then says that it skipped them."""
        if self.backend != "loop" or self.runtime != "sandbox":
            return []
        return [f"--ginkgo.skip={spec.rsplit(' / ', 1)[1]}" for spec, _why in skips.OF_GUESTS]

    @property
    def fstype(self) -> str:
        return "xfs" if self.runtime == "runc" else "ext4"

    def __str__(self) -> str:
        return (
            f"{self.runtime}-{self.access}"
            + (f"-{self.backend}" if self.backend != "loop" else "")
            + (f"-{self.driver}" if self.driver != "nodes" else "")
        )

    @property
    def parameters(self) -> str:
        if self.backend == "directory":
            return f"runtime: {self.runtime}\nquota: none\n"
        if self.backend == "nfs":
            return (
                f"runtime: {self.runtime}\n{'' if self.driver == 'nfs' else 'backend: nfs'}\nserver: 127.0.0.1\npath: /srv/export/share\ninSandbox: share\n"
                'archiveOnDelete: "false"\n'
            )
        return f"runtime: {self.runtime}\ncsi.storage.k8s.io/fstype: {self.fstype}\n"


CONFIGURATIONS = tuple(
    Configuration(runtime, access) for runtime in ("runc", "sandbox") for access in ("mount", "block")
) + tuple(Configuration(runtime, "mount", "directory") for runtime in ("runc", "sandbox"))


@dataclass(frozen=True)
class Outcome:
    state: str
    message: str


@dataclass(frozen=True)
class Report:
    """Outcomes by spec, and what was left on the node afterwards."""

    outcomes: dict[str, Outcome]
    left_over: dict[str, list[str]]
    log: str


def binary() -> Path:
    """csi-sanity as tests/prepare/go.sh builds it; RuntimeError, with what to do, where it is not."""
    cache = Path(os.environ.get("RUNVOL_CACHE", Path.home() / ".cache" / "runvol"))
    path = cache / "bin" / f"csi-sanity-{VERSION}"
    if not path.exists():
        raise RuntimeError(f"{path} is not there; run tests/prepare/go.sh (`make test` does)")
    return path


def must_run() -> list[str]:
    """Every spec of this csi-sanity, by name."""
    return [line for line in SPECS.read_text().splitlines() if line]


@functools.cache
def run(configuration: Configuration) -> Report:
    """One run, remembered. The seed is the day's, so that a failure can be repeated."""
    tool = binary()
    with Driver(environment={"RUNVOL_VOLUMES_BACKENDS": configuration.backend}) as driver:
        commands = {}
        for name, text in (("create", _CREATE), ("remove", _REMOVE), ("check", _CHECK)):
            commands[name] = driver.directory / name
            commands[name].write_text(text.format(root=driver.kubelet / "sanity") if name == "create" else text)
            commands[name].chmod(0o755)
        parameters = driver.directory / "parameters.yaml"
        parameters.write_text(configuration.parameters)
        report = driver.directory / "report.json"
        ended = subprocess.run(
            [
                tool, "--csi.endpoint", driver.nfs_socket if configuration.driver == "nfs" else driver.socket, "--csi.mountdir", driver.kubelet / "mount",
                "--csi.stagingdir", driver.kubelet / "staging-sanity",
                "--csi.createmountpathcmd", commands["create"], "--csi.removemountpathcmd", commands["remove"],
                "--csi.createstagingpathcmd", commands["create"], "--csi.removestagingpathcmd", commands["remove"],
                "--csi.checkpathcmd", commands["check"],
                "--csi.testvolumesize", str(320 << 20), "--csi.testvolumeexpandsize", str(512 << 20),
                "--csi.testvolumeparameters", parameters, "--csi.testvolumeaccesstype", configuration.access,
                *configuration.skips,
                "--ginkgo.json-report", report, "--ginkgo.no-color", "--ginkgo.timeout", "5m",
            ],
            capture_output=True, text=True, check=False, timeout=360,
        )  # fmt: skip
        log = driver.log.read_text()
        if not report.exists():
            raise RuntimeError(
                f"csi-sanity made no report: {ended.stdout[-3000:]}{ended.stderr[-3000:]}\n{log[-3000:]}"
            )
        return Report(_outcomes(report), driver.left_over(), log)


def _outcomes(report: Path) -> dict[str, Outcome]:
    found = {}
    for suite in json.loads(report.read_text()):
        for spec in suite["SpecReports"] or []:
            if spec["LeafNodeType"] == "It":
                name = " / ".join([*spec["ContainerHierarchyTexts"], spec["LeafNodeText"]])
                found[name] = Outcome(spec["State"], spec.get("Failure", {}).get("Message", ""))
    return found
