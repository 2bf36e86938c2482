"""Request fields of /api/chat and /api/generate."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from ...harmony.messages import Effort
from ...sampling import MAX_LOGPROBS, Sampling
from ..errors import invalid_field
from ..fields import MAX_INT64, Name, Object, RequestModel, SamplingFields, effort_of

_INTEGERS = ("num_predict", "seed", "top_k")  # options that clients may write as 40.0
_ZERO_DURATION = re.compile(r"[+-]?(0+(\.0*)?(ns|us|µs|ms|s|m|h)?)+")  # in the syntax of Go


def _none_unless_positive(value: Any) -> Any:
    return None if type(value) is int and value <= 0 else value


class Options(SamplingFields):
    """The options that have an effect. A num_predict of 0 or less means no limit."""

    num_predict: Annotated[Annotated[int, Field(ge=1, le=MAX_INT64)] | None, BeforeValidator(_none_unless_positive)] = (
        None
    )

    @model_validator(mode="before")
    @classmethod
    def _whole_floats(cls, fields: Any) -> Any:
        if type(fields) is not dict:
            return fields
        whole = {name: fields[name] for name in _INTEGERS if type(fields.get(name)) is float}
        return {**fields, **{name: int(value) for name, value in whole.items() if value.is_integer()}}


class GenerationFields(RequestModel):
    """What chat and generate have in common.

    stream: true by default. think: false asks for little reasoning and leaves it out of the reply, a level sets the
    effort; otherwise the effort is medium. format: "json" or a JSON schema. keep_alive: has no effect, since the model
    stays loaded for as long as the server decides; with 0 and nothing to generate, it is unloaded.
    """

    model: Name | None = None
    stream: bool | None = None
    think: bool | Name | None = None
    format: Name | Object | None = None
    options: Options = Field(default_factory=lambda: Options.model_validate({}))
    keep_alive: float | Annotated[str, Field(max_length=64)] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    def check(self) -> None:
        """Raise ApiError for what cannot be honoured."""
        self.check_rejected()
        if isinstance(self.format, str) and self.format not in ("", "json"):
            raise invalid_field("format", f'is {self.format!r:.100}: use "json" or a JSON schema')

    @property
    def streamed(self) -> bool:
        return self.stream is not False

    @property
    def effort(self) -> Effort:
        """The reasoning effort. Raises ApiError for an unknown level."""
        return effort_of(self.think, "think") or "medium"

    @property
    def response_format(self) -> dict[str, Any] | None:
        """The format, as OpenAI's API spells it."""
        if isinstance(self.format, dict):
            return {"type": "json_schema", "json_schema": {"schema": self.format}}
        return {"type": "json_object"} if self.format else None

    @property
    def max_tokens(self) -> int | None:
        return self.options.num_predict

    def sampling(self, default: Sampling) -> Sampling:
        """The model's default sampling, with the options in place of its own."""
        alternatives = (self.top_logprobs or 0) if self.logprobs else 0
        return self.options.sampling(default, alternatives)

    @property
    def idle_reason(self) -> str:
        """The done_reason of a request with nothing to generate: "unload" if it asks to free the model, or "load"."""
        value = self.keep_alive
        unload = bool(_ZERO_DURATION.fullmatch(value)) if isinstance(value, str) else value == 0
        return "unload" if unload else "load"

    def ignored_fields(self) -> set[str]:
        return super().ignored_fields() | ({"keep_alive"} if self.keep_alive is not None else set())
