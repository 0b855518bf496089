"""docs/doctor.md has every id, as the code's table has it (written anew with RUNVOL_RECORD=1)."""

from __future__ import annotations

import os
import re

from runvol import doctor_versions
from runvol.doctor_table import TABLE
from tests.installation import ROOT

PAGE = ROOT / "docs/doctor.md"
BEGIN, END = "<!-- made from runvol/doctor_table.py -->\n", "<!-- end -->\n"


def tables() -> str:
    lines = ["| id | what it means | what to do |", "| --- | --- | --- |"]
    lines += [f"| `{name}` | {known.meaning} | {known.fix} |" for name, known in TABLE.items() if not known.is_good]
    lines += ["", "What is well has an id too:", "", "| id | what it means |", "| --- | --- |"]
    lines += [f"| `{name}` | {known.meaning} |" for name, known in TABLE.items() if known.is_good]
    return "\n".join(lines).replace('\\"', '"') + "\n"


def test_the_page_has_the_table() -> None:
    before, rest = PAGE.read_text().split(BEGIN)
    _, after = rest.split(END)
    wanted = f"{before}{BEGIN}{tables()}{END}{after}"
    if os.environ.get("RUNVOL_RECORD"):
        PAGE.write_text(wanted)
    assert PAGE.read_text() == wanted, "RUNVOL_RECORD=1 writes it anew"


def test_the_page_names_the_versions_that_were_tried() -> None:
    text = re.sub(r"\s+", " ", PAGE.read_text())
    for name, (least, most) in (
        ("Linux", doctor_versions.KERNEL), ("containerd", doctor_versions.CONTAINERD),
        ("e2fsprogs", doctor_versions.E2FSPROGS), ("Kata Containers", doctor_versions.KATA),
    ):  # fmt: skip
        assert f"{name} from {'.'.join(map(str, least))} to {'.'.join(map(str, most))}" in text


def test_each_fix_has_something_to_do() -> None:
    for name, known in TABLE.items():
        assert known.is_good or len(known.fix.split()) > 1 or "`" in known.fix, name
        assert known.fix.count("`") % 2 == 0, name
