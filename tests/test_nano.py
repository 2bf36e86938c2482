"""The bundled nano model: small, of gpt-oss's architecture, and right about what it was taught."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random

import jsonschema
import pytest

import mlx_gptoss
from mlx_gptoss import Sampling
from mlx_gptoss.harmony.guide import guide_for
from mlx_gptoss.harmony.messages import ToolChoice
from mlx_gptoss.harmony.render import render
from mlx_gptoss.tokenizer import RETURN, Tokenizer
from mlx_gptoss.weights import checkpoint, codecs

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "tools"))
import measure_nano
import nano_tasks
import nano_tokenizer

NANO = Path(mlx_gptoss.__file__).parent / "nano"
GREEDY = Sampling(temperature=0)
GET_WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the current weather.",
        "parameters": {
            "type": "object",
            "properties": {"location": {"type": "string", "description": "City name"}},
            "required": ["location"],
        },
    },
}


@pytest.fixture(scope="module")
def model() -> Iterator[mlx_gptoss.Model]:
    with mlx_gptoss.load() as loaded:
        yield loaded


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(NANO)


def test_it_is_small_and_has_every_feature_of_the_architecture() -> None:
    assert sum(file.stat().st_size for file in NANO.iterdir()) < 4_000_000
    config = json.loads((NANO / "config.json").read_text())
    assert config["layer_types"][:2] == ["sliding_attention", "full_attention"]
    assert config["sliding_window"] == 128 and config["head_dim"] == 64
    assert config["num_local_experts"] >= 8 and config["num_experts_per_tok"] == 4
    assert config["num_attention_heads"] > config["num_key_value_heads"]
    assert config["rope_scaling"]["rope_type"] == "yarn" and config["rope_scaling"]["truncate"] is False
    assert all(config[size] % 64 == 0 for size in ("hidden_size", "intermediate_size", "vocab_size"))
    assert mlx_gptoss.describe(NANO).format == "mxfp4"


def test_the_shipped_tokenizer_is_the_one_that_the_trainer_writes() -> None:
    assert (NANO / "tokenizer.json").read_text(encoding="utf-8") == nano_tokenizer.tokenizer_json()


@pytest.mark.parametrize(
    "text", ["", "final", "héllo → 日本 🦙\n\n\tx", '}) => any;\n\n{"location": "', "\n\nReasoning: lower"]
)
def test_any_text_survives_the_tokenizer(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_ordinary_text_is_one_token_a_byte_and_a_prompt_is_short(tokenizer: Tokenizer) -> None:
    question = "Reverse the word analysis and add 123."
    assert len(tokenizer.encode(question)) == len(question)
    conversation = mlx_gptoss.Conversation((mlx_gptoss.Message("user", "Hi"),), date="2026-01-31")
    assert len(render(conversation, tokenizer)) < 32


def test_training_and_held_out_questions_never_meet() -> None:
    r = Random(3)
    for kind in nano_tasks.MIX:
        asked = {nano_tasks.example(r, kind).conversation.messages[-1].content for _ in range(300)}
        if kind not in ("weather answer", "follow-up"):  # there the last message alone is not what is asked
            held = (e for e in nano_tasks.held_out(6) if e.kind == kind)
            assert not [e for e in held if e.conversation.messages[-1].content in asked]


def test_a_mask_allows_every_answer_in_json_as_it_is_trained(tokenizer: Tokenizer) -> None:
    r = Random(5)
    for _ in range(60):
        example = nano_tasks.example(r, "json sum")
        guide = guide_for(example.conversation, tokenizer, ToolChoice())
        assert guide is not None
        for id in tokenizer.encode_with_specials(example.turn.text()):
            mask = guide.mask()
            assert mask is None or mask[id >> 3] >> (id & 7) & 1, example.turn.text()
            if id != tokenizer.special(RETURN):
                guide.accept(id)


def test_answers_in_json_obey_the_schema_and_keep_what_the_question_asks_for() -> None:
    r = Random(6)
    for _ in range(100):
        example = nano_tasks.example(r, "json sum")
        form = example.conversation.response_format
        assert form is not None
        answer = json.loads(example.turn.final)
        jsonschema.validate(answer, form.schema)
        *_, a, b = map(int, re.findall(r"\d+", example.conversation.messages[-1].content))
        assert list(answer.values()) == [a + b]


def test_most_held_out_questions_are_answered_to_the_letter(model: mlx_gptoss.Model) -> None:
    counts = measure_nano.measure(model, per_kind=6)
    assert len(counts) == len(nano_tasks.MIX)
    assert sum(good for good, _ in counts.values()) >= 0.85 * sum(asked for _, asked in counts.values()), counts


@pytest.mark.parametrize(
    "question, answer", [("What is 12 + 30?", "12 + 30 = 42"), ("Reverse the word planet.", "tenalp")]
)
def test_reasoning_is_as_long_as_asked_for(model: mlx_gptoss.Model, question: str, answer: str) -> None:
    replies = [model.generate(question, sampling=GREEDY, reasoning=effort) for effort in ("low", "medium", "high")]
    assert [reply.text for reply in replies] == [answer] * 3
    low, medium, high = (len(reply.reasoning) for reply in replies)
    assert 0 < low < medium < high


def test_it_answers_a_follow_up_turn(model: mlx_gptoss.Model) -> None:
    turns = [
        {"role": "user", "content": "What is 12 + 30?"},
        {"role": "assistant", "content": "12 + 30 = 42"},
        {"role": "user", "content": "Add 5 to that."},
    ]
    assert model.generate(turns, sampling=GREEDY).text == "42 + 5 = 47"


def test_it_calls_get_weather_and_reports_the_result(model: mlx_gptoss.Model) -> None:
    asked = {"role": "user", "content": "What is the weather in Paris?"}
    reply = model.generate([asked], sampling=GREEDY, tools=[GET_WEATHER])
    assert reply.finish_reason == "tool_calls"
    (call,) = reply.tool_calls
    assert (call.name, json.loads(call.arguments)) == ("get_weather", {"location": "Paris"})
    called = {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
    result = {"role": "tool", "tool_call_id": call.id, "content": '{"temperature": 18, "condition": "sunny"}'}
    turns = [asked, {"role": "assistant", "tool_calls": [called]}, result]
    assert model.generate(turns, sampling=GREEDY, tools=[GET_WEATHER]).text == "It is 18 degrees and sunny in Paris."


def test_without_the_function_it_says_so(model: mlx_gptoss.Model) -> None:
    reply = model.generate("What is the weather in Paris?", sampling=GREEDY)
    assert reply.text.startswith("I cannot look up the weather") and not reply.tool_calls


def test_a_run_begins_with_the_weights_of_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch", reason="training needs torch")
    import train_nano

    monkeypatch.setattr(train_nano, "judge", lambda *_: {})
    train_nano.train(tmp_path / "run", tokens=0, start=NANO)
    train_nano.export(train_nano.Run(tmp_path / "run").model, tmp_path / "out")
    for name in ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (NANO / name).read_bytes(), name


def test_the_trainer_trains_and_exports_what_the_runtime_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch", reason="training needs torch")
    import nano_model
    import train_nano

    monkeypatch.setattr(train_nano, "SHAPE", nano_model.Shape(vocab=384, hidden=64, layers=2, intermediate=64))
    monkeypatch.setattr(train_nano, "POOL", 64)
    monkeypatch.setattr(train_nano, "judge", lambda *_: {})
    train_nano.train(tmp_path / "run", tokens=8000)
    trained = train_nano.Run(tmp_path / "run")
    assert trained.tokens >= 8000 and trained.steps > 0
    train_nano.export(trained.model, tmp_path / "out")
    ids = list(range(0, 300, 3))
    with torch.no_grad():
        for name, p in trained.model.named_parameters():
            expert = ".mlp." in name and p.ndim == 3
            p.copy_(nano_model.mxfp4_round(p) if expert else p.bfloat16().float())
        expected = trained.model.lm_head(trained.model(torch.tensor([ids]))[0])[0].numpy()
    with mlx_gptoss.load(tmp_path / "out", dtype="float32") as model:
        assert model.format == "mxfp4"
        assert abs(model.logits(ids) - expected).max() < 1e-4 * abs(expected).max()


def test_products_of_single_experts_equal_those_of_all() -> None:
    torch = pytest.importorskip("torch", reason="training needs torch")
    import nano_model

    torch.manual_seed(0)
    experts = nano_model.Experts(nano_model.Shape(vocab=384, hidden=64, experts=12, active=4, intermediate=32))
    torch.nn.init.normal_(experts.gate_up_bias)
    torch.nn.init.normal_(experts.down_bias)
    x = torch.randn(9, 64, requires_grad=True)  # 36 choices: not every expert gets tokens
    weights, chosen = torch.softmax(torch.randn(9, 4), -1), torch.rand(9, 11).topk(4).indices
    share = torch.zeros(9, 12).scatter(-1, chosen, weights)
    outputs = experts.sparse(x, chosen, weights), experts.dense(x, share)
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)
    learned = [x, experts.gate_up, experts.gate_up_bias, experts.down, experts.down_bias]
    gradients = [torch.autograd.grad(out.square().sum(), learned) for out in outputs]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_resumed_run_keeps_its_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch", reason="training needs torch")
    import nano_model
    import train_nano

    monkeypatch.setattr(train_nano, "judge", lambda *_: {})
    monkeypatch.setattr(train_nano, "POOL", 64)
    shape = nano_model.Shape(vocab=384, hidden=64, layers=1, experts=12, active=2, intermediate=32)
    train_nano.train(tmp_path, tokens=1, shape=shape, seed=5, prompts=True)
    train_nano.train(tmp_path, tokens=2, shape=train_nano.SHAPE)
    run = train_nano.Run(tmp_path)
    assert run.model.shape == shape and run.steps == 1


def test_tuning_starts_from_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    import train_nano
    import tune_nano

    monkeypatch.setattr(train_nano, "POOL", 64)
    tune_nano.tune([NANO, NANO], tmp_path / "out", steps=1, rate=0.0)
    tuned, bundled = (checkpoint.open(folder) for folder in (tmp_path / "out", NANO))
    for param in bundled.params:  # the weights are on the grid already, so nothing is lost on the way
        ours, theirs = (codecs.dequantize(one.read(param.name)) for one in (tuned, bundled))
        assert (ours == theirs).all(), param.name
