"""The options of load() and generate(), each declared once for Python, the command line and the ranks."""

from __future__ import annotations

from .generation import GenerationOptions, RawOptions
from .load import LoadOptions

__all__ = ["GenerationOptions", "LoadOptions", "RawOptions"]
