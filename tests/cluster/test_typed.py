"""What the pages have people type for kubectl, Helm and ctr: these programs know the words and options. No cluster is
asked: with `--help` each reads its command line and does nothing."""

from __future__ import annotations

import re
import subprocess

import pytest

from tests.cluster import programs
from tests.documents import ROOT, Typed, commands

pytestmark = pytest.mark.usefixtures("built")
TYPED = list({one.words: one for one in commands() if one.program in ("kubectl", "helm", "ctr")}.values())


def known(program: str, words: list[str]) -> bool:
    return (
        subprocess.run([programs.program(program), *words, "--help"], capture_output=True, check=False).returncode == 0
    )


@pytest.mark.parametrize("one", TYPED, ids=lambda one: f"{one.page}: {one.text}")
def test_the_program_knows_what_is_typed(one: Typed) -> None:
    words = list(one.words[1:])
    words = words[: words.index("--")] if "--" in words else words
    # ctr takes a name behind its words for one that help is asked for.
    if one.program == "ctr" and re.fullmatch(r"[A-Z]+", words[-1]):
        words.pop()
    assert known(one.program, words)


@pytest.mark.parametrize("program", ["kubectl", "helm", "ctr"])
def test_an_option_that_is_not_known_is_told(program: str) -> None:
    verb = {"kubectl": ["get"], "helm": ["install"], "ctr": ["images", "check"]}[program]
    assert known(program, verb) and not known(program, [*verb, "--no-such-option"])


def test_the_chart_passes_helms_own_look() -> None:
    subprocess.run([programs.program("helm"), "lint", "--strict", "deploy/helm/runvol"], check=True, cwd=ROOT)
