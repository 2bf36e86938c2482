"""Request fields that several endpoints share. A field that no class declares is rejected with its name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..sampling import Sampling
from .errors import ApiError, invalid_field

MAX_SCHEMA_VALUES = 10_000  # in one JSON schema
MAX_SCHEMA_DEPTH = 64
MAX_INT64 = 2**63 - 1


class StrictModel(BaseModel):
    """A model that rejects unknown fields and wrong types ("1" is not 1).

    A field that is null counts as absent, even an unknown one.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, fields: Any) -> Any:
        return {name: value for name, value in fields.items() if value is not None} if type(fields) is dict else fields


class IgnoredFields(StrictModel):
    """Fields about the caller, caching and billing. They are accepted and have no effect on the reply."""

    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: Literal["in_memory", "24h"] | None = None
    service_tier: Literal["auto", "default"] | None = None


class StreamOptions(StrictModel):
    """include_usage: end the stream with a chunk that has the token counts."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class SamplingFields(StrictModel):
    """How tokens are sampled. top_k, min_p and repetition_penalty extend OpenAI's fields, as in vLLM and llama.cpp."""

    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=MAX_INT64)
    min_p: float | None = Field(None, ge=0, lt=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = Field(None, max_length=1024)
    seed: int | None = Field(None, ge=0, le=MAX_INT64)
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None

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


def with_choice_seed(sampling: Sampling, choice: int) -> Sampling:
    """The sampling of one of several choices. Each gets its own seed; with the same one all choices would be equal."""
    return sampling if sampling.seed is None else replace(sampling, seed=sampling.seed + choice)


def check_schema(schema: Any, param: str) -> None:
    """Raise ApiError if a JSON schema has too many values or is nested too deeply to be compiled. param: its field."""
    level, count = [schema], 0
    for _ in range(MAX_SCHEMA_DEPTH):
        level = [inner for value in level for inner in _children(value)]
        count += len(level)
        if count > MAX_SCHEMA_VALUES:
            raise invalid_field(param, f"holds more than {MAX_SCHEMA_VALUES} values", "schema_too_large")
        if not level:
            return
    raise invalid_field(param, f"is nested more than {MAX_SCHEMA_DEPTH} levels deep", "schema_too_large")


def _children(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    return value if isinstance(value, list) else []


def _token_id(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise ApiError(400, f"logit_bias has the key {text[:40]!r}: use token ids as keys", param="logit_bias")
    return int(text)
