"""A server in a thread on the loopback."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mlx_gptoss import Model
from mlx_gptoss.server.connection import Timeouts
from mlx_gptoss.server.guard import Gate
from mlx_gptoss.server.models.named import NamedModel, model_names
from mlx_gptoss.server.run import Server, listen
from mlx_gptoss.server.service import Service


@contextmanager
def serving(
    model: Model,
    timeouts: Timeouts | None = None,
    aliases: tuple[str, ...] = (),
    strict_model: bool = False,
    **gate: Any,
) -> Iterator[Server]:
    """A running server at `server.url`. gate: fields of its Gate."""
    listener = listen("127.0.0.1", 0)
    service = Service([NamedModel(model, *model_names(None), aliases)], Gate(**gate), strict_model)
    server = Server(service, timeouts=timeouts, drain_s=5)
    server.port = listener.getsockname()[1]
    server.url = f"http://127.0.0.1:{server.port}"
    thread = threading.Thread(target=server.serve_on, args=(listener,))
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        yield server
    finally:
        server.drain()
        thread.join(60)
        assert not thread.is_alive()
