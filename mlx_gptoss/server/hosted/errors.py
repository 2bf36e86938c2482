"""The error of a tool's call."""

from __future__ import annotations


class ToolError(Exception):
    """A call that failed. The model sees the message and may try again."""
