"""Sizes as a person types them: bytes, or a quantity as Kubernetes writes one."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

import click

_QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]+)?)([KMGTPE]i|[kMGTPE])?\Z")
_BINARY, _DECIMAL = "KMGTPE", "kMGTPE"


def parse(text: str) -> int:
    """Bytes of `10737418240`, `10Gi` or `1.5G`. ValueError for anything else, and for a part of a byte."""
    found = _QUANTITY.match(text)
    if not found:
        raise ValueError(text)
    number, unit = Decimal(found[1]), found[2] or ""
    if unit.endswith("i"):
        number *= 1024 ** (_BINARY.index(unit[0]) + 1)
    elif unit:
        number *= 1000 ** (_DECIMAL.index(unit) + 1)
    if number != int(number):
        raise ValueError(text)
    return int(number)


class Size(click.ParamType[int]):
    """An option's value in bytes."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number, of text too."""
        if isinstance(value, int):
            return value
        try:
            return parse(value)
        except ValueError:
            self.fail(f"{value!r} is no size: bytes, or a quantity like 10Gi", param, ctx)


SIZE = Size()

__all__ = ["SIZE", "Size", "parse"]
