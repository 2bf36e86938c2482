"""Text in the form in which clients keep it and send it back: the `encrypted_content` of items.

OpenAI encrypts it. Here it is base64, which anybody can read: the client has the same text in the item's content, and
a key of the server would not outlive it. Strings of other servers cannot be read.
"""

from __future__ import annotations

import base64
import binascii

_PREFIX = "mlx-gptoss.plain."


def pack(text: str) -> str:
    """The text as an opaque string in ASCII."""
    return _PREFIX + base64.b64encode(text.encode("utf-8", "surrogatepass")).decode("ascii")


def unpack(value: str | None) -> str | None:
    """The text of a string that pack() made; None for any other."""
    if value is None or not value.startswith(_PREFIX):
        return None
    try:
        return base64.b64decode(value[len(_PREFIX) :], validate=True).decode("utf-8", "surrogatepass")
    except (binascii.Error, ValueError):
        return None
