"""What there is, as a table for a person or as JSON for a program."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence

import click

_PIPE = 10_000
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def show(rows: Sequence[Mapping[str, object]], columns: Sequence[str], *, as_json: bool, empty: str) -> None:
    """Print `rows`; a table shows `columns` only, JSON everything."""
    if as_json:
        click.echo(json.dumps(rows, indent=2, default=str))
        return
    if not rows:
        click.echo(empty)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column.upper().replace("_", " "), overflow="fold")
    for row in rows:
        table.add_row(*(str(row.get(column, "")) for column in columns))
    # A pipe has no width: programs cut lines by columns, and an id over two lines is none.
    Console(soft_wrap=False, width=None if sys.stdout.isatty() else _PIPE).print(table)


def size(count: int) -> str:
    """1073741824 is 1.0 GiB."""
    number = float(count)
    for unit in _UNITS:
        if number < 1024 or unit == _UNITS[-1]:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    raise AssertionError
