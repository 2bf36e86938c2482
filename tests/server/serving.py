"""A server in a thread on the loopback."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_gptoss import Model
from mlx_gptoss.options import LoadOptions
from mlx_gptoss.server.connection import Timeouts
from mlx_gptoss.server.guard import Gate
from mlx_gptoss.server.models.named import NamedModel, model_names, with_adapters
from mlx_gptoss.server.models.pool import ModelPool
from mlx_gptoss.server.models.remote import RemoteModel
from mlx_gptoss.server.run import Server, listen
from mlx_gptoss.server.service import Service


@contextmanager
def serving_models(
    models: Mapping[str, Path], idle_unload: float | None = None, strict_model: bool = False, **options: Any
) -> Iterator[Server]:
    """A running server of several models, each in a process of its own. options: LoadOptions' fields; the adapters are
    the first model's."""
    first = LoadOptions(**options)
    others = replace(first, adapters=None)
    remote = {name: RemoteModel(name, path, others if at else first) for at, (name, path) in enumerate(models.items())}
    pool = ModelPool(list(remote.values()), idle_unload_s=idle_unload)
    named = [NamedModel(model, name) for name, model in remote.items()]
    named[:1] = with_adapters(named[0], tuple(first.adapters or ()))
    with running(Service(named, Gate(), strict_model, pool)) as server:
        yield server


@contextmanager
def serving(
    model: Model,
    timeouts: Timeouts | None = None,
    aliases: tuple[str, ...] = (),
    strict_model: bool = False,
    **gate: Any,
) -> Iterator[Server]:
    """A running server of one model, and of its adapters. gate: fields of its Gate."""
    named = NamedModel(model, *model_names(None), aliases)
    with running(Service(with_adapters(named, model.adapters), Gate(**gate), strict_model), timeouts) as server:
        yield server


@contextmanager
def running(service: Service, timeouts: Timeouts | None = None) -> Iterator[Server]:
    """A running server at `server.url`."""
    listener = listen("127.0.0.1", 0)
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
