"""The tools of a request to /v1/responses: functions, custom tools and namespaces of them, as Harmony's functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast, get_args

from ...errors import InvalidRequest
from ...harmony.checks import tool_name
from ...harmony.messages import Function, Syntax, TextFormat
from ...harmony.names import ToolNames
from ...harmony.openai_tools import functions_from_tools
from ..errors import ApiError, invalid_field
from ..fields import MAX_TOOLS

CLIENT_TYPES = ("function", "custom")


@dataclass(frozen=True)
class ClientTool:
    """How the client names a function. custom: whether its input is text instead of JSON."""

    name: str
    namespace: str | None = None
    custom: bool = False


class ResponseTools:
    """The functions that the model sees, and what the client calls them.

    A tool of a namespace gets the name NAMESPACE__TOOL, since Harmony has one namespace for functions. The description
    of the namespace precedes that of its first tool.

    functions: of Harmony. left_out: the types of tools that are not served.
    Raises ApiError and InvalidRequest for malformed tools, and if none of the tools is served.
    """

    def __init__(self, tools: Sequence[Mapping[str, Any]]) -> None:
        self._functions: dict[ClientTool, Function] = {}
        self._tools: dict[str, ClientTool] = {}  # by the name of the function
        self.left_out: set[str] = set()
        for index, tool in enumerate(tools):  # first, so that they keep their names
            kind = tool.get("type", "function")
            if kind in CLIENT_TYPES:
                self._add(tool, f"tools[{index}]")
            elif kind != "namespace":
                self.left_out.add(str(kind)[:100])
        for index, tool in enumerate(tools):
            if tool.get("type") == "namespace":
                self._add_namespace(tool, f"tools[{index}]")
        self.functions = tuple(self._functions.values())
        self._names = ToolNames(self._tools)
        if self.left_out and not self.functions:
            kinds = ", ".join(sorted(self.left_out))[:200]
            message = f"tools has only {kinds}, which is not served: send functions, or no tools"
            raise ApiError(400, message, param="tools", code="unsupported_tool")

    def client_tool(self, function: str) -> ClientTool:
        """How the client names the function that the model called."""
        return self._tools.get(function, ClientTool(function))

    def recipient(self, name: str, namespace: str | None) -> str:
        """The recipient of a call that the client names so. It may be one of an earlier request, of a tool now gone."""
        return self._names.recipient(
            self._function_name(name, namespace) or (name if namespace is None else _joined(namespace, name))
        )

    def function_recipient(self, function: str) -> str:
        """The recipient of calls of a function."""
        return self._names.recipient(function)

    def choice(self, value: str | Mapping[str, Any]) -> Any:
        """A request's tool_choice in the form that harmony.openai_tools.tool_choice_of reads.

        Raises ApiError for a tool that is not served.
        """
        if isinstance(value, str):
            return value
        if value.get("type") in CLIENT_TYPES:
            return {"type": "function", "name": self._chosen(value)}
        allowed = value.get("allowed_tools", value)
        if value.get("type") == "allowed_tools" and isinstance(allowed, Mapping):
            entries = [entry for entry in _list(allowed.get("tools"))[:MAX_TOOLS] if isinstance(entry, Mapping)]
            names = dict.fromkeys(name for entry in entries for name in self._allowed(entry))
            tools = [{"type": "function", "name": name} for name in names]
            return {"type": "allowed_tools", "mode": allowed.get("mode", "auto"), "tools": tools}
        kind = value.get("type")
        if isinstance(kind, str) and kind not in ("allowed_tools", "namespace"):
            message = f"is a tool of the type {kind!r:.100}, which is not served: use auto, or a function"
            raise invalid_field("tool_choice", message, "unsupported_tool")
        return value

    def _add(self, tool: Mapping[str, Any], where: str, namespace: str | None = None, about: str = "") -> None:
        """Add a function or a custom tool. about: a text that precedes its description."""
        custom = tool.get("type") == "custom"
        function = _custom_function(tool, where) if custom else _function(tool, where)
        key = ClientTool(function.name, namespace, custom)
        name = function.name if namespace is None else _joined(namespace, function.name)
        while namespace is not None and self._tools.get(name, key) != key:
            name += "_"
        description = "\n\n".join(text for text in (about, function.description) if text)
        function = replace(function, name=name, description=description)
        if self._tools.setdefault(name, key) != key or self._functions.setdefault(key, function) != function:
            raise InvalidRequest(f"{where}: two tools are named {name!r:.200}; give each tool its own name")
        if len(self._functions) > MAX_TOOLS:
            raise invalid_field("tools", f"has more than {MAX_TOOLS} tools, those in namespaces included")

    def _add_namespace(self, tool: Mapping[str, Any], where: str) -> None:
        namespace, tools = tool_name(tool.get("name"), f"{where}.name"), tool.get("tools")
        if not isinstance(tools, list):
            raise InvalidRequest(f'{where} must be {{"type": "namespace", "name": ..., "tools": [...]}}')
        about = _string(tool, "description", where)
        for index, inner in enumerate(tools):
            place = f"{where}.tools[{index}]"
            if not isinstance(inner, Mapping):
                raise InvalidRequest(f'{place} must be {{"type": "function", "name": ...}}')
            if inner.get("type", "function") in CLIENT_TYPES:
                self._add(inner, place, namespace, about)
                about = ""
            else:
                self.left_out.add(str(inner.get("type"))[:100])

    def _function_name(self, name: str, namespace: str | None) -> str | None:
        """The name of the function that the client names so; None if there is none."""
        tools = (ClientTool(name, namespace, custom) for custom in (False, True))
        return next((self._functions[tool].name for tool in tools if tool in self._functions), None)

    def _chosen(self, value: Mapping[str, Any]) -> str:
        """The function's name of an entry {"type", "name", "namespace"}, also with the name in an inner dict."""
        inner = value.get(str(value.get("type")), value)
        inner = inner if isinstance(inner, Mapping) else value
        name, namespace = inner.get("name"), inner.get("namespace")
        if not isinstance(name, str) or not isinstance(namespace, str | None):
            raise invalid_field("tool_choice", "must name a function")
        return self._function_name(name, namespace) or name

    def _allowed(self, entry: Mapping[str, Any]) -> list[str]:
        """The functions of one allowed tool; none for a type that is not served."""
        if entry.get("type", "function") in CLIENT_TYPES:
            return [self._chosen(entry)]
        if entry.get("type") == "namespace":
            return [f.name for tool, f in self._functions.items() if tool.namespace == entry.get("name")]
        return []


def _joined(namespace: str, name: str) -> str:
    """NAMESPACE__NAME. Some namespaces end in "__" already."""
    return f"{namespace.removesuffix('__')}__{name}"


def _function(tool: Mapping[str, Any], where: str) -> Function:
    try:
        return functions_from_tools([tool])[0]
    except InvalidRequest as error:
        raise InvalidRequest(str(error).replace("tools[0]", where, 1)) from error


def _custom_function(tool: Mapping[str, Any], where: str) -> Function:
    """A custom tool, {"type": "custom", "name", "description", "format"}, also with an inner dict."""
    if isinstance(tool.get("custom"), Mapping):
        tool, where = tool["custom"], f"{where}.custom"
    about = {"name": tool.get("name"), "description": tool.get("description")}
    function = _function(about, where)
    form = tool.get("format") or {"type": "text"}
    if isinstance(form, Mapping) and form.get("type") == "text":
        return replace(function, text_format=TextFormat())
    if not isinstance(form, Mapping) or form.get("type") != "grammar":
        raise InvalidRequest(f'{where}.format must be {{"type": "text"}} or {{"type": "grammar", ...}}')
    form = form["grammar"] if isinstance(form.get("grammar"), Mapping) else form
    syntax, definition = form.get("syntax"), _string(form, "definition", f"{where}.format")
    if syntax not in get_args(Syntax) or not definition:
        raise InvalidRequest(f"{where}.format must have the syntax lark or regex, and a definition")
    return replace(function, text_format=TextFormat(cast("Syntax", syntax), definition))


def _string(value: Mapping[str, Any], name: str, where: str) -> str:
    """A string field; empty if it is absent."""
    text = value.get(name)
    if not isinstance(text, str | None):
        raise InvalidRequest(f"{where}.{name} must be a string")
    return text or ""


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
