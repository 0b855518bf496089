"""What people read and may type: the pages, the commands that stand in them, and the sentences that the code says.

A fenced block without a language is commands, one a line; what stands behind two blanks or a `#` is words about it. A
block of anything else names its language.
"""

from __future__ import annotations

import ast
import functools
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = (
    *(ROOT / name for name in ("README.md", "SECURITY.md", "CONTRIBUTING.md")), *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "docs/measured/README.md",
)  # fmt: skip
ROOMS = ("blockdev", "volumes", "guestmount", "csi", "flexvolume", "snapshotter", "runvol")
_FENCE = re.compile(r"^([ \t]*)```(\w*)\n(.*?)^[ \t]*```[ \t]*$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"(?<!`)`([^`\n]+(?:\n[^`\n]+)?)`(?!`)")
# What an inline word has to begin with to be a command.
PROGRAMS = {
    "runvol", "kubectl", "helm", "systemctl", "ctr", "crictl", "make", "modprobe", "python", ".venv/bin/python", "pip",
    "systemd-analyze", "chattr", "dmsetup", "lvcreate", "cp", "journalctl", "truncate", "losetup", "findmnt", "rm", "e2fsck", "mount", "skopeo", "apt-get", "blkdiscard",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Typed:
    """One command as it stands in a page. `whole`: it stands in a block, to be typed as it is."""

    page: str
    text: str
    words: tuple[str, ...]
    whole: bool

    @property
    def program(self) -> str:
        """Without its directory."""
        return self.words[0].rpartition("/")[2]


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language, without their indentation."""
    return [
        "".join(line.removeprefix(indent) + "\n" for line in body.splitlines())
        for indent, found, body in _FENCE.findall(page.read_text())
        if found == language
    ]


def inline(page: Path) -> list[str]:
    """What stands between backticks, a line each."""
    return [" ".join(one.split()) for one in _INLINE.findall(_FENCE.sub("", page.read_text()))]


def _lines(block: str) -> Iterator[str]:
    lines = iter(re.sub(r"\\\n\s*", "", block).splitlines())
    for line in lines:
        command = re.split(r"\s{2,}|\s#", line.strip())[0] if " <<" not in line and "\\" not in line else line.strip()
        if command and not command.startswith("#"):
            yield command
        if end := re.search(r"<<'?(\w+)", line):
            for inner in lines:
                if inner.strip() == end[1]:
                    break


def _segments(text: str) -> Iterator[tuple[str, ...]]:
    """The commands of a line, and what one of them has another program do."""
    lexer = shlex.shlex(text, posix=True, punctuation_chars="|;&<>")
    lexer.whitespace_split, lexer.commenters = True, ""
    found: list[str] = []
    for token in [*lexer, ";"]:
        if re.fullmatch(r"[|;&]+", token):
            words = list(found)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words.pop(0)  # of the command's environment
            if words:
                yield tuple(words)
                if "--" in words and words[0] == "kubectl":
                    yield tuple(words[words.index("--") + 1 :])
            found = []
        else:
            found.append(token)


def _without_redirections(words: tuple[str, ...]) -> tuple[str, ...]:
    cut = next((place for place, word in enumerate(words) if re.fullmatch(r"[<>]+", word)), len(words))
    return words[:cut]


def commands() -> list[Typed]:
    """All that may be typed as it stands."""
    found = []
    for page in PAGES:
        name = str(page.relative_to(ROOT))
        texts = [(line, True) for block in blocks(page, "") for line in _lines(block)]
        texts += [(one, False) for one in inline(page) if _is_command(one)]
        for text, whole in texts:
            for words in map(_without_redirections, _segments(text)):
                if words and words != ("…",):
                    found.append(Typed(page=name, text=text, words=words, whole=whole))
    return found


def _is_command(text: str) -> bool:
    words = [word for word in text.split() if not re.fullmatch(r"[A-Z_]+=.*", word)]
    return len(words) > 1 and words[0] in PROGRAMS


@functools.cache
def said_by_the_code() -> tuple[str, ...]:
    """Every text of the program's but docstrings, with its variable parts as `…`."""
    found: set[str] = set()
    for room in ROOMS:
        for file in sorted((ROOT / room).rglob("*.py")):
            tree = ast.parse(file.read_text())
            about = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
            for node in ast.walk(tree):
                if id(node) not in about and (text := _text(node)) is not None and len(text) > 8:
                    found.add(" ".join(text.split()))
    return tuple(sorted(found))


def _text(node: ast.AST) -> str | None:
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) or "…" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = _text(node.left), _text(node.right)
        return f"{left or '…'}{right or '…'}" if left or right else None
    return None
