"""`runvol snapshotter containerd-config`: the node's own file with the snapshotter in it, printed or written."""

from __future__ import annotations

import contextlib
import fnmatch
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, replace

import click

from blockdev import durable
from guestmount import containerd_version
from guestmount.containerd_files import File, Version, in_force, load
from guestmount.containerd_places import PLACES, Places
from guestmount.errors import Refused
from guestmount.runtimes import in_root
from runvol import containerd_wish, tables, toml_text
from runvol.cli import Loader
from runvol.config import Config
from runvol.containerd_wish import NAME, Wish
from runvol.gauge_place import former_roots, gauge_path
from runvol.toml_text import Change, NoPlace

_COPY = ".before-runvol"
_BASE = '{{ template "base" . }}'


@dataclass(frozen=True, kw_only=True)
class Merged:
    """The file as it is to be. `lost`: what of it is not there any more, in words, empty for nothing."""

    file: File
    text: str
    changes: Sequence[Change]
    lost: str = ""


def merged(files: Sequence[File], version: Version, wish: Wish) -> Merged:
    """What the first of the files has to be, so that all that was in force stays and the snapshotter is. Refused for
    what contradicts it, by its name."""
    main = files[0]
    wanted = containerd_wish.changes(files, version, wish)
    if not wanted:
        return Merged(file=main, text=main.text, changes=())
    if not version.merges and (hiding := [one.path for one in files[1:] if _hides(one, main)]):
        forms = {one.form for one in files}
        if len(forms) > 1:
            raise Refused(f"{main.path} and what it imports have different versions ({sorted(forms)}); give them one")
        document = in_force(files, version)
        files = [replace(main, document=document)]
        text = toml_text.written(toml_text.applied(document, wanted))
        lost = f"the comments, and `imports`: what those files say ({', '.join(hiding)}, …) is in this one"
    else:
        try:
            text, lost = toml_text.edited(main.text, wanted), ""
        except NoPlace as why:
            try:
                document = toml_text.applied(main.document, wanted)
            except NoPlace as error:
                raise Refused(f"{main.path}: {error}") from error
            text, lost = toml_text.written(document), f"the comments, as it was written anew ({why})"
    made = replace(main, text=text, document=toml_text.parsed(text))
    _prove(files, made, version, wish)
    return Merged(file=made, text=text, changes=wanted, lost=lost)


def _hides(imported: File, main: File) -> bool:
    return main.cri in imported.document.get("plugins", {}) or NAME in imported.document.get("proxy_plugins", {})


def _prove(files: Sequence[File], made: File, version: Version, wish: Wish) -> None:
    """What an import says wins over the file: then nothing that is written there helps."""
    for change in containerd_wish.changes([made, *files[1:]], version, wish):
        what = toml_text.name(change.path)
        said = next((one.path for one in reversed(files[1:]) if toml_text.has(one.document, change.path)), made.path)
        raise Refused(f"{said}, which is imported, has another {what} and wins; take it out there")


def _read(path: str, version: Version, root: str) -> list[File]:
    """Where there is no file, containerd has its defaults, and a new one says nothing of them."""
    text = f"version = {3 if version.merges else 2}\n"
    return load(path, version, root) or [File(path=path, text=text, document=toml_text.parsed(text))]


def _wish(config: Config, runtimes: Sequence[str], everything: bool, platform: str) -> Wish:
    named: dict[str, str] = {}
    for one in runtimes:
        handler, _, kind = one.partition("=")
        if not handler or ("=" in one and not kind):
            raise Refused(f"--runtime {one}: takes HANDLER, or HANDLER=TYPE")
        if named.setdefault(handler, kind) != kind:
            raise Refused(f"--runtime {handler} is given twice, with different types")
    return Wish(
        address=config.text("snapshotter.endpoint").removeprefix("unix://"),
        root=gauge_path(config) or config.text("paths.state_dir"),
        roots=former_roots(config),
        platform=platform,
        runtimes=named,
        everything=everything,
    )


@click.command("containerd-config", short_help="Put the snapshotter into containerd's file.")
@click.option(
    "--containerd-version", "said", metavar="VERSION", help="The version that the file is for: 1.6, 1.7, 2.0, 2.4.2, …"
)
@click.option("--detect", is_flag=True, help="Ask the running containerd for its version, as is done without either.")
@click.option("--config", "path", metavar="PATH", help="containerd's file (default: that of kubelet's containerd).")
@click.option("--write", is_flag=True, help=f"Change the file; what it was is kept beside it (PATH{_COPY}).")
@click.option("--runtime", "runtimes", multiple=True, metavar="HANDLER[=TYPE]",
              help="A runtime that gets it (default: all that are sandboxes); TYPE: of one to be added.")  # fmt: skip
@click.option(
    "--all-runtimes",
    is_flag=True,
    help="The default of all, runc's containers too, which kubelet "
    "sees as its imagefs; containerd 1.6 takes it no other way.",
)
@click.option("--platform", metavar="OS/ARCH", help="The node's platform (default: this machine's).")
@click.option("--root", metavar="DIR", help="Where the node's root is seen (default: the setting paths.host_root).")
@click.pass_obj
def containerd_config(
    load_config: Loader, said: str | None, detect: bool, path: str | None, write: bool, runtimes: tuple[str, ...],
    all_runtimes: bool, platform: str | None, root: str | None,
) -> None:  # fmt: skip
    """Print containerd's configuration file with the snapshotter in it, or write it; all else in it stays in force."""
    config = load_config(**{"paths.host_root": root, "paths.containerd_config": path})
    if said and detect:
        raise Refused("--detect asks for the version that --containerd-version says; give one of them")
    root = config.text("paths.host_root")
    taken = Places(config=config.text("paths.containerd_config"), endpoint=config.text("cri.endpoint") or "auto",
                   root=root).taken()  # fmt: skip
    if path is None and taken.others:
        others = ", ".join(one.config for one in taken.others)
        raise Refused(f"which file kubelet's containerd has is not known ({taken.config}, {others}): give --config")
    version = Version.parse(said) if said else containerd_version.detect(taken, root)
    files = _read(taken.config, version, root)
    made = merged(files, version, _wish(config, runtimes, all_runtimes, platform or containerd_wish.machine()))
    if _generator(files[0]):
        _template(files[0], made, version, root, write)
        return
    if not write:
        click.echo(made.text, nl=False)
        _note(made, f"{taken.config} for containerd {version}: as it has to be; --write changes it")
    elif not made.changes:
        tables.line(f"{taken.config} has all of it; nothing was changed")
    else:
        kept = _write(files, made, in_root(taken.config, root))
        _note(made, f"{taken.config} is written{kept}; restart containerd, then `runvol doctor`")


def _note(made: Merged, what: str) -> None:
    if made.lost:
        tables.line(f"not kept: {made.lost}", err=True)
    tables.line(what, err=True)


def _generator(file: File) -> str:
    """Who makes this file anew at each start."""
    place = next((one.name for one in PLACES[1:] if one.config == file.path), "")
    head = file.text.lstrip().partition("\n")[0].lower()
    marked = next((name for name in ("k3s", "RKE2") if "generated" in head and name.lower() in head), "")
    return place or marked


def _template(file: File, made: Merged, version: Version, root: str, write: bool) -> None:
    """What belongs into the template that k3s and RKE2 make the file of."""
    who = _generator(file)
    name = "config-v3.toml.tmpl" if version.merges else "config.toml.tmpl"
    path = os.path.join(os.path.dirname(file.path), name)
    if not made.changes:
        tables.line(f"{file.path} has all of it", err=True)
        return
    there = os.path.lexists(in_root(path, root))
    appended = made.text[len(file.text.rstrip()) :] if made.text.startswith(file.text.rstrip()) else ""
    if write:
        raise Refused(f"{file.path} is made anew by {who} at each start, of {path}: without --write this command "
                      "prints what belongs there")  # fmt: skip
    if there and not appended:
        keys = ", ".join(toml_text.name(one.path) for one in made.changes)
        raise Refused(f"{path} exists, and some of this belongs into tables that it has; set there: {keys}")
    if not appended and "{{" in made.text:
        raise Refused(f"{file.path} has {{{{ in it, which a template of {who} cannot have as text")
    click.echo(appended.strip() if there else f"{_BASE}\n{appended.rstrip()}" if appended else made.text.rstrip())
    how = "append this to it" if there else "this is what it has to be"
    _note(made, f"{who} makes {file.path} of {path}: {how}; then restart {who}")


def _write(files: Sequence[File], made: Merged, real: str) -> str:
    """Put the file there, whole, and say where the old one is."""
    real = os.path.realpath(real)
    try:
        try:
            old = os.stat(real)
        except FileNotFoundError:
            durable.make_directories(os.path.dirname(real), 0o755)
            durable.write(real, made.text.encode(), mode=0o644)
            return ""
        with open(real, "rb") as opened:
            content = opened.read()
        if content != files[0].text.encode():
            raise Refused(f"{files[0].path} was changed by somebody else just now; run the command again")
        copy = _copy(real, content, files, stat.S_IMODE(old.st_mode))
        mode, owner = stat.S_IMODE(old.st_mode), (old.st_uid, old.st_gid)
        # Names that are nobody else's, as what a killed call has left of them goes.
        beside = os.path.join(os.path.dirname(real), f".{os.path.basename(real)}.runvol-")
        durable.replace(real, made.text.encode(), beside=beside, mode=mode, owner=owner)
        durable.sweep(beside)
    except FileExistsError as error:
        raise Refused(f"{files[0].path} was made by somebody else just now; run the command again") from error
    except PermissionError:
        raise
    except OSError as error:
        raise Refused(f"{files[0].path} cannot be written: {error.strerror}") from error
    return f", the old one is {copy}"


def _copy(real: str, content: bytes, files: Sequence[File], mode: int) -> str:
    """A copy of the same content counts; another one is never overwritten."""
    for number in range(1000):
        path = f"{real}{_COPY}{f'.{number}' if number else ''}"
        patterns = [str(one) for file in files for one in file.document.get("imports", []) if "*" in one]
        if any(fnmatch.fnmatchcase(os.path.basename(path), os.path.basename(one)) for one in patterns):
            raise Refused(f"{files[0].path} imports all files with names like {os.path.basename(path)}, which the "
                          f"copy of the old one would have: write imports so that they end in .toml")  # fmt: skip
        with contextlib.suppress(FileNotFoundError):
            with open(path, "rb") as opened:
                if opened.read() == content:
                    return path
            continue
        durable.write(path, content, mode=mode)
        durable.sync_directory(os.path.dirname(path))
        return path
    raise Refused(f"there are too many copies {real}{_COPY}.*; remove some")
