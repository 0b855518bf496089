"""What there is, for a person or, with `--json`, for a program.

A terminal gets a table where its rows, or all but a sentence at their end, fit, else `key = value` lines; a pipe gets a
line for each row, however long. No cell is cut, and no line ends in blanks.
"""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import TypeVar

import click

from blockdev.printable import printable
from runvol import schemas

T = TypeVar("T", bound=schemas.Item)
# A key of the item, or a title with what stands below it.
Columns = Sequence[str | tuple[str, Callable[[T], object]]]
_GAP = "  "
_WIDTH = 80
# What a column of sentences needs, to be read.
_NARROW = 30


def show(kind: type[T], items: Sequence[T], columns: Columns[T], *, as_json: bool, empty: str) -> None:
    """Print all of the items: their columns for a person, everything for a program."""
    if as_json:
        print_json(kind, items)
    elif not items:
        line(empty)
    else:
        titles = [(one if isinstance(one, str) else one[0]).replace("_", " ") for one in columns]
        rows = [[text(_cell(one, column)) for column in columns] for one in items]
        click.echo("\n".join(_table(titles, rows)))


def _cell(item: T, column: str | tuple[str, Callable[[T], object]]) -> object:
    return getattr(item, column) if isinstance(column, str) else column[1](item)


def print_json(kind: type[schemas.Item], items: Sequence[schemas.Item]) -> None:
    """The envelope alone."""
    click.echo(schemas.written(kind, items))


def line(sentence: str, *, err: bool = False) -> None:
    """A sentence, in which names are that others gave. What has line feeds has lines."""
    click.echo(printable(sentence, lines=True), err=err)


def warn(sentence: object) -> None:
    """Beside what a command tells."""
    line(f"warning: {sentence}", err=True)


def tell(done: Sequence[schemas.Outcome], *, as_json: bool) -> None:
    """What was done: the sentences, or all of it."""
    if as_json:
        print_json(schemas.Outcome, done)
        return
    for one in done:
        line(one.message)


def text(value: object) -> str:
    """A cell: `-` for what is not there, and no line of its own for anything in it."""
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return printable(",".join(map(str, value)).replace("\n", " ")) or "-"
    return printable(str(value).replace("\n", " "))


def definitions(entries: Sequence[tuple[str, Sequence[str]]]) -> None:
    """`key = value`, and below it, indented, sentences about it, within 80 columns."""
    lines = []
    for head, sentences in entries:
        lines.append(head)
        for one in sentences:
            lines += textwrap.wrap(one, _WIDTH, initial_indent="    ", subsequent_indent="    ",
                                   break_long_words=False, break_on_hyphens=False)  # fmt: skip
    line("\n".join(lines))


def say(sentence: str) -> None:
    """A sentence among a listing, which goes on below, indented, where a terminal ends."""
    lines = [sentence]
    if sys.stdout.isatty():
        lines = textwrap.wrap(sentence, shutil.get_terminal_size().columns, subsequent_indent="    ",
                              break_long_words=False, break_on_hyphens=False)  # fmt: skip
    line("\n".join(lines))


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    heads = [title.upper() for title in titles]
    widths = [max(len(one) for one in column) for column in zip(heads, *rows, strict=True)]
    before = sum(widths[:-1]) + len(_GAP) * (len(widths) - 1)
    columns = shutil.get_terminal_size().columns
    if not sys.stdout.isatty() or before + widths[-1] <= columns:
        return [_line(row, widths) for row in [heads, *rows]]
    # A sentence at the end goes on below itself.
    if columns - before >= _NARROW and all(len(word) <= columns - before for row in rows for word in row[-1].split()):
        return [line for row in [heads, *rows] for line in _folded(row, widths, columns - before)]
    return "\n\n".join("\n".join(_block(titles, row, columns)) for row in rows).split("\n")


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    return _GAP.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _folded(row: Sequence[str], widths: Sequence[int], width: int) -> list[str]:
    first, *more = textwrap.wrap(row[-1], width, break_long_words=False, break_on_hyphens=False)
    return [_line([*row[:-1], first], widths), *(_line([*[""] * (len(row) - 1), one], widths) for one in more)]


def _block(titles: Sequence[str], row: Sequence[str], columns: int) -> list[str]:
    """One row as lines; a sentence goes on below, indented."""
    lines = []
    for title, cell in zip(titles, row, strict=True):
        if cell != "-":
            lines += textwrap.wrap(f"{title} = {cell}", columns, subsequent_indent="    ", break_long_words=False,
                                   break_on_hyphens=False)  # fmt: skip
    return lines
