"""Every string, list and object in a request has a bound: no field may hold what only the body's limit ends."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
from annotated_types import MaxLen
from pydantic import AfterValidator
from pydantic.fields import FieldInfo

from mlx_gptoss.server import app  # noqa: F401  (it imports every endpoint)
from mlx_gptoss.server.fields import RequestModel, _small_object

TEXT = "text of the prompt: its length is checked against the context before it is encoded"
MESSAGES = "at most MAX_MESSAGES; their texts are the prompt"
EXCEPTIONS = {
    "ChatRequest.messages": MESSAGES,
    "MessagesRequest.messages": MESSAGES,
    "TemplateRequest.messages": MESSAGES,
    "MessagesRequest.system": TEXT,
    "CompletionRequest.prompt": TEXT,
    "GenerateRequest.prompt": TEXT,
    "GenerateRequest.system": TEXT,
    "GenerateRequest.images": "at most MAX_PARTS; only whether there are any matters",
    "TokenizeRequest.content": TEXT,
    "ContextRequest.input": TEXT,
    "ContextRequest.instructions": TEXT,
    "ContextRequest.prompt": "refused unless it is null",
    "MessageItem.content": TEXT,
    "Part.text": TEXT,
    "Part.refusal": TEXT,
    "Part.annotations": "at most MAX_PARTS; kept with the item, otherwise without effect",
    "Part.logprobs": "at most MAX_TOKEN_IDS; kept with the item, otherwise without effect",
    "ReasoningPart.text": TEXT,
    "ReasoningItem.encrypted_content": TEXT,
    "CompactionItem.encrypted_content": TEXT,
    "FunctionCallItem.arguments": TEXT,
    "CustomCallItem.input": TEXT,
    "CallOutputItem.output": TEXT,
}


def models(base: type[RequestModel] = RequestModel) -> Iterator[type[RequestModel]]:
    for model in base.__subclasses__():
        yield model
        yield from models(model)


def flat(metadata: Any) -> list[Any]:
    return [inner for one in metadata for inner in (flat(one.metadata) if isinstance(one, FieldInfo) else [one])]


def is_bounded(annotation: Any, metadata: list[Any]) -> bool:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return is_bounded(arguments[0], [*metadata, *flat(arguments[1:])])
    if origin in (Union, types.UnionType):
        return all(is_bounded(argument, metadata) for argument in arguments)
    if any(isinstance(one, AfterValidator) and one.func is _small_object for one in metadata):
        return True
    has_limit = any(isinstance(one, MaxLen) for one in metadata)
    if annotation is str:
        return has_limit
    if origin in (list, dict):
        return has_limit and all(is_bounded(argument, []) for argument in arguments)
    if origin is Literal:
        return True
    return isinstance(annotation, type) and issubclass(annotation, (RequestModel, bool, int, float, types.NoneType))


def own_fields(model: type[RequestModel]) -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        if name in model.__annotations__:
            yield f"{model.__name__}.{name}", field


def test_every_field_of_a_request_has_a_bound() -> None:
    fields = dict(pair for model in models() for pair in own_fields(model))
    unbounded = {name for name, field in fields.items() if not is_bounded(field.annotation, flat(field.metadata))}
    assert len(fields) > 80
    assert unbounded == set(EXCEPTIONS)


def many(value: str, count: int) -> str:
    return "[" + ",".join([value] * count) + "]"


LONG = "x" * 2000
HUGE = {"k": "x" * (2 << 20)}


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/v1/chat/completions", {"model": LONG}, "model"),
        ("/v1/chat/completions", {"stop": [LONG]}, "stop"),
        ("/v1/chat/completions", {"stop": ["x"] * 17}, "stop"),
        ("/v1/chat/completions", {"logit_bias": {LONG: 1.0}}, "logit_bias"),
        ("/v1/chat/completions", {"modalities": ["text"] * 17}, "modalities"),
        ("/v1/chat/completions", {"thinking": HUGE}, "thinking"),
        ("/v1/chat/completions", {"tools": [{"function": {"name": "f", "parameters": HUGE}}]}, "tools[0]"),
        ("/v1/chat/completions", {"tools": [{"function": {"name": "f", "x": "x" * 1000}}] * 1024}, None),
        ("/v1/chat/completions", {"tools": [{"function": {"name": "f", "x": "x" * 2100}}] * 1024}, "tools"),
        ("/v1/completions", {"prompt": [1] * (1 << 17) + [1]}, "prompt"),
        ("/v1/completions", {"prompt": ["x"] * 1000 + [{}]}, "prompt"),
        ("/v1/responses", {"user": LONG}, "user"),
        ("/v1/responses", {"metadata": {LONG: "x"}}, "metadata"),
        ("/v1/responses", {"metadata": {f"k{index}": "x" for index in range(65)}}, "metadata"),
        ("/v1/responses", {"tool_choice": HUGE}, "tool_choice"),
        ("/v1/responses", {"input": [{"role": "user", "content": [{"type": LONG}]}]}, "input[0].content[0].type"),
        ("/v1/responses", {"input": [{"role": "user", "content": [{"type": "text"}] * 10_001}]}, "input[0].content"),
        ("/v1/messages", {"tool_choice": {"type": "tool", "name": LONG}}, None),
        ("/api/chat", {"format": LONG}, None),
        ("/detokenize", {"tokens": [1] * (1 << 17) + [1]}, "tokens"),
    ],
)
def test_a_value_over_its_bound_is_refused(http, path, fields, param) -> None:
    base = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    answer = http.post(path, json={**base, **fields})
    if param is None and answer.status_code == 200:
        return  # just below its bound
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    if param is not None:
        assert error["param"].startswith(param), error
