"""A conversation as plain JSON data and back, to keep it in a file or a database.

Fields with their default values are left out, so that old data stays readable when fields are added.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, TypeVar, get_args

from ..errors import InvalidRequest
from .messages import (
    BuiltinTool,
    Conversation,
    Effort,
    Function,
    Message,
    ResponseFormat,
    Role,
    Syntax,
    TextFormat,
)

VERSION = 1
MAX_MESSAGES = 100_000
MAX_NESTING = 100  # of a JSON schema

T = TypeVar("T")
Read = Callable[[Any, str], Any]


def to_dict(conversation: Conversation) -> dict[str, Any]:
    """The data of a conversation: dicts, lists, strings, numbers, booleans and None."""
    return {"version": VERSION, **_plain(conversation, "the conversation")}


def from_dict(data: Any) -> Conversation:
    """The conversation of to_dict(). Raises InvalidRequest, which names the place, for other data."""
    if not isinstance(data, Mapping) or "version" not in data:
        raise InvalidRequest("a saved conversation is a dict with a version, as Conversation.to_dict() makes it")
    if data["version"] != VERSION or isinstance(data["version"], bool):
        known = f"this program reads version {VERSION}; update mlx-gptoss"
        raise InvalidRequest(f"the conversation was saved as version {data['version']!r:.80}, and {known}")
    return _object(Conversation, _CONVERSATION)(
        {name: data[name] for name in data if name != "version"}, "conversation"
    )


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    if depth > MAX_NESTING:
        raise InvalidRequest(f"{where} is nested more than {MAX_NESTING} deep; it cannot be saved")
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, (Conversation, Message, Function, TextFormat, ResponseFormat)):
        given = {each.name: getattr(value, each.name) for each in fields(value)}
        unset = {each.name for each in fields(value) if given[each.name] == each.default}
        return {name: _plain(item, f"{where}.{name}", depth + 1) for name, item in given.items() if name not in unset}
    if isinstance(value, Mapping):
        return {_key(key, where): _plain(item, f"{where}.{key}", depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, where, depth + 1) for item in value]
    raise InvalidRequest(f"{where} has a {type(value).__name__}, which JSON cannot hold")


def _key(key: Any, where: str) -> str:
    if not isinstance(key, str):
        raise InvalidRequest(f"{where} has the key {key!r:.80}, which is no string")
    return key


def _object(make: Callable[..., T], known: Mapping[str, Read]) -> Callable[[Any, str], T]:
    """A reader of a dict whose fields have these readers."""

    def read(value: Any, where: str) -> T:
        if not isinstance(value, Mapping):
            raise InvalidRequest(f"{where} must be a dict, not {value!r:.80}")
        for name in value:
            if name not in known:
                raise InvalidRequest(f"{where} has an unknown field {name!r:.80}; it was not written by to_dict()")
        try:
            return make(**{name: known[name](item, f"{where}.{name}") for name, item in value.items()})
        except TypeError as error:  # a field without a default is missing
            raise InvalidRequest(f"{where} is incomplete: {error}") from error

    return read


def _listed(read: Read) -> Read:
    def read_list(value: Any, where: str) -> tuple[Any, ...]:
        if not isinstance(value, (list, tuple)) or len(value) > MAX_MESSAGES:
            raise InvalidRequest(f"{where} must be a list of at most {MAX_MESSAGES} entries")
        return tuple(read(item, f"{where}[{index}]") for index, item in enumerate(value))

    return read_list


def _choice(kind: Any) -> Read:
    def read(value: Any, where: str) -> Any:
        if value not in get_args(kind):
            raise InvalidRequest(f"{where} must be one of {', '.join(get_args(kind))}, not {value!r:.80}")
        return value

    return read


def _or_none(read: Read) -> Read:
    return lambda value, where: None if value is None else read(value, where)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise InvalidRequest(f"{where} must be a string, not {value!r:.80}")
    return value


def _flag(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise InvalidRequest(f"{where} must be true or false, not {value!r:.80}")
    return value


def _schema(value: Any, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise InvalidRequest(f"{where} must be a JSON schema, not {value!r:.80}")
    return _plain(value, where)


def _pair(value: Any, where: str) -> tuple[str, str]:
    texts = _listed(_text)(value, where)
    if len(texts) != 2:
        raise InvalidRequest(f"{where} must be two strings")
    return texts[0], texts[1]


_TEXT_OR_NONE = _or_none(_text)
_MESSAGE: dict[str, Read] = {
    "role": _choice(Role),
    "content": _text,
    **dict.fromkeys(("channel", "recipient", "content_type", "name"), _TEXT_OR_NONE),
}
_TEXT_FORMAT: dict[str, Read] = {"syntax": _or_none(_choice(Syntax)), "definition": _text}
_FUNCTION: dict[str, Read] = {
    "name": _text,
    "description": _text,
    "parameters": _or_none(_schema),
    "strict": _flag,
    "text_format": _or_none(_object(TextFormat, _TEXT_FORMAT)),
}
_RESPONSE_FORMAT: dict[str, Read] = {"schema": _schema, "name": _TEXT_OR_NONE, "description": _text}
_CONVERSATION: dict[str, Read] = {
    "messages": _listed(_object(Message, _MESSAGE)),
    "reasoning": _choice(Effort),
    "instructions": _TEXT_OR_NONE,
    "functions": _listed(_object(Function, _FUNCTION)),
    "builtin_tools": _listed(_choice(BuiltinTool)),
    "tool_texts": _listed(_pair),
    "response_format": _or_none(_object(ResponseFormat, _RESPONSE_FORMAT)),
    "prefill": _text,
    "date": _TEXT_OR_NONE,
    "identity": _text,
    "knowledge_cutoff": _TEXT_OR_NONE,
}
