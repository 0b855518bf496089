"""Sizes as people type them."""

from __future__ import annotations

import pytest

from runvol.sizes import parse


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("4096", 4096), ("1Ki", 1024), ("10Gi", 10 << 30), ("1.5Mi", 3 << 19), ("2k", 2000), ("1G", 10**9),
     ("7Ei", 7 << 60)],
)  # fmt: skip
def test_bytes_and_quantities(text: str, size: int) -> None:
    assert parse(text) == size


@pytest.mark.parametrize("text", ["", "-1", "10GiB", "10 Gi", "Gi", "1.5", "0x10", "1K", "1e3", "١"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="^"):
        parse(text)
