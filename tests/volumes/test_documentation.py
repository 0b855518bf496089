"""The documentation's tables are the code's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from runvol.config import BACKENDS
from tests.documents import PAGES
from volumes.parameters import TABLE
from volumes.registry import NAMES

ROOT = Path(__file__).resolve().parents[2]


def test_the_storage_class_reference_is_made_from_the_table():
    text = (ROOT / "docs/storageclass.md").read_text()
    for one in TABLE:
        assert f"| `{one.key}` | {one.values} | {one.default} | {one.meaning} |" in text


def test_the_setting_knows_every_backend_that_a_class_can_name():
    assert BACKENDS == NAMES


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        place = (page.parent / file).resolve() if file else page
        assert place.exists(), target
        assert not anchor or anchor in anchors(place), target


def test_every_page_is_linked_from_the_readme() -> None:
    linked = set(re.findall(r"\]\(([^)#\s]+)[^)]*\)", (ROOT / "README.md").read_text()))
    pages = {str(page.relative_to(ROOT)) for page in PAGES} - {"README.md", "docs/measured/README.md"}
    assert pages - linked == set()
