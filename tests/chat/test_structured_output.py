"""The bundled model at temperature 1, held to schemas and choices of tools through the API."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import mlx_gptoss
from mlx_gptoss import Sampling
from mlx_gptoss.backends import BACKENDS
from mlx_gptoss.chat import stream
from mlx_gptoss.chat.reply import fold
from mlx_gptoss.errors import InvalidRequest
from mlx_gptoss.harmony import guide

SCHEMAS: dict[str, Any] = json.loads((Path(__file__).parents[1] / "data" / "schemas.json").read_text("utf-8"))
QUESTION = "What is the weather in Paris?"
SUM = "What is 12 + 30?"
FEW = (
    "an invoice",
    "closed object",
    "enum of everything",
    "linked list",
    "one of, tagged, by reference",
    "short string",
)


@pytest.fixture(scope="module")
def model():
    with mlx_gptoss.load(backend="mlx", max_context=2048, slots=9) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def validate():
    return pytest.importorskip("jsonschema").validate


def form(schema: Any, name: str = "answer") -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": name, "schema": schema, "strict": True}}


def tool(name: str, schema: Any, strict: bool = True) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": schema, "strict": strict}}


WEATHER = tool("get_weather", {"type": "object", "properties": {"location": {"type": "string", "maxLength": 20}},
                               "required": ["location"], "additionalProperties": False})  # fmt: skip


@pytest.mark.parametrize("name", FEW)
def test_a_final_answer_obeys_its_schema(model, validate, name):
    held = {"response_format": form(SCHEMAS[name]), "max_tokens": 600}
    asked = [model.stream(SUM, sampling=Sampling(seed=seed), **held) for seed in range(2)]  # both at once
    for events in asked:
        validate(json.loads(fold(events)[1]), SCHEMAS[name])


OPEN = (
    "any object",
    "string",
    "array of arrays",
    "open object",
    "map",
    "map of at most two",
    "required beyond properties",
)


def at_temperature_1(model, name: str, seed: int) -> Sampling:
    """Where a schema sets no end, a model that was never shown such JSON finds none; a bias helps it to."""
    closing = [model.tokenizer.encode(letter)[0] for letter in '"]}']
    return Sampling(seed=seed, logit_bias=dict.fromkeys(closing, 8.0) if name in OPEN else None)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEMAS)
def test_every_schema_of_the_corpus(model, validate, name):
    held = {"response_format": form(SCHEMAS[name]), "max_tokens": 300, "reasoning": "low"}
    questions = (SUM, QUESTION, "Hello")
    asked = [
        model.stream(question, sampling=at_temperature_1(model, name, seed), **held)
        for question in questions
        for seed in range(3)
    ]
    replies = [fold(events) for events in asked]
    ended = [text for _, text, _, finished in replies if finished.finish_reason == "stop"]
    assert len(ended) >= 3 and {finished.finish_reason for *_, finished in replies} <= {"stop", "length"}
    for text in ended:
        validate(json.loads(text), SCHEMAS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, schema in SCHEMAS.items() if schema.get("type") == "object"])
def test_every_object_of_the_corpus_as_arguments(model, validate, name):
    held = {"tools": [tool("get_weather", SCHEMAS[name])], "tool_choice": "required", "max_tokens": 300}
    asked = [model.stream(QUESTION, sampling=at_temperature_1(model, name, seed), **held) for seed in range(8)]
    replies = [fold(events) for events in asked]
    calls = [call for _, _, calls, _ in replies for call in calls]
    assert len(calls) >= 3 and {finished.finish_reason for *_, finished in replies} <= {"tool_calls", "length"}
    for call in calls:
        validate(json.loads(call.arguments), SCHEMAS[name])


def test_any_json_object(model):
    options = {"response_format": {"type": "json_object"}, "max_tokens": 600}
    samplings = [Sampling(temperature=0), Sampling(seed=1, temperature=0.3)]
    questions = (SUM, f"{SUM} Answer in JSON.", "Add 12 and 30. Use JSON.")
    replies = [model.generate(text, sampling=how, **options) for text in questions for how in samplings]
    ended = [reply for reply in replies if reply.finish_reason == "stop"]  # a string may go on and on
    assert ended and all(isinstance(json.loads(reply.text), dict) for reply in ended)


@pytest.mark.parametrize("sampling", [Sampling(seed=3), Sampling(seed=4, top_p=0.9, logprobs=2)], ids=["1", "0.9"])
def test_analysis_is_what_it_is_without_a_guide(model, sampling):
    asked = mlx_gptoss.Conversation((mlx_gptoss.Message("user", SUM),))
    free = model.generate(asked, sampling=sampling).ids
    thoughts = free.index(model.tokenizer.special("<|end|>")) + 1
    # The prompt is the same: of json_object the model is not told.
    form = {"response_format": {"type": "json_object"}, "max_tokens": thoughts + 6}
    held = model.generate(asked, sampling=sampling, **form).ids
    assert thoughts > 20 and held[:thoughts] == free[:thoughts]
    assert "{" in model.tokenizer.decode(held[thoughts:]) and held[thoughts:] != free[thoughts : thoughts + 6]


@pytest.mark.parametrize("question", [QUESTION, "Hello"])
def test_tool_choice(model, validate, question):
    other = tool("other", SCHEMAS["closed object"])
    for seed in range(2):
        options = {"sampling": Sampling(seed=seed), "tools": [WEATHER, other], "max_tokens": 500}
        for choice in ("required", "other", {"type": "function", "function": {"name": "get_weather"}}):
            reply = model.generate(question, tool_choice=choice, **options)
            assert reply.finish_reason == "tool_calls"
            (call,) = reply.tool_calls
            assert choice == "required" or call.name in (choice, "get_weather")
            offered = (WEATHER if call.name == "get_weather" else other)["function"]
            validate(json.loads(call.arguments), offered["parameters"])
        assert not model.generate(question, tool_choice="none", **options).tool_calls


def test_a_call_may_come_instead_of_the_final_answer(model, validate):
    schema = SCHEMAS["closed object"]
    options = {"sampling": Sampling(temperature=0), "tools": [WEATHER], "response_format": form(schema)}
    asked = model.generate(QUESTION, **options)
    (call,) = asked.tool_calls
    assert json.loads(call.arguments) == {"location": "Paris"} and asked.finish_reason == "tool_calls"
    conversation = asked.conversation.with_result(call.name, '{"temperature": 18, "condition": "sunny"}')
    assert conversation.response_format is None  # it was this turn's
    answer = model.generate(conversation, response_format=form(schema), tool_choice="none")
    validate(json.loads(answer.text), schema)


def test_what_is_cut_off_says_so(model):
    reply = model.generate(SUM, sampling=Sampling(seed=1), response_format=form(SCHEMAS["an invoice"]), max_tokens=5)
    assert reply.finish_reason == "length"


def test_guided_and_free_requests_share_steps(model, validate):
    """Each gets what it gets alone."""

    def ask(seed: int) -> Any:
        guided = {"response_format": form(SCHEMAS["closed object"])} if seed % 2 else {}
        return model.stream(SUM, sampling=Sampling(seed=seed), max_tokens=300, **guided)

    alone = [list(ask(seed))[-1] for seed in range(4)]
    streams = [ask(seed) for seed in range(4)]
    together = [list(events)[-1] for events in streams]
    assert [[t.id for t in f.tokens] for f in together] == [[t.id for t in f.tokens] for f in alone]


class Waiting:
    """A guide that never allows everything, so that every row waits for the result before it."""

    def __init__(self, guide: Any, vocabulary: int) -> None:
        self.guide, self.everything = guide, bytes([255]) * (-(-vocabulary // 8))
        self.accept, self.ends_with = guide.accept, guide.ends_with
        self.free = self.masked = 0

    def mask(self) -> bytes:
        mask = self.guide.mask()
        self.free, self.masked = self.free + (mask is None), self.masked + (mask is not None)
        return self.everything if mask is None else mask


@pytest.mark.parametrize("backend", BACKENDS)
def test_sampling_ahead_and_drafts_change_no_token(backend_module, backend, monkeypatch):
    """The same tokens as with a guide that always waits, greedy and seeded."""
    backend_module(backend)
    samplings = [Sampling(temperature=0), Sampling(seed=1), Sampling(seed=2, temperature=1.5)]

    def replies(speculate: bool) -> list[Any]:
        with mlx_gptoss.load(backend=backend, device="cpu", max_context=1024, speculate=speculate) as model:
            held = {"tools": [tool("get_weather", WEATHER["function"]["parameters"], strict=False)], "max_tokens": 120}
            return [list(model.stream(QUESTION, sampling=how, **held))[-1] for how in samplings]

    ahead, *drafted = [replies(speculate) for speculate in ((False, True) if backend == "mlx" else (False,))]
    waiting: list[Waiting] = []

    def guide_for(conversation: Any, tokenizer: Any, choice: Any) -> Waiting:
        waiting.append(Waiting(guide.guide_for(conversation, tokenizer, choice), tokenizer.vocab_size))
        return waiting[-1]

    monkeypatch.setattr(stream, "guide_for", guide_for)
    always = [[token.id for token in finished.tokens] for finished in replies(False)]
    assert [[token.id for token in finished.tokens] for finished in ahead] == always
    assert all(one.free and one.masked for one in waiting)
    for finished in drafted:
        assert [[token.id for token in one.tokens] for one in finished] == always
        assert sum(one.drafted for one in finished) > 0


def test_the_torch_backend(backend_module, validate):
    backend_module("cuda")
    with mlx_gptoss.load(backend="cuda", device="cpu", max_context=1024) as model:
        schema = SCHEMAS["closed object"]
        reply = model.generate(SUM, sampling=Sampling(seed=1), response_format=form(schema), max_tokens=300)
        validate(json.loads(reply.text), schema)
        reply = model.generate(QUESTION, sampling=Sampling(temperature=0), tools=[WEATHER], tool_choice="get_weather")
        assert json.loads(reply.tool_calls[0].arguments) == {"location": "Paris"}


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"response_format": form({"type": "array", "uniqueItems": True})}, "uniqueItems"),
        ({"response_format": {"type": "xml"}}, "json_object"),
        ({"tool_choice": "required"}, "no function is declared"),
        ({"tool_choice": "get_weather"}, "not one of the tools"),
        ({"tools": [tool("f", {"not": {}})]}, "the parameters of 'f'"),
    ],
)
def test_what_cannot_be_enforced_is_refused_before_the_first_token(model, options, complaint):
    with pytest.raises(InvalidRequest, match=complaint):
        model.stream("Hi", **options)
