"""A kernel that runs SELinux, without a policy and with one: what it makes of the labels that it is told."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from tests import ganesha
from tests.kernel import selinux_policy
from tests.kernel.__main__ import ROOT, compile_all
from tests.kernel.uml import Machine


@pytest.mark.kernel
def test_a_kernel_with_selinux_mounts_volumes_with_the_pods_labels(tmp_path: Path) -> None:
    """In a kernel of its own: no policy is ever taken back."""
    compile_all()
    policy = selinux_policy.compiled(tmp_path)
    with Machine() as machine:
        shutil.copy(policy, machine.jobs / "policy.bin")
        tools = f"RUNVOL_NFS={ganesha.tree()}"
        script = f"cd {ROOT} && exec env {tools} {sys.executable} -m tests.kernel.inside_selinux /mnt/jobs/policy.bin"
        said = machine.run(script, limit=400).output
    assert said.splitlines()[-1] == "all seen", said
