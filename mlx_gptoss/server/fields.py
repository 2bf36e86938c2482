"""Fields that several endpoints take. A field that is not declared is refused, by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..sampling import Sampling
from .errors import ApiError, invalid_field

MAX_SCHEMA_VALUES = 10_000  # of one schema
MAX_SCHEMA_DEPTH = 64
MAX_INT64 = 2**63 - 1


class StrictModel(BaseModel):
    """No unknown fields, unless they are null and so ask for nothing, and no "1" for 1."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, fields: Any) -> Any:
        return {name: value for name, value in fields.items() if value is not None} if type(fields) is dict else fields


class IgnoredFields(StrictModel):
    """Fields that say who asks or how to bill; they change nothing in the reply."""

    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: Literal["in_memory", "24h"] | None = None
    service_tier: Literal["auto", "default"] | None = None


class StreamOptions(StrictModel):
    """include_usage: a last chunk with the tokens used."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class SamplingFields(StrictModel):
    """How tokens are drawn. top_k, min_p and repetition_penalty are not OpenAI's, but vLLM's and llama.cpp's."""

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
        """The model's own sampling with what was asked for in its place. Raises InvalidRequest."""
        names = set(SamplingFields.model_fields) - {"logit_bias", "stop"}
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.stop is not None:
            given["stop"] = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if self.logit_bias:
            given["logit_bias"] = {_token_id(token): bias for token, bias in self.logit_bias.items()}
        return replace(default, logprobs=logprobs, **given)


def with_choice_seed(sampling: Sampling, choice: int) -> Sampling:
    """The same for one of several choices: each has a seed of its own, or all would be equal."""
    return sampling if sampling.seed is None else replace(sampling, seed=sampling.seed + choice)


def check_schema(schema: Any, where: str) -> None:
    """Refuse a JSON schema that is too large or too deep to be worked on."""
    level, count = [schema], 0
    for _ in range(MAX_SCHEMA_DEPTH):
        level = [inner for value in level for inner in _children(value)]
        count += len(level)
        if count > MAX_SCHEMA_VALUES:
            raise invalid_field(where, f"holds more than {MAX_SCHEMA_VALUES} values", "schema_too_large")
        if not level:
            return
    raise invalid_field(where, f"is nested more than {MAX_SCHEMA_DEPTH} deep", "schema_too_large")


def _children(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    return value if isinstance(value, list) else []


def _token_id(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise ApiError(400, f"logit_bias has the key {text[:40]!r}: give token ids", param="logit_bias")
    return int(text)
