"""Sizes as a person types and reads them: bytes, or a quantity as Kubernetes writes one."""

from __future__ import annotations

import re

_QUANTITY = re.compile(r"([0-9]+)(?:\.([0-9]+))?([KMGTPE]i|[kMGTPE])?\Z", re.ASCII)
_BINARY, _DECIMAL = "KMGTPE", "kMGTPE"
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
# What Linux, SQLite and CSI count in.
MOST = (1 << 63) - 1
FORM = "bytes, or a quantity like 10Gi"


def parse(text: str) -> int:
    """Bytes of `10737418240`, `10Gi` or `1.5G`. ValueError for anything else, for a part of a byte, and for more than a
    file can have."""
    found = _QUANTITY.match(text)
    if not found or len(text) > 64:
        raise ValueError(text)
    whole, part, unit = found[1], found[2] or "", found[3] or ""
    power = 0 if not unit else (_BINARY if unit.endswith("i") else _DECIMAL).index(unit[0]) + 1
    base = 1024 if unit.endswith("i") else 1000
    number: int
    number, rest = divmod(int(whole + part) * pow(base, power), 10 ** len(part))
    if rest or number > MOST:
        raise ValueError(text)
    return number


def words(count: int) -> str:
    """1073741824 is 1.0 GiB."""
    number = float(count)
    for unit in _UNITS:
        if number < 1024 or unit == _UNITS[-1]:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    raise AssertionError
