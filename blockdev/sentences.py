"""What a refusal may say. In gRPC it is a header, `grpc-message`, in which every byte but a printable one of ASCII
takes three (PROTOCOL-HTTP2.md); a client that gets more than 8 KiB of headers may answer RESOURCE_EXHAUSTED instead."""

from __future__ import annotations

# Bytes as they travel, and so characters at the most: what a refusal quotes is a caller's, of a megabyte maybe.
LONGEST = 4000
_MORE = "…"


def short(text: str, end: str = "") -> str:
    """`text` and then `end`, with what is no Unicode replaced, and so much of `text` cut off that it travels."""
    whole, end = (one.encode("utf-8", "replace").decode() for one in (text[: LONGEST + 1], end))
    left = LONGEST - _cost(end)
    if len(text) <= LONGEST and _cost(whole) <= left:
        return whole + end
    left -= _cost(_MORE)
    for at, one in enumerate(whole):
        left -= _cost(one)
        if left < 0:
            return whole[:at] + _MORE + end
    return whole + _MORE + end


def _cost(text: str) -> int:
    return sum(1 if " " <= one <= "~" and one != "%" else 3 * len(one.encode()) for one in text)
