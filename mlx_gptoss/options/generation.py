"""The options of generate() and stream(), and of complete() and stream_raw()."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import check
from .declare import Flag, documented, option
from .sampling import SamplingOptions

if TYPE_CHECKING:
    from ..harmony.messages import Effort


@documented
@dataclass(frozen=True, kw_only=True)
class RawOptions(SamplingOptions):
    """How to continue token ids."""

    max_tokens: int | None = option(
        None,
        "Maximum tokens to generate, reasoning included. Default: until the model stops or the context is full.",
        Flag("N", minimum=1),
    )

    adapter: str | None = option(None, "The adapter to use, by its name in load(). Default: the model as it is.")

    def __post_init__(self) -> None:
        """Raise InvalidRequest for a value of another type or out of range."""
        super().__post_init__()
        check.name_or_none("adapter", self.adapter)
        if self.max_tokens is not None:
            check.integer("max_tokens", self.max_tokens, 1)


@documented
@dataclass(frozen=True, kw_only=True)
class GenerationOptions(RawOptions):
    """How to generate one assistant turn."""

    reasoning: Effort | None = option(
        None, 'How much to think: "low", "medium" (the default) or "high".', Flag(choices=("low", "medium", "high"))
    )
    system: str | None = option(None, "Instructions to the model (a developer message).", Flag("TEXT"))
    tools: Sequence[Callable[..., Any] | Mapping[str, Any]] = option(
        (),
        "Functions that the model may call: Python functions with type hints, Tools, or dicts in OpenAI's form, "
        '{"type": "function", "function": {"name", "description", "parameters", "strict"}}. answer() also carries out '
        "the calls. The arguments of every call obey the schema. What cannot be enforced of it is refused with "
        '"strict"; otherwise it is left out, and a warning is logged.',
    )
    response_format: type[Any] | Mapping[str, Any] | None = option(
        None,
        "A pydantic class, a JSON schema, or OpenAI's "
        '{"type": "json_schema", "json_schema": {"name", "schema"}} or {"type": "json_object"}: the final answer obeys '
        'it, unless it is cut off ("length"), and Reply.parsed is its value. A schema that cannot be enforced is '
        "refused.",
    )
    tool_choice: str | Mapping[str, Any] = option(
        "auto", '"auto"; "none"; "required": the turn ends in a call; a function\'s name: in a call of that function.'
    )
    stop_token_ids: Sequence[int] = option((), "Ids of tokens that end the turn, besides the model's own. At most 64.")
    parallel_tool_calls: bool = option(
        True, "False allows one call a turn. gpt-oss ends its turn with a call, so there is never more than one."
    )

    def __post_init__(self) -> None:
        """Raise InvalidRequest for a value of another type or out of range. What tools and schemas say is checked when
        they are read."""
        super().__post_init__()
        if self.reasoning is not None:
            check.one_of("reasoning", self.reasoning, ("low", "medium", "high"))
        check.kind("system", self.system, (str, type(None)), "a string or None")
        check.kind("tools", self.tools, (list, tuple), "a list of functions: put it in brackets, [...]")
        kinds = "a pydantic class (not an instance of it), a JSON schema or None"
        check.kind("response_format", self.response_format, (Mapping, type, type(None)), kinds)
        check.kind("tool_choice", self.tool_choice, (str, Mapping), "a string or an object")
        check.kind("stop_token_ids", self.stop_token_ids, (list, tuple), "a list of token ids")
        check.kind("parallel_tool_calls", self.parallel_tool_calls, bool, "True or False")
