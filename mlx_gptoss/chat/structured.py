"""Answers in JSON: a response_format in any of its forms, and the value of the answer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..errors import GptOssError, InvalidRequest
from ..harmony.messages import ResponseFormat
from ..harmony.openai_tools import response_format_of
from ..options.check import shown

_SCHEMA_KEYWORDS = ("properties", "$ref", "anyOf", "oneOf", "allOf", "enum", "const", "items")
_JSON_TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")


def as_response_format(value: Any) -> ResponseFormat | None:
    """Return the ResponseFormat of generate()'s response_format: a pydantic class, a bare JSON schema, or a dict in
    OpenAI's form. None for {"type": "text"}.

    Raises InvalidRequest for anything else. Whether a schema can be enforced is checked later, in guide_for.
    """
    if is_model_class(value):
        return ResponseFormat(value.model_json_schema(), value.__name__)
    if not isinstance(value, Mapping):
        raise InvalidRequest(f"response_format cannot be {shown(value)}; give a JSON schema or a pydantic class")
    kind = value.get("type")
    bare = kind in _JSON_TYPES if isinstance(kind, str) else any(keyword in value for keyword in _SCHEMA_KEYWORDS)
    if not bare and not isinstance(kind, list):
        return response_format_of(value)
    title = value.get("title")
    return ResponseFormat(value, title if isinstance(title, str) and title.strip() else "answer")


def is_model_class(value: Any) -> bool:
    """Whether the value is a pydantic model class, told by its methods: pydantic need not be installed."""
    return isinstance(value, type) and all(
        hasattr(value, name) for name in ("model_json_schema", "model_validate_json")
    )


def parse_answer(text: str, response_format: Any) -> Any:
    """The answer's value: an instance if response_format is a pydantic class, JSON otherwise.

    Raises GptOssError for text that is no JSON, as that of an answer cut off, and what the class's validators raise.
    """
    try:
        json.loads(text)
    except ValueError as error:
        raise GptOssError(f"the answer is cut off before its JSON ends ({error}); raise max_tokens") from error
    return response_format.model_validate_json(text) if is_model_class(response_format) else json.loads(text)
