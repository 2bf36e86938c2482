"""Packages that the base install does not bring: `from requires import torch` imports one or says how to get it."""

import sys
from importlib import import_module
from types import ModuleType

INSTALL = {
    "torch": "python -m pip install -e '.[test]'",
    "gguf": "python -m pip install -e '.[test]'",
    "auto_round": "python -m pip install --no-deps auto-round (tests/README.md has what else it needs)",
    "llama_cpp": "python -m pip install llama-cpp-python",
}


def __getattr__(name: str) -> ModuleType:
    """The package; without it the program ends with exit code 1 and one line on stderr."""
    if name not in INSTALL:
        raise AttributeError(name)
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        sys.exit(f"error: this program needs {name}, which is not installed; run: {INSTALL[name]}")
