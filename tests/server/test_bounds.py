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
from mlx_gptoss.tokenizer import Tokenizer

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


LONG = "x" * 2000
HUGE = {"k": "x" * (2 << 20)}


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/v1/chat/completions", {"model": LONG}, "model"),
        ("/v1/chat/completions", {"stream_options": {f"k{n}": 0 for n in range(1001)}}, "stream_options"),
        ("/v1/chat/completions", {"stop": [LONG]}, "stop"),
        ("/v1/chat/completions", {"stop": ["x"] * 17}, "stop"),
        ("/v1/chat/completions", {"logit_bias": {LONG: 1.0}}, "logit_bias"),
        ("/v1/chat/completions", {"modalities": ["text"] * 17}, "modalities"),
        ("/v1/chat/completions", {"thinking": HUGE}, "thinking"),
        ("/v1/chat/completions", {"tools": [{"function": {"name": "f", "parameters": HUGE}}]}, "tools[0]"),
        ("/v1/chat/completions", {"tools": [{"function": {"name": "f", "x": "x" * 2100}}] * 1024}, "tools"),
        ("/v1/completions", {"prompt": [1] * (1 << 17) + [1]}, "prompt"),
        ("/v1/completions", {"prompt": ["x"] * 1000 + [{}]}, "prompt"),
        ("/v1/responses", {"user": LONG}, "user"),
        ("/v1/responses", {"metadata": {LONG: "x"}}, "metadata"),
        ("/v1/responses", {"metadata": {f"k{index}": "x" for index in range(65)}}, "metadata"),
        ("/v1/responses", {"tool_choice": HUGE}, "tool_choice"),
        ("/v1/responses", {"input": [{"role": "user", "content": [{"type": LONG}]}]}, "input[0].content[0].type"),
        ("/v1/responses", {"input": [{"role": "user", "content": [{"type": "text"}] * 10_001}]}, "input[0].content"),
        ("/detokenize", {"tokens": [1] * (1 << 17) + [1]}, "tokens"),
    ],
)
def test_a_value_over_its_bound_is_refused(http, path, fields, param) -> None:
    base = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    answer = http.post(path, json={**base, **fields})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"].startswith(param)


def test_a_body_of_too_many_fields(http) -> None:
    error = http.post("/v1/chat/completions", json={f"k{n}": 0 for n in range(1001)}).json()["error"]
    assert (error["message"], error["code"]) == ("the body has more than 1000 fields", "too_many_fields")


def test_other_dialects(http) -> None:
    messages = [{"role": "user", "content": "x"}]
    choice = {"type": "tool", "name": LONG}
    anthropic = http.post("/v1/messages", json={"messages": messages, "max_tokens": 1, "tool_choice": choice})
    assert anthropic.status_code == 400 and "tool_choice.name" in anthropic.json()["error"]["message"]
    ollama = http.post("/api/chat", json={"messages": messages, "format": LONG})
    assert ollama.status_code == 400 and "format" in ollama.json()["error"]


def test_tools_just_below_their_bound(http) -> None:
    tools = [{"type": "function", "function": {"name": f"f{n}", "x": "x" * 1000}} for n in range(1024)]
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, "tools": tools, "tool_choice": "none"}
    assert http.post("/v1/chat/completions", json=body).json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize("text", ["x" * 2_000_000, "x " * 30_000])
@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/completions", lambda text: {"prompt": text}),
        ("/v1/completions", lambda text: {"prompt": ["x", text], "echo": True}),
        ("/v1/chat/completions", lambda text: {"messages": [{"role": "user", "content": text}]}),
        ("/v1/responses", lambda text: {"input": text}),
        ("/v1/responses/input_tokens", lambda text: {"input": text}),
        ("/tokenize", lambda text: {"content": text}),
        ("/apply-template", lambda text: {"messages": [{"role": "user", "content": text}]}),
        ("/v1/messages", lambda text: {"messages": [{"role": "user", "content": text}], "max_tokens": 1}),
        ("/v1/messages/count_tokens", lambda text: {"messages": [{"role": "user", "content": text}]}),
        ("/api/generate", lambda text: {"prompt": text, "raw": True}),
        ("/api/generate", lambda text: {"prompt": text}),
        ("/api/chat", lambda text: {"messages": [{"role": "user", "content": text}]}),
    ],
)
def test_a_prompt_longer_than_the_context_is_refused_by_its_length(http, monkeypatch, path, fields, text) -> None:
    """At most the first slices are encoded; of a text that must be longer, none."""
    encoded = []
    slices = Tokenizer.encode_slices

    def count(tokenizer: Tokenizer, text: str, *, specials: bool = False) -> Iterator[list[int]]:
        for ids in slices(tokenizer, text, specials=specials):
            encoded.append(len(ids))
            yield ids

    monkeypatch.setattr(Tokenizer, "encode_slices", count)
    answer = http.post(path, json=fields(text))
    assert answer.status_code == 400 and "tokens" in answer.text and "context holds" in answer.text
    assert sum(encoded) < (2000 if len(text) > 1_000_000 else 70_000)
