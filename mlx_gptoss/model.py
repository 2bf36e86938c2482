"""A loaded model: generate, stream, complete, or look at the logits. api.load() makes one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from operator import index
from types import TracebackType
from typing import TYPE_CHECKING

from .chat.reply import FinishReason, Timings, ToolCall, Usage, fold
from .chat.stream import Events, Prompt, as_conversation, stream_chat, stream_raw, with_reply
from .config import ModelConfig
from .engine import Engine, Status, Token
from .errors import CheckpointError, InvalidRequest
from .harmony.messages import Conversation
from .loading.memory import MemoryPlan
from .options import GenerationOptions
from .options.check import kind, shown
from .options.declare import takes
from .sampling import Sampling, default_sampling
from .tokenizer import Tokenizer
from .weights.checkpoint import Checkpoint

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Completion:
    """A raw continuation.

    ids: the tokens produced, with the stop id if one ended it. logprobs: their natural log-probabilities under the raw
    logits. top: for each token the likeliest (id, logprob) alternatives, as many as Sampling.logprobs says.
    finish_reason: "stop" or "length".
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    top: tuple[tuple[tuple[int, float], ...], ...]
    text: str
    finish_reason: FinishReason
    usage: Usage
    timings: Timings


@dataclass(frozen=True)
class Reply:
    """One assistant turn.

    text: the answer. reasoning: the analysis before it. finish_reason: "stop", "length" or "tool_calls". ids, logprobs:
    all tokens produced, Harmony's special tokens included. conversation: the prompt with this turn appended.
    """

    text: str
    reasoning: str
    tool_calls: tuple[ToolCall, ...]
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    ids: tuple[int, ...] = field(repr=False)
    logprobs: tuple[Token, ...] = field(repr=False)
    conversation: Conversation = field(repr=False)


class Model:
    """A loaded model, made by load(). A context manager; any number of threads may use it at once.

    config: its sizes. backend: "mlx" or "cuda". format: the name of the checkpoint's format. plan: its memory plan.
    name: as given to load(). load_s: seconds that loading took. default_sampling: from generation_config.json.
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
    ) -> None:
        self.config: ModelConfig = checkpoint.config
        self._tokenizer = tokenizer
        self.backend = backend
        self.format = stored_as
        self.plan = plan
        self.name = name
        self.load_s = load_s
        self._engine = engine
        self._stop_ids = frozenset(checkpoint.stop_ids)
        self.default_sampling: Sampling = default_sampling(checkpoint.generation_config)

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

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Teacher-forced logits, float32 [T, V], of one sequence of T token ids. No cache is kept.

        Raises InvalidRequest for ids outside the vocabulary, and for more than the context holds.
        """
        ids = self._checked(ids)
        if len(ids) > self._engine.limits.max_context:
            raise InvalidRequest(f"{len(ids)} tokens exceed the context of {self._engine.limits.max_context}")
        return self._engine.call(lambda runner: runner.logits(ids))

    def complete(self, ids: Sequence[int], *, max_tokens: int, sampling: Sampling | None = None) -> Completion:
        """Continue raw token ids without a chat format, up to and including a stop id of the checkpoint.

        Raises InvalidRequest for a prompt that leaves no room in the context.
        """
        _, text, _, finished = fold(self.stream_raw(ids, max_tokens=max_tokens, sampling=sampling))
        tokens = finished.tokens
        return Completion(
            ids=tuple(t.id for t in tokens),
            logprobs=tuple(t.logprob for t in tokens),
            top=tuple(t.top for t in tokens),
            text=text,
            finish_reason=finished.finish_reason,
            usage=finished.usage,
            timings=finished.timings,
        )

    def stream_raw(
        self, ids: Sequence[int], *, max_tokens: int | None = None, sampling: Sampling | None = None
    ) -> Events:
        """complete() as it arrives: TextDelta events, then one Finished. max_tokens None: until the context is full."""
        kind("sampling", sampling, (Sampling, type(None)), "a Sampling or None")
        return stream_raw(
            self._engine,
            self._tokenizer,
            self._checked(ids),
            stop_ids=self._stop_ids,
            sampling=sampling or self.default_sampling,
            max_tokens=max_tokens,
        )

    @takes(GenerationOptions)
    def generate(self, prompt: Prompt, options: GenerationOptions) -> Reply:
        """Generate one assistant turn and return it whole. stream() gives the same as it arrives.

        prompt: a question; a list of {"role", "content", ...} messages as OpenAI's API takes them; or a Conversation,
            which has its own reasoning, system message and tools.

        The Reply has the answer's text, the reasoning, tool calls, why it ended ("stop", "length" or "tool_calls"),
        token counts, timings and the conversation to continue with. Raises InvalidRequest for a prompt that leaves no
        room in the context, and for an option that cannot be honoured.
        """
        conversation = _conversation(prompt, options)
        reasoning, text, calls, finished = fold(self._events(conversation, options))
        return Reply(
            text=text,
            reasoning=reasoning,
            tool_calls=calls,
            finish_reason=finished.finish_reason,
            usage=finished.usage,
            timings=finished.timings,
            ids=tuple(t.id for t in finished.tokens),
            logprobs=finished.tokens,
            conversation=with_reply(conversation, finished.messages),
        )

    @takes(GenerationOptions)
    def stream(self, prompt: Prompt, options: GenerationOptions) -> Events:
        """Generate one assistant turn and yield it as it arrives: ReasoningDelta, TextDelta, ToolCallDelta and ToolCall
        events, then one Finished. generate() gives the same as one Reply.

        prompt: a question; a list of {"role", "content", ...} messages as OpenAI's API takes them; or a Conversation,
            which has its own reasoning, system message and tools.

        Closing the iterator ends the generation within one step. Raises InvalidRequest, at once and not on the first
        event, for a prompt that leaves no room in the context, and for an option that cannot be honoured.
        """
        return self._events(_conversation(prompt, options), options)

    def _events(self, conversation: Conversation, options: GenerationOptions) -> Events:
        options = replace(options, sampling=options.sampling or self.default_sampling)
        return stream_chat(self._engine, self.tokenizer, conversation, options, stop_ids=self._stop_ids)

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
            raise InvalidRequest(f"token ids must be a list of integers, not {shown(ids)}") from None
        if not checked:
            raise InvalidRequest("the prompt is empty; give at least one token id")
        if any(not 0 <= i < self.config.vocab_size for i in checked):
            raise InvalidRequest(f"token ids must be from 0 to {self.config.vocab_size - 1}")
        return checked


def _conversation(prompt: Prompt, options: GenerationOptions) -> Conversation:
    return as_conversation(prompt, reasoning=options.reasoning, system=options.system, tools=options.tools)
