"""A loaded model as Python sees it: generate, stream, complete, or look at the logits. api.load() makes one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

from .chat.reply import FinishReason, Timings, ToolCall, Usage, fold
from .chat.stream import Events, Prompt, as_conversation, stream_chat, stream_raw, with_reply
from .config import ModelConfig
from .engine import Engine, Status, Token
from .errors import CheckpointError, InvalidRequest
from .harmony.messages import Conversation, Effort
from .loading.memory import MemoryPlan
from .sampling import Sampling, default_sampling
from .tokenizer import Tokenizer
from .weights.checkpoint import Checkpoint

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Completion:
    """A raw continuation. ids: with the stop id, if one ended it. logprobs: natural logarithms under the raw logits.
    top: per token the (id, logprob) alternatives that Sampling.logprobs asked for."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    top: tuple[tuple[tuple[int, float], ...], ...]
    text: str
    finish_reason: FinishReason
    usage: Usage
    timings: Timings


@dataclass(frozen=True)
class Reply:
    """One assistant turn. ids: all tokens produced, Harmony's included. conversation: with this turn appended."""

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
    """A loaded model. Made by load(); a context manager. Safe to use from several threads."""

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
        self.default_sampling = default_sampling(checkpoint.generation_config)

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises CheckpointError if the checkpoint came without one, as OpenAI's `original/` folder does alone."""
        if self._tokenizer is None:
            raise CheckpointError(
                f"{self.name} has no tokenizer.json: copy it there from the model's repository, or use token ids"
            )
        return self._tokenizer

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Teacher-forced logits, float32 [T, V], of one sequence of T ids. No cache is kept."""
        ids = self._checked(ids)
        if len(ids) > self._engine.limits.max_context:
            raise InvalidRequest(f"{len(ids)} tokens exceed the context of {self._engine.limits.max_context}")
        return self._engine.call(lambda runner: runner.logits(ids))

    def complete(self, ids: Sequence[int], *, max_tokens: int, sampling: Sampling | None = None) -> Completion:
        """Continue raw token ids, up to and including a stop id of the checkpoint."""
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
        """The same as it arrives: TextDelta events, then Finished."""
        return stream_raw(
            self._engine,
            self._tokenizer,
            self._checked(ids),
            stop_ids=self._stop_ids,
            sampling=sampling or self.default_sampling,
            max_tokens=max_tokens,
        )

    def generate(
        self,
        prompt: Prompt,
        *,
        sampling: Sampling | None = None,
        max_tokens: int | None = None,
        reasoning: Effort | None = None,
        system: str | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        response_format: Mapping[str, Any] | None = None,
        tool_choice: str | Mapping[str, Any] = "auto",
        parallel_tool_calls: bool = True,
    ) -> Reply:
        """One assistant turn, whole: stream() folded, with the same options."""
        conversation = as_conversation(prompt, reasoning=reasoning, system=system, tools=tools)
        events = self.stream(
            conversation,
            sampling=sampling,
            max_tokens=max_tokens,
            response_format=response_format,
            tool_choice=tool_choice,
            parallel_tool_calls=parallel_tool_calls,
        )
        thoughts, text, calls, finished = fold(events)
        return Reply(
            text=text,
            reasoning=thoughts,
            tool_calls=calls,
            finish_reason=finished.finish_reason,
            usage=finished.usage,
            timings=finished.timings,
            ids=tuple(t.id for t in finished.tokens),
            logprobs=finished.tokens,
            conversation=with_reply(conversation, finished.messages),
        )

    def stream(
        self,
        prompt: Prompt,
        *,
        sampling: Sampling | None = None,
        max_tokens: int | None = None,
        reasoning: Effort | None = None,
        system: str | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        response_format: Mapping[str, Any] | None = None,
        tool_choice: str | Mapping[str, Any] = "auto",
        parallel_tool_calls: bool = True,
    ) -> Events:
        """One assistant turn as it arrives: ReasoningDelta, TextDelta, ToolCallDelta and ToolCall events, then
        Finished.

        prompt: a question; a list of {"role", "content", ...} as OpenAI's API takes them; or a Conversation, which
            brings its own reasoning, system and tools.
        sampling: None samples as the checkpoint's generation_config.json says, for gpt-oss at temperature 1.
        max_tokens: None generates until the model stops or the context is full.
        reasoning: "low", "medium" (the default) or "high". system: instructions to the model.
        tools: functions in OpenAI's form, {"type": "function", "function": {"name", "description", "parameters",
            "strict"}}. With "strict" the arguments of a call obey the schema; otherwise the model is only shown it.
        response_format: {"type": "json_schema", "json_schema": {"name", "schema"}} or {"type": "json_object"}: the
            final answer obeys it, unless it is cut off ("length"). What cannot be enforced of a schema is refused.
        tool_choice: "auto"; "none"; "required": the turn ends in a call; a function's name: in a call of that one.
        parallel_tool_calls: False allows one call a turn. gpt-oss ends its turn by a call, so this is what it does.
        Closing the iterator ends the generation. Raises InvalidRequest for what cannot be honoured.
        """
        return stream_chat(
            self._engine,
            self.tokenizer,
            as_conversation(prompt, reasoning=reasoning, system=system, tools=tools),
            stop_ids=self._stop_ids,
            sampling=sampling or self.default_sampling,
            max_tokens=max_tokens,
            response_format=response_format,
            tool_choice=tool_choice,
            parallel_tool_calls=parallel_tool_calls,
        )

    def peak_memory(self) -> int:
        """Most bytes the device held at once since loading."""
        return self._engine.call(lambda runner: runner.peak_memory())

    @property
    def status(self) -> Status:
        """What the engine is doing. Raises GptOssError if the model is closed."""
        return self._engine.status

    def close(self) -> None:
        self._engine.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _checked(self, ids: Sequence[int]) -> tuple[int, ...]:
        """Token ids as the engine takes them; InvalidRequest for none, or one outside the vocabulary."""
        checked = tuple(int(i) for i in ids)
        if not checked:
            raise InvalidRequest("the prompt is empty; give at least one token id")
        if any(not 0 <= i < self.config.vocab_size for i in checked):
            raise InvalidRequest(f"token ids must be from 0 to {self.config.vocab_size - 1}")
        return checked
