"""Servers for real clients: the bundled model's, and one whose model follows a script."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import scripted

import mlx_gptoss

pytest.importorskip("fastapi", reason="the server's packages are not installed: pip install '.[serve]'")


@pytest.fixture(scope="session")
def model() -> Iterator[mlx_gptoss.Model]:
    with mlx_gptoss.load(slots=4, max_context=8192) as loaded:
        yield loaded


@pytest.fixture(scope="session")
def server(model: mlx_gptoss.Model) -> Iterator[Any]:
    """A server with the bundled model; its address is `server.url`."""
    with scripted.serving(model) as running:
        yield running


@pytest.fixture
def scripted_server() -> Iterator[Callable[..., Any]]:
    """Call it with replies to get a server whose model gives them; scripted.py says how."""
    with ExitStack() as stack:
        yield lambda replies: stack.enter_context(scripted.serving_script(replies))


@pytest.fixture(scope="session")
def weather_tool() -> dict[str, Any]:
    """The function that the bundled model was trained to call, in the format of chat completions."""
    parameters = {
        "type": "object",
        "properties": {"location": {"type": "string", "description": "City name"}},
        "required": ["location"],
    }
    function = {"name": "get_weather", "description": "Get the current weather.", "parameters": parameters}
    return {"type": "function", "function": function}
