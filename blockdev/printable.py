"""Others' words in a line for a person: a terminal obeys some characters, and who reads a log takes a line for one.

A pod says where it mounts a volume, a share what its files are called, a guest what its filesystem's label is.
"""

from __future__ import annotations


def printable(text: str, *, lines: bool = False) -> str:
    """The same, with escapes for what is no sign: control characters, those that turn the direction of writing, bytes
    that are no text (surrogates). `lines`: line feeds may stay."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() or (lines and one == "\n") else _escape(one) for one in text)


def _escape(one: str) -> str:
    number = ord(one)
    return {"\n": "\\n", "\t": "\\t", "\r": "\\r"}.get(one) or (
        f"\\u{number:04x}" if number < 1 << 16 else f"\\U{number:08x}"
    )
