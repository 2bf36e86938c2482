"""Converts chat requests in the form of OpenAI's API (messages, tools, response_format, tool_choice) to dataclasses.

Everything in a request is validated here. Error messages begin with the path of the field, such as
"messages[0].content"; the server takes the `param` of its error responses from it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from ..errors import InvalidRequest
from ..tokenizer import CONSTRAIN
from .header import NAMESPACE
from .messages import Conversation, Effort, Function, Message, ResponseFormat, ToolChoice
from .render import instructions_text

# Fields without meaning for the model. Clients send them when they send a reply back.
_IGNORED_FIELDS = {"id", "object", "status", "index"}
_FIELDS = {
    "system": {"content"},
    "developer": {"content"},
    "user": {"content", "name"},
    "assistant": {"content", "name", "reasoning", "reasoning_content", "thinking", "tool_calls"},
    "tool": {"content", "name", "tool_call_id"},
}
_REASONING_FIELDS = ("reasoning", "reasoning_content", "thinking")
_NAME = re.compile(r"[A-Za-z0-9_.-]+")


def from_chat(
    messages: Sequence[Mapping[str, Any]],
    *,
    reasoning: Effort = "medium",
    system: str | None = None,
    tools: Sequence[Mapping[str, Any] | Function] = (),
    date: str | None = None,
) -> Conversation:
    """Build the conversation of a chat request.

    messages: dicts with "role" and "content" (a string, or a list of text parts). System and developer messages at the
        beginning become the instructions, joined by blank lines after `system`; later ones stay where they are.
        An assistant's "reasoning", "reasoning_content" or "thinking" is its analysis. Its content is the final answer
        or, if there are "tool_calls", the preamble that the user saw before the calls (commentary).
    reasoning: the reasoning effort.
    system: instructions that precede those in `messages`.
    tools: Function objects, or {"type": "function", "function": {"name", "description", "parameters", "strict"}}, also
        without the inner dict.
    date: the "Current date" line, YYYY-MM-DD.

    Raises InvalidRequest for anything else: an unknown role or field, no messages, the result of an unknown call.
    """
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise InvalidRequest('messages must be a non-empty list such as [{"role": "user", "content": "Hi"}]')
    if reasoning not in get_args(Effort):
        raise InvalidRequest(f"reasoning must be one of {', '.join(get_args(Effort))}, not {reasoning!r}")
    if system is not None and not isinstance(system, str):
        raise InvalidRequest(f"system must be a string, not {system!r}")
    instructions = [] if system is None else [system]
    turns: list[Message] = []
    call_names: dict[str, str] = {}
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        role = _role(message, where)
        if role in ("system", "developer") and not turns:
            instructions.append(_text(message, where))
        elif role == "assistant":
            turns += _assistant(message, where, call_names)
        else:
            turns.append(_message(message, role, where, call_names))
    return Conversation(
        messages=tuple(turns),
        reasoning=reasoning,
        instructions="\n\n".join(instructions) if instructions else None,
        functions=functions_from_tools(tools),
        date=date,
    )


def functions_from_tools(tools: Sequence[Mapping[str, Any] | Function]) -> tuple[Function, ...]:
    """Return the functions in a request's `tools`, in the forms of from_chat.

    Raises InvalidRequest for other kinds of tools and for a name that occurs twice.
    """
    if isinstance(tools, (str, Mapping)) or not isinstance(tools, Sequence):
        raise InvalidRequest("tools must be a list of functions")
    functions = tuple(_function(tool, f"tools[{index}]") for index, tool in enumerate(tools))
    names = [function.name for function in functions]
    for name in names:
        if names.count(name) > 1:
            raise InvalidRequest(f"two tools are named {name!r}: give each function its own name")
    return functions


def response_format_of(value: Any) -> ResponseFormat | None:
    """Return the ResponseFormat of a request's `response_format`, or None for {"type": "text"}.

    value: {"type": "text"}, {"type": "json_object"}, or {"type": "json_schema", "json_schema": {"name", "description",
        "schema", "strict"}}, also without the inner dict. The schema is enforced even if `strict` is false.

    Raises InvalidRequest for anything else. Whether the schema can be enforced is checked later, in guide_for.
    """
    where = "response_format"
    kind = value.get("type") if isinstance(value, Mapping) else None
    if kind not in ("text", "json_object", "json_schema"):
        kinds = '{"type": "text"}, {"type": "json_object"} or {"type": "json_schema", "json_schema": {...}}'
        raise InvalidRequest(f"{where} must be {kinds}, not {value!r}")
    if kind != "json_schema":
        _refuse_unknown_fields(value, {"type"}, where)
        return ResponseFormat({"type": "object"}) if kind == "json_object" else None
    if "json_schema" in value:
        _refuse_unknown_fields(value, {"type", "json_schema"}, where)
        value, where = value["json_schema"], f"{where}.json_schema"
        if not isinstance(value, Mapping):
            raise InvalidRequest(f'{where} must be {{"name": ..., "schema": ...}}, not {value!r}')
    _refuse_unknown_fields(value, {"type", "name", "description", "schema", "strict"}, where)
    schema = value.get("schema")
    if not isinstance(schema, Mapping):
        raise InvalidRequest(f"{where}.schema must be a JSON schema, not {schema!r}")
    description = "" if value.get("description") is None else _string(value, "description", where)
    _boolean(value, "strict", where)
    return ResponseFormat(schema, _name(value.get("name"), f"{where}.name"), description)


def tool_choice_of(value: Any, functions: Sequence[Function]) -> ToolChoice:
    """Return the ToolChoice of a request's `tool_choice`.

    value: "auto", "none", "required", the name of one of `functions`, or {"type": "function", "function": {"name"}},
        also without the inner dict. A function named "auto", "none" or "required" needs the last form.

    Raises InvalidRequest for anything else.
    """
    if value in ("auto", "none", "required"):
        return ToolChoice(value)
    name = value
    if isinstance(value, Mapping) and value.get("type") == "function":
        function = value.get("function", value)
        _refuse_unknown_fields(value, {"type", "name", "function"}, "tool_choice")
        name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise InvalidRequest(
            f'tool_choice must be "auto", "none", "required" or {{"type": "function", "function": {{"name": ...}}}}, '
            f"not {value!r}"
        )
    if name not in [function.name for function in functions]:
        raise InvalidRequest(f"tool_choice names {name!r}, which is not one of the tools")
    return ToolChoice("required", name)


def _role(message: Any, where: str) -> str:
    """Return the role, after checking that the message has only the fields of that role."""
    if not isinstance(message, Mapping):
        raise InvalidRequest(f'{where} must be a dict such as {{"role": "user", "content": "Hi"}}, not {message!r}')
    role = message.get("role")
    if not isinstance(role, str) or role not in _FIELDS:
        raise InvalidRequest(f"{where} has the role {role!r}: use one of {', '.join(_FIELDS)}")
    _refuse_unknown_fields(message, {"role"} | _FIELDS[role] | _IGNORED_FIELDS, where)
    return role


def _message(message: Mapping[str, Any], role: str, where: str, call_names: Mapping[str, str]) -> Message:
    """Return the Message of any role but the assistant's."""
    text = _text(message, where)
    if role == "user":
        return Message("user", text, name=_optional_name(message, where))
    if role == "tool":
        name = _answered_function(message, where, call_names)
        return Message("tool", text, "commentary", "assistant", name=name)
    return Message("developer", instructions_text(text))


def _assistant(message: Mapping[str, Any], where: str, call_names: dict[str, str]) -> list[Message]:
    """Return analysis, then a preamble and calls, or the final answer. Adds the ids of calls to `call_names`."""
    reasoning = [_string(message, field, where) for field in _REASONING_FIELDS if message.get(field) is not None]
    if len(set(reasoning)) > 1:
        raise InvalidRequest(f"{where} has two different reasoning texts: keep one of {', '.join(_REASONING_FIELDS)}")
    calls = [
        _call(call, f"{where}.tool_calls[{index}]", call_names)
        for index, call in enumerate(_list(message, "tool_calls", where))
    ]
    name = _optional_name(message, where)
    turns = [Message("assistant", text, "analysis", name=name) for text in reasoning[:1] if text]
    content = None if message.get("content") is None else _text(message, where)
    if content is None and not calls and not turns:
        raise InvalidRequest(f"{where} is empty: give it content, reasoning or tool_calls")
    if content is not None and (content or not calls):
        turns.append(Message("assistant", content, "commentary" if calls else "final", name=name))
    return turns + calls


def _call(call: Any, where: str, call_names: dict[str, str]) -> Message:
    """Return the message of one entry of `tool_calls`. Adds its id to `call_names`."""
    if not isinstance(call, Mapping) or call.get("type", "function") != "function":
        raise InvalidRequest(f'{where} must be {{"id", "type": "function", "function": {{"name", "arguments"}}}}')
    _refuse_unknown_fields(call, {"id", "type", "function"} | _IGNORED_FIELDS, where)
    function = call.get("function")
    if not isinstance(function, Mapping):
        raise InvalidRequest(f'{where}.function must be {{"name": ..., "arguments": ...}}, not {function!r}')
    _refuse_unknown_fields(function, {"name", "arguments"}, f"{where}.function")
    name = NAMESPACE + _name(function.get("name"), f"{where}.function.name").removeprefix(NAMESPACE)
    arguments = function.get("arguments", "")
    if isinstance(arguments, Mapping):
        arguments = json.dumps(arguments, ensure_ascii=False)
    if not isinstance(arguments, str):
        raise InvalidRequest(f"{where}.function.arguments must be JSON in a string, not {arguments!r}")
    if call.get("id") is not None:
        call_names[_string(call, "id", where)] = name
    return Message("assistant", arguments, "commentary", name, f"{CONSTRAIN}json")


def _answered_function(message: Mapping[str, Any], where: str, call_names: Mapping[str, str]) -> str:
    """Return the full name of the function that a tool message answers: by the id of the call, or by its name."""
    call = message.get("tool_call_id")
    if call is None:
        if message.get("name") is None:
            raise InvalidRequest(f"{where} needs the tool_call_id of the call that it answers, or the function's name")
        return NAMESPACE + _name(message["name"], f"{where}.name").removeprefix(NAMESPACE)
    if not isinstance(call, str) or call not in call_names:
        raise InvalidRequest(f"{where} answers the call {call!r}, which is in no assistant message before it")
    return call_names[call]


def _function(tool: Any, where: str) -> Function:
    if isinstance(tool, Function):
        _name(tool.name, f"{where}.name")
        return tool
    if not isinstance(tool, Mapping) or tool.get("type", "function") != "function":
        raise InvalidRequest(f'{where} must be {{"type": "function", "function": {{...}}}}: only functions are offered')
    if "function" in tool:
        _refuse_unknown_fields(tool, {"type", "function"}, where)
        tool, where = tool["function"], f"{where}.function"
        if not isinstance(tool, Mapping):
            raise InvalidRequest(f'{where} must be {{"name": ..., "parameters": ...}}, not {tool!r}')
    _refuse_unknown_fields(tool, {"type", "name", "description", "parameters", "strict"}, where)
    parameters = tool.get("parameters")
    if parameters is not None and not isinstance(parameters, Mapping):
        raise InvalidRequest(f"{where}.parameters must be a JSON schema of type object, not {parameters!r}")
    description = "" if tool.get("description") is None else _string(tool, "description", where)
    name = _name(tool.get("name"), f"{where}.name")
    return Function(name, description, parameters, _boolean(tool, "strict", where))


def _text(message: Mapping[str, Any], where: str) -> str:
    """Return the content of a message, a string or a list of text parts."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise InvalidRequest(f"{where}.content must be a string or a non-empty list of text parts, not {content!r}")
    return "".join(_part(part, f"{where}.content[{index}]") for index, part in enumerate(content))


def _part(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind not in ("text", "input_text", "output_text"):
        raise InvalidRequest(f'{where} must be {{"type": "text", "text": ...}}: the model reads only text')
    return _string(part, "text", where)


def _string(fields: Mapping[str, Any], field: str, where: str) -> str:
    value = fields.get(field)
    if not isinstance(value, str):
        raise InvalidRequest(f"{where}.{field} must be a string, not {value!r}")
    return value


def _boolean(fields: Mapping[str, Any], field: str, where: str) -> bool:
    value = fields.get(field)
    if value not in (None, False, True):
        raise InvalidRequest(f"{where}.{field} must be true or false, not {value!r}")
    return bool(value)


def _list(fields: Mapping[str, Any], field: str, where: str) -> list[Any]:
    value = fields.get(field)
    if value is not None and not isinstance(value, list):
        raise InvalidRequest(f"{where}.{field} must be a list, not {value!r}")
    return value or []


def _name(value: Any, where: str) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise InvalidRequest(f"{where} must consist of letters, digits, '_', '-' and '.', not {value!r}")
    return value


def _optional_name(message: Mapping[str, Any], where: str) -> str | None:
    return None if message.get("name") is None else _name(message["name"], f"{where}.name")


def _refuse_unknown_fields(fields: Mapping[str, Any], known: set[str], where: str) -> None:
    """Refuse fields that would be dropped silently. Empty ones (None, []) are accepted: nothing would be lost."""
    for field, value in fields.items():
        if field not in known and value is not None and value != []:
            raise InvalidRequest(f"{where} has the field {field!r}, which is not supported: leave it out")
