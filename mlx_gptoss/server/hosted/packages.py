"""The packages of the extra `hosted`, imported when a tool that needs them is switched on."""

from __future__ import annotations

import importlib
from types import ModuleType

from ...errors import GptOssError


def load_package(name: str, tool: str) -> ModuleType:
    """Import a package. Raises GptOssError if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise GptOssError(
            f"the tool {tool} needs the package {name.partition('.')[0]}: pip install 'mlx-gptoss[hosted]'"
        ) from error
