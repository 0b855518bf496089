"""Secrets out of text that leaves the node: by what they are called, by their form, and those that are known.

What is masked too much costs a question; what is masked too little cannot be taken back. The text is others' as well (a
log is what somebody made a program say), so each look at it ends: every repetition has a bound, and what was looked
through for the end of a value is that value.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable
from urllib.parse import quote

MASK = "***"
# In a key's name, whatever stands around it.
_NAMES = (
    r"pass(?:word|wd|phrase|code)?|pwd|secret|token|bearer|auth|credentials?|cred|cookie|session|signature|sasl|psk|"
    r"htpasswd|(?:private|client|api|access|account|encryption|signing|master|shared|ssh|storage)[-_.]?key|"
    r"key[-_.]?data|cert(?:ificate)?[-_.]?data"
)
_WORD = r"[\w.\-/]"
_QUOTES, _GAP, _IS = r"[\\\"']{0,32}", r"\s{0,40}", r"[ \t]{0,40}[:=]"
_KEY = rf"(?:{_NAMES}){_WORD}{{0,80}}{_QUOTES}{_IS}"
# An environment as Kubernetes writes it: `"name": "DB_PASSWORD", "value": "..."`.
_PAIR = (
    rf"name{_QUOTES}{_GAP}[:=]{_GAP}{_QUOTES}{_WORD}{{0,80}}?(?:{_NAMES}){_WORD}{{0,80}}{_QUOTES}{_GAP},?{_GAP}{_QUOTES}"
    rf"value{_QUOTES}{_IS}"
)
_KEYED = re.compile(rf"(?i){_PAIR}|{_KEY}")
# What stands before a key whose line is YAML's or an INI file's.
_LINE_BEGINS = re.compile(rf"([ \t]*(?:- +)?){_WORD}*")
_FARTHEST = 200
_BLANKS = re.compile(r"[ \t]*")
# What has lines of its own below it in YAML: a block of text, a list, a mapping.
_BELOW = re.compile(r"(?:[|>][-+0-9]{0,2})?[ \t]*\r?\n")
_INDENTED = re.compile(r"([ \t]*)([^\n]*)\n?")
_ON_NEXT_LINE = re.compile(r"\s{0,40}")
# A value's end. A quote inside of what is quoted itself (JSON in a line of a JSON log) ends with one that is escaped as
# often. What has no end ends with its line, or with the text.
_QUOTED = re.compile(
    "|".join(
        (
            r'"""[\s\S]*?(?:"""|\Z)',
            r"'''[\s\S]*?(?:'''|\Z)",
            r'(?P<quote>\\+")(?:(?!(?<!\\)(?P=quote))[^\n])*(?:(?<!\\)(?P=quote))?',
            r'"(?:[^"\\\n]|\\.)*"?',
            r"'[^'\n]*'?",
        )
    )
)
_BRACKETS = re.compile(r'[\[\]{}]|"(?:[^"\\\n]|\\.)*"?')
_PLAIN = re.compile(r"[^\s,;&\"'\]})]+")
_REST = re.compile(r"[^\n]*")
# Characters of a list, or of lines below a key, that are looked through.
_LONGEST = 1 << 16
# An argument of its own: `--password X`.
_FLAG = re.compile(
    rf"(?i)((?<![\w-])--?[\w-]{{0,80}}?(?:{_NAMES})[\w-]{{0,80}}[ \0])(\"[^\"\n]*\"?|'[^'\n]*'?|[^\s\0-][^\s\0]*)"
)
_HEADER = re.compile(
    r"(?i)((?:proxy-)?authorization[\\\"']{0,32}\s{0,40}[:=]\s{0,40}[\\\"'\[]{0,32})((?:\w{1,40} {1,8})?[^\s\\\"',\]]+)"
)
_SCHEME = re.compile(r"(?i)\b((?:bearer|basic|digest|negotiate|token) {1,8})([A-Za-z0-9._~+/=-]{6,})")
_USER = re.compile(r"(?i)\b([a-z][a-z0-9+.-]{0,20}://)[^/\s\"']{1,500}@")
_PEM_NAME = r"[A-Z0-9 ]{0,40}(?:KEY|CERTIFICATE)[A-Z0-9 ]{0,40}-----"
_PEM = re.compile(rf"-----BEGIN {_PEM_NAME}[\s\S]*?(?:-----END [A-Z0-9 ]{{0,80}}-----|\Z)")
# One whose beginning was cut off with the text's.
_PEM_ENDS = re.compile(rf"\A(?:(?!-----BEGIN )[\s\S]){{0,20000}}?-----END {_PEM_NAME}")
_PEM_IN_BASE64 = re.compile(r"LS0tLS1CRUdJTi[A-Za-z0-9+/=]*")
# JSON in base64, of which a JSON web token and a registry's credentials are made.
_JSON_IN_BASE64 = re.compile(r"\beyJ[A-Za-z0-9_+/=-]{5,}(?:\.[A-Za-z0-9_-]*){0,2}")
# As who gives them has them begin.
_GIVEN = re.compile(
    r"\b(?:gh[oprsu]_|github_pat_|glpat-|xox[abprs]-|dckr_pat_|npm_|hvs\.|AKIA|ASIA|AIza)[A-Za-z0-9_.-]{16,}"
)
_TABLE = re.compile(r"^\s*\[+(?P<name>[^\]]*)\]+\s*(#.*)?$")
_SECRET_TABLE = re.compile(r"(?i)headers?\W*$|\bauth\W*$")
_LINE = re.compile(r"^(\s*[^=#\s][^=]*=\s*)(.*)$")
# Shorter ones are words that stand everywhere.
_SHORTEST = 6


class Masked:
    """Takes secrets out; `known`: values that are secret, wherever they stand."""

    def __init__(self, known: Iterable[str] = ()) -> None:
        forms: set[str] = set()
        for one in known:
            text = one.strip()
            if len(text) >= _SHORTEST:
                coded = base64.b64encode(text.encode(errors="surrogateescape")).decode()
                forms |= {text, quote(text, safe="", errors="surrogateescape"), coded, coded.rstrip("=")}
        self._known = sorted(forms, key=len, reverse=True)

    def text(self, content: str) -> str:
        for one in self._known:
            content = content.replace(one, MASK)
        content = _PEM_IN_BASE64.sub(MASK, _PEM.sub(MASK, _PEM_ENDS.sub(MASK, content)))
        content = _USER.sub(rf"\g<1>{MASK}@", content)
        content = _HEADER.sub(rf"\g<1>{MASK}", content)
        content = _keyed(content)
        content = _FLAG.sub(rf"\g<1>{MASK}", content)
        content = _SCHEME.sub(rf"\g<1>{MASK}", content)
        return _GIVEN.sub(MASK, _JSON_IN_BASE64.sub(MASK, content))

    def toml(self, content: str) -> str:
        """As a text; and in tables of headers and of who logs in, every value, as their keys have any name."""
        lines, secret, depth = [], False, 0
        for line in content.splitlines():
            table, value = _TABLE.match(line), _LINE.match(line)
            if depth:  # inside of a list that is masked already
                depth = max(0, depth + line.count("[") - line.count("]"))
            elif table is not None:
                secret = bool(_SECRET_TABLE.search(table["name"]))
                lines.append(line)
            elif secret and value is not None:
                depth = max(0, value[2].count("[") - value[2].count("]"))
                lines.append(f'{value[1]}"{MASK}"')
            else:
                lines.append(line)
        return self.text("\n".join(lines) + "\n")


def _keyed(content: str) -> str:
    """Without the values of keys that are called like a secret."""
    made, at = [], 0
    while (found := _KEYED.search(content, at)) is not None:
        begins, ends, mask = _value(content, found.start(), found.end())
        made += [content[at:begins], mask]
        at = max(ends, found.end())
    return "".join([*made, content[at:]])


def _value(content: str, key: int, is_at: int) -> tuple[int, int, str]:
    """Where the value begins and ends of a key, which stands at `key` and ends at `is_at`, and what is said instead.
    What is quoted stays quoted, so that JSON and TOML stay what they are."""
    after = _end(_BLANKS, content, is_at)
    line = _LINE_BEGINS.fullmatch(content, *_line_before(content, key))
    below = _BELOW.match(content, after)
    if below is not None:
        ends = _block(content, below.end(), len(line[1])) if line is not None else below.end()
        if ends > below.end():
            return after, ends, f"{MASK}\n"
        after = _end(_ON_NEXT_LINE, content, after)
    quoted = _QUOTED.match(content, after)
    if quoted is not None:
        value = quoted[0]
        opening = re.match(r"\\*[\"']", value)
        mask = value if value in ('""', "''") or opening is None else f"{opening[0]}{MASK}{opening[0]}"
        return after, quoted.end(), mask
    if content[after : after + 1] in ("[", "{") and content[after:]:
        ends = _closed(content, after)
        return after, ends, content[after:ends] if ends - after == len("[]") else f'"{MASK}"'
    whole = line is not None and after > is_at and below is None
    ends = _end(_REST if whole else _PLAIN, content, after)
    return after, ends, content[after:ends] if content[after:ends] in ("true", "false", "null", "") else MASK


def _end(pattern: re.Pattern[str], content: str, at: int) -> int:
    found = pattern.match(content, at)
    return found.end() if found is not None else at


def _line_before(content: str, at: int) -> tuple[int, int]:
    """The part of a line before `at`, as far as it is looked at."""
    return content.rfind("\n", max(0, at - _FARTHEST), at) + 1 or max(0, at - _FARTHEST), at


def _block(content: str, at: int, indent: int) -> int:
    """Where lines end that are indented further, or are a list's."""
    last = min(len(content), at + _LONGEST)
    while at < last and (found := _INDENTED.match(content, at)) is not None:
        own = len(found[1])
        if found[2].strip() and own <= indent and not (own == indent and found[2].startswith("- ")):
            break
        at = found.end()
    return at


def _closed(content: str, at: int) -> int:
    """Where the list or object ends that begins there."""
    depth, last = 0, at + _LONGEST
    for found in _BRACKETS.finditer(content, at):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(found[0], 0)
        if not depth or found.start() > last:
            return found.end()
    return len(content)
