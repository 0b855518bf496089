"""Secrets out of text that leaves the node: by what they are called, by their form, and those that are known.

What is masked too much costs a question; what is masked too little cannot be taken back.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable
from urllib.parse import quote

MASK = "***"
# In a key's name, whatever stands around it.
_NAMES = (
    r"pass(?:word|wd|phrase|code)?|pwd|secret|token|bearer|auth|credentials?|cred|private[-_.]?key|client[-_.]?key|"
    r"api[-_.]?key|access[-_.]?key|key[-_.]?data|cert(?:ificate)?[-_.]?data|cookie|session|signature|sasl|htpasswd"
)
_WORD = r"[\w.\-/]"
_KEY = rf"{_WORD}{{0,80}}?(?:{_NAMES}){_WORD}{{0,80}}"
# A quote inside of what is quoted itself (JSON in a line of a JSON log) ends with one that is escaped as often.
_VALUE = "|".join(
    (
        r'"""[\s\S]*?"""',
        r"'''[\s\S]*?'''",
        r'(?P<quote>\\+")(?:(?!(?<!\\)(?P=quote))[^\n])*(?<!\\)(?P=quote)',
        r'"(?:[^"\\\n]|\\.)*"',
        r"'[^'\n]*'",
        r"\[[^\]]*\]|\{[^}]*\}",
        r"[^\s,;&\"'\]})]+",
    )
)
_KEYED = re.compile(rf"(?i)((?<!{_WORD}){_KEY}[\\\"']*\s*[:=]\s*)({_VALUE})")
# A line of YAML or of an INI file: all of it is the value.
_WHOLE_LINE = re.compile(rf"(?im)^(\s*(?:- +)?{_KEY}\s*[:=] +)([^\s\"'\[{{|>].*)$")
# An argument of its own: `--password X`.
_FLAG = re.compile(rf"(?i)((?<![\w-])--?[\w-]{{0,80}}?(?:{_NAMES})[\w-]{{0,80}}[ \0])([^\s\0-][^\s\0]*)")
_HEADER = re.compile(r"(?i)((?:proxy-)?authorization[\\\"']*\s*[:=]\s*[\\\"'\[]*)((?:\w+ +)?[^\s\\\"',\]]+)")
_SCHEME = re.compile(r"(?i)\b((?:bearer|basic|digest|negotiate|token) +)([A-Za-z0-9._~+/=-]{6,})")
_USER = re.compile(r"(?i)\b([a-z][a-z0-9+.-]{0,20}://)[^/\s@\"']{1,500}@")
_PEM = re.compile(r"-----BEGIN [A-Z0-9 ]*(?:KEY|CERTIFICATE)[A-Z0-9 ]*-----[\s\S]*?(?:-----END [A-Z0-9 ]*-----|\Z)")
_PEM_IN_BASE64 = re.compile(r"LS0tLS1CRUdJTi[A-Za-z0-9+/=]*")
_JWT = re.compile(r"\beyJ[A-Za-z0-9_-]{5,}(?:\.[A-Za-z0-9_-]*){1,2}")
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
                coded = base64.b64encode(text.encode()).decode()
                forms |= {text, quote(text, safe=""), coded, coded.rstrip("=")}
        self._known = sorted(forms, key=len, reverse=True)

    def text(self, content: str) -> str:
        for one in self._known:
            content = content.replace(one, MASK)
        content = _PEM_IN_BASE64.sub(MASK, _PEM.sub(MASK, content))
        content = _USER.sub(rf"\g<1>{MASK}@", content)
        content = _HEADER.sub(rf"\g<1>{MASK}", content)
        content = _WHOLE_LINE.sub(rf"\g<1>{MASK}", content)
        content = _KEYED.sub(_keyed, content)
        content = _FLAG.sub(rf"\g<1>{MASK}", content)
        content = _SCHEME.sub(rf"\g<1>{MASK}", content)
        return _JWT.sub(MASK, content)

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


def _keyed(found: re.Match[str]) -> str:
    """What is quoted stays quoted, so that JSON and TOML stay what they are."""
    key, value = found[1], found[2]
    if value in ("true", "false", "null", "[]", "{}", '""', "''"):
        return found[0]
    opening = re.match(r"\\*[\"']", value)
    if opening is not None:
        return f"{key}{opening[0]}{MASK}{opening[0]}"
    return f'{key}"{MASK}"' if value[0] in "[{" else f"{key}{MASK}"
