"""Request fields that several endpoints share, and what their values mean here.

What has no effect on the reply is accepted and listed by RequestModel.ignored_fields(). Values that other servers give
a meaning, such as -1 for "no limit", are mapped to it. Rejected is what would make the reply something other than the
client asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar, get_args

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)
from pydantic_core import PydanticCustomError

from ..harmony.messages import Effort
from ..sampling import MAX_STOP_CHARACTERS, MAX_STOPS, Sampling
from .errors import ApiError, invalid_field

MAX_SCHEMA_VALUES = 10_000  # in one JSON schema
MAX_SCHEMA_DEPTH = 64
MAX_SCHEMA_CHARACTERS = 2 << 20  # in one JSON schema, and in all tools together: more than the context holds
MAX_NAME_CHARACTERS = 1024
MAX_FIELDS = 1000  # of one object
MAX_PARTS = 10_000  # of one message
MAX_TOKEN_IDS = 1 << 17  # the longest context
MAX_INT64 = 2**63 - 1
MAX_MESSAGES = 10_000
MAX_TOOLS = 1024
MIN_TOP_P = 1e-6  # what 0 means: the likeliest token alone
EFFORTS: Mapping[str, Effort] = {
    "none": "low",
    "minimal": "low",
    "low": "low",
    "medium": "medium",
    "high": "high",
    "xhigh": "high",
    "max": "high",
}
# Fields of other servers that would change the reply. The message says what to do instead.
REJECTED_FIELDS: Mapping[str, str] = {
    "audio": "is not supported: the model writes only text",
    "best_of": "is not supported: use n",
    "functions": "is not supported: use tools",
    "grammar": "is not supported: use response_format",
    "guided_choice": "is not supported: use response_format with an enum",
    "guided_grammar": "is not supported: use response_format",
    "guided_regex": "is not supported: use response_format with a pattern",
    "structured_outputs": "is not supported: use response_format",
    "suffix": "is not supported: the model continues a text only at its end",
}


class RequestModel(BaseModel):
    """A request, or an object in one. Wrong types are rejected ("1" is not 1); null counts as absent.

    Unknown fields are accepted. Fields in REJECTED_FIELDS that a class does not declare are rejected.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="allow", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, fields: Any) -> Any:
        if type(fields) is not dict:
            return fields
        if len(fields) > MAX_FIELDS:
            raise PydanticCustomError("too_many_fields", f"has more than {MAX_FIELDS} fields")
        return {name: value for name, value in fields.items() if value is not None}

    def ignored_fields(self) -> set[str]:
        """The paths of the fields that have no effect, such as "stream_options.include_obfuscation"."""
        return set(self._ignored(""))

    def _ignored(self, prefix: str) -> Iterator[str]:
        yield from (prefix + name for name in self.model_extra or ())
        for name in self.model_fields_set - set(self.model_extra or ()):
            value = getattr(self, name)
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, RequestModel):
                    yield from item._ignored(f"{prefix}{name}{'[]' if isinstance(value, list) else ''}.")

    def check_rejected(self) -> None:
        """Raise ApiError for a field that cannot be honoured. An empty value asks for nothing."""
        for name, value in (self.model_extra or {}).items():
            if name in REJECTED_FIELDS and value not in ("", [], {}, False, 0, 1):
                raise invalid_field(name, REJECTED_FIELDS[name], "unsupported_parameter")


def _none_if_negative(value: Any) -> Any:
    return None if type(value) is int and value < 0 else value


def _positive_top_p(value: Any) -> Any:
    return MIN_TOP_P if type(value) in (int, float) and value == 0 else value


def _off_if_negative(value: Any) -> Any:
    return 0 if type(value) is int and value < 0 else value


def _seed(value: Any) -> Any:
    """-1 asks for a random seed. Other negative seeds are as good as any: OpenAI's API takes them."""
    if type(value) is not int or value >= 0:
        return value
    return None if value == -1 else value % (MAX_INT64 + 1)


def _without_empty(value: Any) -> Any:
    """Stop strings without empty ones, which would match everywhere."""
    return [text for text in value if text != ""] if isinstance(value, list) else value or None


def check_schema(schema: Any, param: str) -> None:
    """Raise ApiError if a JSON schema is too large or nested too deeply to be compiled. param: its field."""
    if (problem := _schema_problem(schema)) is not None:
        raise invalid_field(param, problem, "schema_too_large")


def _schema_problem(schema: Any) -> str | None:
    """What is wrong with the size of a JSON schema or any other value; None if it is within the limits."""
    level, values, characters = [schema], 0, 0
    for _ in range(MAX_SCHEMA_DEPTH):
        characters += sum(map(_characters, level))
        level = [inner for value in level for inner in _children(value)]
        values += len(level)
        if values > MAX_SCHEMA_VALUES:
            return f"holds more than {MAX_SCHEMA_VALUES} values"
        if characters > MAX_SCHEMA_CHARACTERS:
            return f"holds more than {MAX_SCHEMA_CHARACTERS} characters"
        if not level:
            return None
    return f"is nested more than {MAX_SCHEMA_DEPTH} levels deep"


def _characters(value: Any) -> int:
    """Number of characters of a string, or of the names in an object."""
    if isinstance(value, Mapping):
        return sum(map(len, value))
    return len(value) if isinstance(value, str) else 0


def _children(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    return value if isinstance(value, list) else []


def _small_object(value: dict[str, Any]) -> dict[str, Any]:
    if (problem := _schema_problem(value)) is not None:
        raise PydanticCustomError("schema_too_large", problem)
    return value


def _small_together(tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    level, characters = list(tools), 0
    while level and characters <= MAX_SCHEMA_CHARACTERS:
        characters += sum(map(_characters, level))
        level = [inner for value in level for inner in _children(value)]
    if characters > MAX_SCHEMA_CHARACTERS:
        raise PydanticCustomError("schema_too_large", f"hold more than {MAX_SCHEMA_CHARACTERS} characters together")
    return tools


MaxTokens = Annotated[Annotated[int, Field(ge=1, le=MAX_INT64)] | None, BeforeValidator(_none_if_negative)]
Name = Annotated[str, Field(max_length=MAX_NAME_CHARACTERS)]  # of anything: a model, a user, a choice
Metadata = Annotated[dict[Name, Annotated[str, Field(max_length=4096)]], Field(max_length=64)]
TokenIds = Annotated[list[int], Field(max_length=MAX_TOKEN_IDS, fail_fast=True)]
Object = Annotated[dict[str, Any], AfterValidator(_small_object)]  # a JSON schema, or an object of options
Tools = Annotated[list[Object], Field(max_length=MAX_TOOLS), AfterValidator(_small_together)]
StopString = Annotated[str, Field(max_length=MAX_STOP_CHARACTERS)]
StopStrings = Annotated[
    StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None, BeforeValidator(_without_empty)
]


class StreamOptions(RequestModel):
    """include_usage: end the stream with a chunk that has the token counts."""

    include_usage: bool | None = None


class SamplingFields(RequestModel):
    """How tokens are sampled. top_k, min_p and repetition_penalty extend OpenAI's fields, as in vLLM and llama.cpp.

    repeat_penalty is llama.cpp's name of repetition_penalty. A negative top_k is off, a seed of -1 random, a top_p of 0
    the likeliest token.
    """

    temperature: float | None = Field(None, ge=0, le=2)
    top_p: Annotated[Annotated[float, Field(gt=0, le=1)] | None, BeforeValidator(_positive_top_p)] = None
    top_k: Annotated[Annotated[int, Field(ge=0, le=MAX_INT64)] | None, BeforeValidator(_off_if_negative)] = None
    min_p: float | None = Field(None, ge=0, lt=1)
    repetition_penalty: float | None = Field(
        None, gt=0, le=10, validation_alias=AliasChoices("repetition_penalty", "repeat_penalty")
    )
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[Name, float] | None = Field(None, max_length=1024)
    seed: Annotated[Annotated[int, Field(ge=0, le=MAX_INT64)] | None, BeforeValidator(_seed)] = None
    stop: StopStrings = None

    def sampling(self, default: Sampling, logprobs: int = 0) -> Sampling:
        """The model's default sampling, with the fields of the request in place of its own.

        logprobs: number of alternatives per token. Raises InvalidRequest for a value out of range.
        """
        names = set(SamplingFields.model_fields) - {"logit_bias", "stop"}
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.stop is not None:
            given["stop"] = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if self.logit_bias:
            given["logit_bias"] = {_token_id(token): bias for token, bias in self.logit_bias.items()}
        return replace(default, logprobs=logprobs, **given)


def effort_of(value: Any, param: str) -> Effort | None:
    """The reasoning effort of a request field: a name, or a boolean for some or little reasoning. None for no wish.

    Raises ApiError for an unknown name.
    """
    if value is None or value is True:
        return None
    if value is False:
        return "low"
    if not isinstance(value, str) or value.lower() not in EFFORTS:
        raise invalid_field(param, f"is {value!r:.100}: use one of {', '.join(get_args(Effort))}")
    return EFFORTS[value.lower()]


def effort_of_thinking(thinking: Any) -> Effort | None:
    """The effort of Anthropic's `thinking`: low if it is disabled, else by its budget of tokens. None for no wish."""
    if not isinstance(thinking, Mapping):
        return effort_of(thinking, "thinking") if isinstance(thinking, (bool, str)) else None
    if thinking.get("type") == "disabled":
        return "low"
    budget = thinking.get("budget_tokens")
    if not isinstance(budget, int) or isinstance(budget, bool):
        return None
    return "low" if budget <= 2048 else "medium" if budget <= 16_384 else "high"


def with_choice_seed(sampling: Sampling, choice: int) -> Sampling:
    """The sampling of one of several choices. Each gets its own seed; with the same one all choices would be equal."""
    return sampling if sampling.seed is None else replace(sampling, seed=sampling.seed + choice)


def _token_id(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise ApiError(400, f"logit_bias has the key {text[:40]!r}: use token ids as keys", param="logit_bias")
    return int(text)
