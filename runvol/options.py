"""What the options of several commands are made of: sizes, `--json`, and those of `runvol` itself, which may stand
behind a command as well as before it."""

from __future__ import annotations

from typing import Any

import click

from runvol import sizes

_JSON, _GIVEN = "runvol.json", "runvol.given"
# Those of `runvol` itself, by what they set.
SETTINGS = {
    "--config": ("file", "FILE", "Settings; RUNVOL_CONFIG says it too (default /etc/runvol/runvol.toml, if there)."),
    "--state-dir": ("paths.state_dir", "DIR", "State directory: volumes and stores. For trials; see runvol.toml."),
    "--run-dir": ("paths.run_dir", "DIR", "Run directory: sockets and locks. For trials; see runvol.toml."),
    "--log-level": ("log.level", "LEVEL", "debug, info, warning or error."),
}


class Size(click.ParamType[int]):
    """An option's value in bytes."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number, of text too."""
        if isinstance(value, int):
            return value
        try:
            return sizes.parse(value)
        except ValueError:
            self.fail(f"{value!r} is no size: {sizes.FORM}", param, ctx)


SIZE = Size()


def _json(context: click.Context, _option: click.Parameter, value: bool) -> bool:
    """Whether it was said here or before a word further left."""
    if value:
        context.meta[_JSON] = True
    return bool(context.meta.get(_JSON))


as_json_option = click.option("--json", "as_json", is_flag=True, callback=_json, help="Print JSON (docs/json.md).")


def given(context: click.Context) -> dict[str, str]:
    """The options of `runvol` itself by what they set, wherever they stood; the last one counts."""
    found: dict[str, str] = context.meta.setdefault(_GIVEN, {})
    return found


def _give(key: str, context: click.Context, value: str | None) -> None:
    if value is not None:
        given(context)[key] = value


def own(*, hidden: bool) -> list[click.Option]:
    """The options of `runvol` itself."""
    return [
        click.Option([flag], metavar=metavar, help=words, expose_value=False, hidden=hidden,
                     callback=lambda context, _option, value, key=key: _give(key, context, value))
        for flag, (key, metavar, words) in SETTINGS.items()
    ]  # fmt: skip


def _no_json(context: click.Context, _option: click.Parameter, value: bool) -> None:
    if value or context.meta.get(_JSON):
        raise click.UsageError(f"{context.command_path!r} tells nothing that could be JSON", context)


def pass_json(context: click.Context, option: click.Parameter, value: bool) -> None:
    """`--json` before a command means the command's."""
    _json(context, option, value)


def everywhere(command: click.Command) -> None:
    """Give a command, and those below it, the options of `runvol` itself; its own of the same name are nearer."""
    names = {name for one in command.params for name in one.opts}
    command.params += [one for one in own(hidden=True) if not names.intersection(one.opts)]
    if "--json" not in names:
        callback = pass_json if isinstance(command, click.Group) else _no_json
        command.params.append(
            click.Option(["--json"], is_flag=True, expose_value=False, hidden=True, callback=callback)
        )
    here = ", ".join(flag for flag in SETTINGS if flag not in names)
    command.epilog = command.epilog or f"The options of runvol itself may stand here too: {here}."
    if isinstance(command, click.Group):
        for one in command.commands.values():
            everywhere(one)
