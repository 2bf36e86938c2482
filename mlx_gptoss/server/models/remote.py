"""A model that a process of its own runs, while it is loaded. The server uses it as it uses a Model."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from ...chat.stream import Events
from ...config import ModelConfig
from ...engine import Status
from ...errors import CheckpointError, ModelUnavailable
from ...loading.memory import MemoryPlan
from ...loading.plan import LoadRequest, adapter_folders
from ...options import LoadOptions
from ...sampling import Sampling, default_sampling
from ...tokenizer import Tokenizer
from ...weights import checkpoint as checkpoints
from .messages import Loaded
from .process import ModelProcess

State = Literal["unloaded", "loading", "loaded", "failed"]


class RemoteModel:
    """A model, loaded or not. The pool (pool.py) loads and unloads it.

    What the headers of its checkpoint say is known at once. name: for messages. config, format, default_sampling,
    tokenizer: as of Model. size_bytes: of its weights. backend, plan: of the loaded model; before that, "" and None.
    state: "failed" after it could not be loaded, with the reason in load_error. process: while it is loading or loaded.
    waiting: requests that wait until it is loaded. in_use: those that need it to stay loaded. used_at: time.monotonic()
    at the end of the last one.
    loads, crashes: how often it was loaded, and how often its process ended by itself.

    Raises CheckpointError if the checkpoint cannot be opened, and for an adapter that does not fit it.
    """

    def __init__(self, name: str, path: Path, options: LoadOptions) -> None:
        checkpoint = checkpoints.open(path)
        cache = options.prompt_cache and Path(options.prompt_cache).resolve()
        adapters = options.adapters and adapter_folders(options.adapters, checkpoint.config)
        options = replace(options, prompt_cache=cache, adapters=adapters)
        self.request: LoadRequest = LoadRequest.of(str(path.resolve()), options)
        self.name = name
        self.config: ModelConfig = checkpoint.config
        self.format: str = self.request.quantize or checkpoint.format
        self.size_bytes: int = checkpoint.size_bytes
        self.default_sampling: Sampling = default_sampling(checkpoint.generation_config)
        self.backend: str = ""
        self.plan: MemoryPlan | None = None
        self.process: ModelProcess | None = None
        self.state: State = "unloaded"
        self.load_error: Exception | None = None
        self.waiting: int = 0
        self.in_use: int = 0
        self.used_at: float = time.monotonic()
        self.loads: int = 0
        self.crashes: int = 0
        self._checkpoint = checkpoint
        self._tokenizer_lock = threading.Lock()

    async def read_tokenizer(self) -> None:
        """Read the tokenizer on another thread, for its first use: half a second for the published vocabulary."""
        if "_tokenizer" not in self.__dict__:
            await asyncio.to_thread(self._read_tokenizer)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises CheckpointError if the checkpoint has none."""
        tokenizer = self._read_tokenizer()
        if tokenizer is None:
            raise CheckpointError(f"{self.name} has no tokenizer.json: copy it there from the model's repository")
        return tokenizer

    def _read_tokenizer(self) -> Tokenizer | None:
        with self._tokenizer_lock:
            return self._tokenizer

    @cached_property
    def _tokenizer(self) -> Tokenizer | None:
        return self._checkpoint.tokenizer()

    @property
    def max_context(self) -> int:
        """Tokens that the context holds. Before the model has been loaded: that it may hold, if memory allows."""
        if self.plan is not None:
            return self.plan.context
        return self.request.max_context or self.config.max_position_embeddings

    @property
    def failure(self) -> BaseException | None:
        """None: a process that has failed is replaced by a new one."""
        return None

    @property
    def status(self) -> Status:
        """Slots in use, requests waiting, and the prefix cache's bytes, by what this server knows."""
        slots, prefix_bytes = self.request.slots, self.process.prefix_bytes if self.process else 0
        return Status(slots, min(self.in_use, slots), max(self.in_use - slots, 0) + self.waiting, prefix_bytes)

    def stream(self, prompt: Any, **options: Any) -> Events:
        """Model.stream(). Raises ModelUnavailable if the model is not loaded any more."""
        return self._loaded_process().start("stream", prompt, options)

    def stream_raw(self, ids: Any, **options: Any) -> Events:
        """Model.stream_raw(). Raises ModelUnavailable if the model is not loaded any more."""
        return self._loaded_process().start("stream_raw", ids, options)

    def attach(self, process: ModelProcess, loaded: Loaded) -> None:
        """The process has loaded the model. Raises ModelUnavailable if it has ended since."""
        if process.ended:
            raise ModelUnavailable(f"the process of {self.name} ended right after loading")
        self.process, self.backend, self.plan, self.state = process, loaded.backend, loaded.memory, "loaded"
        self.load_error = None
        self.loads += 1
        self.used_at = time.monotonic()

    def planned(self, available_bytes: int | None) -> LoadRequest:
        """The request for a plan in which the model may take this much memory."""
        return replace(self.request, available_bytes=available_bytes)

    def _loaded_process(self) -> ModelProcess:
        process = self.process
        if process is None or self.state != "loaded":
            raise ModelUnavailable(f"{self.name} was unloaded; send the request again")
        return process
