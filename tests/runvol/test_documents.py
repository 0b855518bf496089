"""docs/json.md, docs/cli.md and docs/settings.md say what the code does."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import click
import pytest
import yaml

from runvol import config, options, schemas
from runvol.cli import main
from tests.documents import PAGES, inline

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


def _default(key: str) -> str:
    value = config.TABLE[key].default
    if key in config.FOLLOWS:
        directory, form = config.FOLLOWS[key]
        return f"`{form.format(f'<{directory}>')}`"
    if isinstance(value, tuple):
        return ", ".join(f"`{word}`" for word in value) or "(none)"
    if value == "":
        return "(empty)"
    return f"`{value >> 30}Gi`" if key.endswith("_bytes") and value else f"`{value}`"


def _takes(key: str) -> str:
    if key in config.WORDS:
        return ", ".join(f"`{word}`" for word in config.WORDS[key])
    if key.endswith("_bytes"):
        return "size"
    kind = {str: "text", int: "number", tuple: "list"}[type(config.TABLE[key].default)]
    return f"{kind}, {' to '.join(map(str, config.RANGES[key]))}" if key in config.RANGES else kind


def _flags(key: str) -> str:
    flag = config.FLAGS.get(key, "–")
    if key in WITH_FLAG:
        return ", ".join(f"`{' '.join(words)} {flag}`" for words in WITH_FLAG[key])
    return f"`{flag}`" if flag in options.SETTINGS else flag


# Which commands have the flag of a setting, where not all have it.
WITH_FLAG = {
    "csi.endpoint": (("csi",), ("bench",)), "csi.nfs_endpoint": (("csi",),), "csi.services": (("csi",),),
    "node.id": (("csi",),), "nri.socket": (("nri",),), "snapshotter.endpoint": (("snapshotter",),),
    "paths.host_root": (("snapshotter", "containerd-config"),),
    "paths.containerd_config": (("snapshotter", "containerd-config"),),
}  # fmt: skip


def settings_tables() -> str:
    lines, last = [], ""
    for key, setting in sorted(config.TABLE.items(), key=lambda item: SECTIONS.index(item[0].partition(".")[0])):
        section = key.partition(".")[0]
        if section != last:
            last = section
            lines += ["", f"### {section}", "", "| setting | takes | default | variable | flag | meaning |",
                      "| --- | --- | --- | --- | --- | --- |"]  # fmt: skip
        told = (f"`{key}`", _takes(key), _default(key), f"`{config.variable_of(key)}`", _flags(key),
                setting.meaning.replace("<", "\\<"))  # fmt: skip
        lines.append(f"| {' | '.join(told)} |")
    return "\n".join(lines) + "\n\n"


SECTIONS = list(dict.fromkeys(key.partition(".")[0] for key in config.TABLE))
SETTINGS_PAGE = ROOT / "docs/settings.md"
_BEGIN, _END = "<!-- made from runvol/config.py -->\n", "<!-- end -->\n"


def test_the_settings_are_made_from_the_table() -> None:
    """With RUNVOL_RECORD=1 they are written anew."""
    before, rest = SETTINGS_PAGE.read_text().split(_BEGIN)
    _, after = rest.split(_END)
    wanted = f"{before}{_BEGIN}{settings_tables()}{_END}{after}"
    if os.environ.get("RUNVOL_RECORD"):
        SETTINGS_PAGE.write_text(wanted)
    assert SETTINGS_PAGE.read_text() == wanted, "RUNVOL_RECORD=1 writes them anew"


def test_the_flags_of_settings_are_on_these_commands() -> None:
    of_all = {key for key, _metavar, _words in options.SETTINGS.values()}
    assert WITH_FLAG.keys() == config.FLAGS.keys() - of_all
    having = {words: {name for one in command.params for name in one.opts} for words, command in ALL}
    for key, several in WITH_FLAG.items():
        for words in several:
            assert config.FLAGS[key] in having[words], (key, words)


def test_each_variable_is_one_and_each_is_told() -> None:
    """Those of settings are in the table; those of tests are in what a developer reads."""
    said = SETTINGS_PAGE.read_text()
    told = set(re.findall(r"^\| `(RUNVOL_[A-Z_]+)` \|", said, re.MULTILINE))
    assert told == set(config.OTHER_VARIABLES)
    known = {*config.OTHER_VARIABLES, *map(config.variable_of, config.TABLE)}
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for name in re.findall(r"\bRUNVOL_[A-Z_]*[A-Z]\b(?!_)", page.read_text()):
            assert name in known, f"{page.name}: {name}"


def test_the_example_of_settings_is_one(tmp_path: Path) -> None:
    (example,) = re.findall(r"```toml\n(.*?)```", SETTINGS_PAGE.read_text(), re.DOTALL)
    file = tmp_path / "runvol.toml"
    file.write_text(example)
    loaded = config.load(file=str(file), environment={})
    assert loaded.number("loop.capacity_bytes") == 500 << 30
    assert loaded.text("detect.kubeconfig") == "/etc/kubernetes/kubelet.conf"
    assert loaded.words("volumes.backends") == ("loop", "nfs")
    # What it sets is not what holds without it.
    set_here = [key for key, source in loaded.sources.items() if source == str(file)]
    assert len(set_here) > 6 and all(loaded.values[key] != config.TABLE[key].default for key in set_here)


def test_the_figures_of_the_readme_are_those_that_were_measured() -> None:
    measured = json.loads((ROOT / "docs/measured/demo.json").read_text())["figures"]
    iops = {(one["path"], one["job"]): one["iops"] for one in measured}
    told = (ROOT / "README.md").read_text()
    for words, path in (("a 9p share", "9p"), ("a virtio-fs share", "virtio-fs"), ("the host itself", "host")):
        ratios = [iops["runvol", job] / iops[path, job] for job in ("randread", "randwrite")]
        cells = " | ".join(f"{ratio:.1f}" if ratio > 1 else f"{ratio:.2f}" for ratio in ratios)
        assert f"| {words} | {cells} |" in told, (words, cells)
    (page,) = re.findall(
        r"runvol against the cold-plugged volume.*?before", (ROOT / "docs/measured/README.md").read_text(), re.DOTALL
    )
    runs = [float(number) for number in re.findall(r"\d\.\d\d", page)]
    cells = " | ".join(f"{min(ratios):.2f} to {max(ratios):.2f}" for ratios in (runs[0::2], runs[1::2]))
    assert f"| a disk that QEMU has from its start (three runs) | {cells} |" in told and len(runs) == 6


def test_words_have_one_sense() -> None:
    """What docs/glossary.md names as another word for something stands on no page."""
    rows = [
        line.strip("| ").split(" | ")
        for line in (ROOT / "docs/glossary.md").read_text().splitlines()
        if line.startswith("| **")
    ]
    others = {word.strip() for row in rows if len(row) == 3 for word in row[2].split(",")}
    # Those that are words of Kubernetes or of Kata as well, or are read together with another.
    others -= {"attribute", "direct volume", "runtime-rs", "snapshot alone", "group alone"}
    assert {"withdrawn", "orphan", "CSI plugin"} <= others
    for page in PAGES:
        if page.name != "glossary.md":
            for word in sorted(others):
                assert not re.search(rf"\b{re.escape(word)}\b", page.read_text()), f"{page.name}: {word}"


def test_settings_that_pages_name_exist() -> None:
    """Those of the program, or of the chart; findings of doctor have such names too."""
    from runvol import doctor_table

    values = yaml.safe_load((ROOT / "deploy/helm/runvol/values.yaml").read_text())
    known = {*config.TABLE, *doctor_table.TABLE}
    for page in PAGES:
        for word in (one.partition(" ")[0] for one in inline(page)):
            section, _, key = word.partition(".")
            if (
                section in SECTIONS
                and re.fullmatch(r"[a-z_A-Z]+", key)
                and key not in ("json", "made", "toml", "py", "md", "db", "sock")
            ):
                assert word in known or key in (values.get(section) or {}), f"{page.name}: {word}"
