"""A loaded model: generate, stream, complete, or look at the logits. api.load() makes one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import index
from types import TracebackType
from typing import TYPE_CHECKING

from .chat.event_queue import AsyncEvents
from .chat.result import Completion, Reply, completion_of, reply_of
from .chat.stream import Events, Prompt, as_conversation, stream_chat, stream_raw
from .config import ModelConfig
from .engine import Engine, LoadedAdapter, Status
from .errors import CheckpointError, InvalidRequest
from .loading.memory import MemoryPlan
from .options import GenerationOptions, RawOptions
from .options.check import shown
from .options.declare import takes
from .sampling import Sampling, default_sampling
from .tokenizer import Tokenizer
from .weights.checkpoint import Checkpoint

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Model:
    """A loaded model, made by load(). A context manager; any number of threads may use it at once.

    config: its sizes. backend: "mlx" or "cuda". format: the name of the checkpoint's format. plan: its memory plan.
    name: as given to load(). load_s: seconds that loading took. default_sampling: from generation_config.json.
    adapters: names of the loaded adapters. default_adapter: the one that requests without a name use; None is the model
    as it is.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        stored_as: str,
        tokenizer: Tokenizer | None,
        engine: Engine,
        backend: str,
        plan: MemoryPlan,
        name: str,
        load_s: float,
        adapters: Mapping[str, LoadedAdapter] | None = None,
    ) -> None:
        self.config: ModelConfig = checkpoint.config
        self._tokenizer = tokenizer
        self.backend = backend
        self.format = stored_as
        self.plan = plan
        self.name = name
        self.load_s = load_s
        self._engine = engine
        self._adapters = dict(adapters or {})
        self.adapters: tuple[str, ...] = tuple(self._adapters)
        self.default_adapter: str | None = None
        self._stop_ids = frozenset(checkpoint.stop_ids)
        self.default_sampling: Sampling = default_sampling(checkpoint.generation_config)

    def __repr__(self) -> str:
        return f"Model({self.name!r}, {self.format} on {self.backend}, context {self.max_context})"

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises CheckpointError if the checkpoint has none, as OpenAI's `original/` folder alone."""
        if self._tokenizer is None:
            raise CheckpointError(
                f"{self.name} has no tokenizer.json: copy it there from the model's repository, or use token ids"
            )
        return self._tokenizer

    @property
    def has_tokenizer(self) -> bool:
        """Whether the checkpoint has a tokenizer."""
        return self._tokenizer is not None

    def logits(self, ids: Sequence[int], adapter: str | None = None) -> NDArray[np.float32]:
        """Teacher-forced logits, float32 [T, V], of one sequence of T token ids. No cache is kept.

        adapter: as of generate(). Raises InvalidRequest for ids outside the vocabulary, for more than the context
        holds, and for an adapter that is not loaded.
        """
        chosen = self._adapter(adapter)
        index = None if chosen is None else chosen.index
        ids = self._checked(ids)
        if len(ids) > self._engine.limits.max_context:
            raise InvalidRequest(f"{len(ids)} tokens exceed the context of {self._engine.limits.max_context}")
        return self._engine.call(lambda runner: runner.logits(ids, index))

    @takes(RawOptions)
    def complete(self, ids: Sequence[int], options: RawOptions) -> Completion:
        """Continue raw token ids without a chat format, up to and including a stop id of the checkpoint.

        Raises InvalidRequest for a prompt that leaves no room in the context.
        """
        return completion_of(self._raw_events(ids, options))

    @takes(RawOptions)
    async def acomplete(self, ids: Sequence[int], options: RawOptions) -> Completion:
        """complete() for a coroutine: the event loop stays free. Cancelling the task ends it within one step.

        Raises as complete() does.
        """
        async with AsyncEvents(lambda: self._raw_events(ids, options)) as events:
            return completion_of([event async for event in events])

    @takes(RawOptions)
    def stream_raw(self, ids: Sequence[int], options: RawOptions) -> Events:
        """complete() as it arrives: TextDelta events, then one Finished. Raises as complete() does, at once."""
        return self._raw_events(ids, options)

    @takes(RawOptions)
    def astream_raw(self, ids: Sequence[int], options: RawOptions) -> AsyncEvents:
        """stream_raw() for `async for`: the event loop stays free. Raises as complete() does, on the first event."""
        return AsyncEvents(lambda: self._raw_events(ids, options))

    @takes(GenerationOptions)
    def generate(self, prompt: Prompt, options: GenerationOptions) -> Reply:
        """Generate one assistant turn and return it whole. stream() gives the same as it arrives.

        prompt: a question; a list of {"role", "content", ...} messages as OpenAI's API takes them; or a Conversation,
            which has its own reasoning, system message and tools.

        The Reply has the answer's text, the reasoning, tool calls, why it ended ("stop", "length" or "tool_calls"),
        token counts, timings, the conversation to continue with and, with a response_format, the answer's value.
        Raises InvalidRequest for a prompt that leaves no room in the context, and for an option that cannot be
        honoured.
        """
        return reply_of(self._events(prompt, options), options.response_format)

    @takes(GenerationOptions)
    async def agenerate(self, prompt: Prompt, options: GenerationOptions) -> Reply:
        """generate() for a coroutine: the event loop stays free. Cancelling the task ends the generation within one
        step.

        prompt: as of generate(). Raises as generate() does.
        """
        async with AsyncEvents(lambda: self._events(prompt, options)) as events:
            return reply_of([event async for event in events], options.response_format)

    @takes(GenerationOptions)
    def stream(self, prompt: Prompt, options: GenerationOptions) -> Events:
        """Generate one assistant turn and yield it as it arrives: ReasoningDelta, TextDelta, ToolCallDelta and ToolCall
        events, then one Finished. generate() gives the same as one Reply.

        prompt: a question; a list of {"role", "content", ...} messages as OpenAI's API takes them; or a Conversation,
            which has its own reasoning, system message and tools.

        Closing the iterator ends the generation within one step. Raises InvalidRequest, at once and not on the first
        event, for a prompt that leaves no room in the context, and for an option that cannot be honoured.
        """
        return self._events(prompt, options)

    @takes(GenerationOptions)
    def astream(self, prompt: Prompt, options: GenerationOptions) -> AsyncEvents:
        """stream() for `async for`: the event loop stays free, and any number of replies may stream at once.

        prompt: as of stream(). It is read on a worker thread when the first event is awaited; do not change it before.

        Leaving the loop, cancelling the task or aclose() ends the generation within one step. Raises as stream() does,
        for a wrong option at once and for a prompt on the first event.
        """
        return AsyncEvents(lambda: self._events(prompt, options))

    def _events(self, prompt: Prompt, options: GenerationOptions) -> Events:
        return stream_chat(
            self._engine,
            self.tokenizer,
            as_conversation(prompt, reasoning=options.reasoning, system=options.system, tools=options.tools),
            options,
            sampling=options.resolve(self.default_sampling),
            stop_ids=self._stop_ids,
            adapter=self._adapter(options.adapter),
        )

    def _raw_events(self, ids: Sequence[int], options: RawOptions) -> Events:
        return stream_raw(
            self._engine,
            self._tokenizer,
            self._checked(ids),
            stop_ids=self._stop_ids,
            sampling=options.resolve(self.default_sampling),
            max_tokens=options.max_tokens,
            adapter=self._adapter(options.adapter),
        )

    def _adapter(self, name: str | None) -> LoadedAdapter | None:
        """Raises InvalidRequest for a name that is not loaded."""
        name = name or self.default_adapter
        if name is None:
            return None
        if name not in self._adapters:
            known = ", ".join(map(repr, self.adapters[:10])) or "none; give them to load(adapters={...})"
            raise InvalidRequest(f"the adapter {shown(name)} is not loaded; loaded are {known}")
        return self._adapters[name]

    @property
    def failure(self) -> BaseException | None:
        """The error that stopped the engine; None while the model works. Load it again after one."""
        return self._engine.failure

    @property
    def max_context(self) -> int:
        """Tokens that the context holds: prompt and reply together."""
        return self._engine.limits.max_context

    def peak_memory(self) -> int:
        """Peak bytes allocated on the device since loading."""
        return self._engine.call(lambda runner: runner.peak_memory())

    @property
    def status(self) -> Status:
        """Slots in use, requests waiting, and the prefix cache's bytes. Raises GptOssError if the model is closed."""
        return self._engine.status

    def close(self) -> None:
        """Fail open streams and free the model's memory."""
        self._engine.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _checked(self, ids: Sequence[int]) -> tuple[int, ...]:
        """The ids as a tuple. Raises InvalidRequest if there are none, or one is outside the vocabulary."""
        try:
            checked = tuple(map(index, ids))  # any type of integer, numpy's too
        except TypeError:
            remedy = "; model.tokenizer.encode(text) makes them" if isinstance(ids, str) else ""
            raise InvalidRequest(f"token ids must be a list of integers, not {shown(ids)}{remedy}") from None
        if not checked:
            raise InvalidRequest("the prompt is empty; give at least one token id")
        if any(not 0 <= i < self.config.vocab_size for i in checked):
            raise InvalidRequest(f"token ids must be from 0 to {self.config.vocab_size - 1}")
        return checked
