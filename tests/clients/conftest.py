"""Servers for real clients, whose model follows a script."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import scripted

pytest.importorskip("fastapi", reason="the server's packages are not installed: pip install '.[serve]'")


@pytest.fixture
def scripted_server() -> Iterator[Callable[..., Any]]:
    """Call it with replies to get a server whose model gives them; scripted.py says how."""
    with ExitStack() as stack:
        yield lambda replies: stack.enter_context(scripted.serving_script(replies))
