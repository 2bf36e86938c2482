"""The `signature` of a thinking block.

Anthropic signs reasoning and checks the signature when the block comes back. This model takes any reasoning back, so
nothing is signed: the signature is a constant. If the client asks for `display: "omitted"`, it has the reasoning
itself, in base64, so that a call's reasoning is not lost to the model.
"""

from __future__ import annotations

import base64
import binascii

CONSTANT = "mlx-gptoss"
_OMITTED = "mlx-gptoss:"  # precedes the reasoning


def signature_of(thinking: str, *, omitted: bool) -> str:
    """The signature of a block. omitted: whether the block itself has no text."""
    if not omitted:
        return CONSTANT
    return _OMITTED + base64.b64encode(thinking.encode(errors="surrogatepass")).decode()


def omitted_thinking(signature: object) -> str:
    """The reasoning in the signature of a block without text; empty if there is none."""
    if not isinstance(signature, str) or not signature.startswith(_OMITTED):
        return ""
    try:
        return base64.b64decode(signature[len(_OMITTED) :]).decode(errors="replace")
    except (binascii.Error, ValueError):
        return ""
