"""The options of generate() and stream()."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import check
from .declare import Flag, documented, option

if TYPE_CHECKING:
    from ..harmony.messages import Effort
    from ..sampling import Sampling


@documented
@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How to generate one assistant turn."""

    sampling: Sampling | None = option(
        None,
        "How to choose tokens. Default: as the checkpoint's generation_config.json says; for gpt-oss, temperature 1.",
    )
    max_tokens: int | None = option(
        None,
        "Maximum tokens to generate, reasoning included. Default: until the model stops or the context is full.",
        Flag("N", minimum=1),
    )
    reasoning: Effort | None = option(
        None, 'How much to think: "low", "medium" (the default) or "high".', Flag(choices=("low", "medium", "high"))
    )
    system: str | None = option(None, "Instructions to the model (a developer message).", Flag("TEXT"))
    tools: Sequence[Mapping[str, Any]] = option(
        (),
        'Functions in OpenAI\'s form: {"type": "function", "function": {"name", "description", "parameters", '
        '"strict"}}. The arguments of every call obey the schema. What cannot be enforced of it is refused with '
        '"strict"; otherwise it is left out, and a warning is logged.',
    )
    response_format: Mapping[str, Any] | None = option(
        None,
        '{"type": "json_schema", "json_schema": {"name", "schema"}} or {"type": "json_object"}: the final answer obeys '
        'it, unless it is cut off ("length"). A schema that cannot be enforced is refused.',
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
        from ..sampling import Sampling  # which imports this package

        check.kind("sampling", self.sampling, (Sampling, type(None)), "a Sampling or None")
        if self.max_tokens is not None:
            check.integer("max_tokens", self.max_tokens, 1)
        if self.reasoning is not None:
            check.one_of("reasoning", self.reasoning, ("low", "medium", "high"))
        check.kind("system", self.system, (str, type(None)), "a string or None")
        check.kind("tools", self.tools, (list, tuple), "a list of functions")
        check.kind("response_format", self.response_format, (Mapping, type(None)), "an object or None")
        check.kind("tool_choice", self.tool_choice, (str, Mapping), "a string or an object")
        check.kind("stop_token_ids", self.stop_token_ids, (list, tuple), "a list of token ids")
        check.kind("parallel_tool_calls", self.parallel_tool_calls, bool, "True or False")
