"""docs/json.md and docs/cli.md say what the code does."""

from __future__ import annotations

import os
import re
from pathlib import Path

import click
import pytest

from runvol import config, schemas
from runvol.cli import main

ROOT = Path(__file__).resolve().parents[2]
JSON = ROOT / "docs/json.md"
_HEAD = "## Kinds\n\n"


def commands(group: click.Group, words: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], click.Command]]:
    """Every command and subcommand, with the words that name it."""
    found: list[tuple[tuple[str, ...], click.Command]] = []
    with click.Context(group) as context:
        for name in group.list_commands(context):
            command = group.get_command(context, name)
            assert command is not None
            found.append(((*words, name), command))
            if isinstance(command, click.Group):
                found += commands(command, (*words, name))
    return found


ALL = commands(main)


def test_the_kinds_are_made_from_the_schemas() -> None:
    """With RUNVOL_RECORD=1 the document is written anew."""
    head, mark, made = JSON.read_text().partition(_HEAD)
    if os.environ.get("RUNVOL_RECORD"):
        JSON.write_text(f"{head}{mark}{schemas.document()}")
    else:
        assert made == schemas.document(), "RUNVOL_RECORD=1 writes it anew"


def test_every_kind_and_every_command_with_json_is_in_the_table() -> None:
    rows = re.findall(r"^\| (`.*`) \| `(\w+)List` \|$", JSON.read_text(), re.MULTILINE)
    assert sorted(kind for _, kind in rows) == sorted(kind.__name__ for kind in schemas.kinds())
    named = {tuple(word for word in one.split() if not word.startswith("--"))
             for told, _ in rows for one in re.findall(r"`([^`]+)`", told)}  # fmt: skip
    takes = {words for words, command in ALL if any(one.name == "as_json" for one in command.params)}
    assert named == takes


@pytest.mark.parametrize("words", [(), *(words for words, _ in ALL)], ids=" ".join)
def test_a_help_is_whole_sentences_in_80_columns(words: tuple[str, ...]) -> None:
    command: click.Command = dict(ALL).get(words, main)
    with click.Context(command, info_name=" ".join(("runvol", *words)), terminal_width=80) as context:
        text = command.get_help(context)
    usage, _, rest = text.partition("\n\n")
    assert "..." not in rest, "cut"
    assert all(len(line) <= 80 for line in text.splitlines())
    assert command.help and command.help.strip().split("\n\n")[0].rstrip().endswith(".")
    if words:
        assert command.short_help and command.short_help.endswith(".") and len(command.short_help) <= 50
    for one in command.params:
        if isinstance(one, click.Option) and not one.hidden:
            assert one.help and one.help.endswith((".", ")", "…", "own.")), f"{one.name}: {one.help!r}"
        elif isinstance(one, click.Argument):
            name = re.sub(r"\W*\.\.\.|[\[\]]", "", one.make_metavar(context)).split("|")[0]
            assert name.upper() in (command.help or "").upper() or "/" in name, f"{one.name} is not spoken of"
            assert usage


def test_the_example_of_settings_is_one(tmp_path: Path) -> None:
    (example,) = re.findall(r"```toml\n(.*?)```", (ROOT / "docs/cli.md").read_text(), re.DOTALL)
    file = tmp_path / "runvol.toml"
    file.write_text(example)
    loaded = config.load(file=str(file), environment={})
    assert loaded.number("loop.capacity_bytes") == 500 << 30
    assert loaded.text("detect.kubeconfig") == "/etc/kubernetes/kubelet.conf"
