"""The Python API on a tiny checkpoint: what streams is what is returned, and what cannot be honoured is refused."""

from __future__ import annotations

import re
import shutil
import threading
from dataclasses import replace

import numpy as np
import pytest

import mlx_gptoss
from mlx_gptoss import Finished, Message, ReasoningDelta, Sampling, TextDelta, ToolCall
from mlx_gptoss.api import NANO
from mlx_gptoss.chat.stream import as_conversation, with_reply
from mlx_gptoss.errors import BackendUnavailable, CheckpointError, DoesNotFit, GptOssError, InvalidRequest
from mlx_gptoss.sampling import default_sampling

SEEDED = Sampling(seed=5)


@pytest.fixture(scope="module")
def model(request):
    with mlx_gptoss.load(request.getfixturevalue("mini") / "mxfp4", max_context=512, slots=3) as loaded:
        yield loaded


def test_what_a_model_says_of_itself(model):
    assert (model.backend, model.format) == ("mlx", "mxfp4")
    assert model.config.sliding_window == 8
    assert model.tokenizer.decode(model.tokenizer.encode("héllo")) == "héllo"


def test_generate_is_the_fold_of_stream(model):
    reply = model.generate("Hi", sampling=SEEDED, max_tokens=60)
    events = list(model.stream("Hi", sampling=SEEDED, max_tokens=60))
    assert reply.text == "".join(e.text for e in events if isinstance(e, TextDelta))
    assert reply.reasoning == "".join(e.text for e in events if isinstance(e, ReasoningDelta))
    assert [c.name for c in reply.tool_calls] == [e.name for e in events if isinstance(e, ToolCall)]
    last = events[-1]
    assert isinstance(last, Finished)
    assert reply.ids == tuple(t.id for t in last.tokens)
    assert reply.usage == replace(last.usage, cached_tokens=0)  # the second time the prompt is known
    assert reply.usage.completion_tokens == len(reply.ids)


def test_complete_folds_the_raw_stream(model):
    prompt = model.tokenizer.encode("abc")
    done = model.complete(prompt, max_tokens=12, sampling=Sampling(temperature=0, logprobs=2))
    assert len(done.ids) == len(done.logprobs) == len(done.top) <= 12
    logits = model.logits([*prompt, *done.ids])[len(prompt) - 1 : -1]
    assert logits.argmax(axis=-1).tolist() == list(done.ids)
    raw = logits.astype(np.float64)
    expected = raw.max(axis=-1) - np.log(np.exp(raw).sum(axis=-1))
    assert np.allclose(done.logprobs, expected, atol=1e-4)
    assert [top[0][0] for top in done.top] == list(done.ids)


def test_a_stop_string_ends_the_text_wherever_token_borders_fall(model):
    prompt = model.tokenizer.encode("xyz")
    free = model.complete(prompt, max_tokens=40, sampling=Sampling(temperature=0)).text
    stop = free[5:8]
    done = model.complete(prompt, max_tokens=40, sampling=Sampling(temperature=0, stop=stop))
    assert done.text == free[: free.index(stop)]
    assert done.finish_reason == "stop"


def test_length_and_usage(model):
    done = model.complete((1, 2, 3), max_tokens=4, sampling=Sampling(temperature=0))
    assert (done.finish_reason, done.usage.prompt_tokens, done.usage.completion_tokens) == ("length", 3, 4)


def test_a_stop_id_ends_the_text_and_is_its_last_id(model):
    stop = model.tokenizer.special("<|return|>")
    done = model.complete((1, 2, 3), max_tokens=9, sampling=Sampling(temperature=0, logit_bias={stop: 100.0}))
    assert (done.ids, done.finish_reason) == ((stop,), "stop")


def test_threads_share_a_model(model):
    alone = [model.complete((7, i), max_tokens=20, sampling=Sampling(temperature=0)).ids for i in range(6)]
    got = [None] * 6

    def run(i):
        got[i] = model.complete((7, i), max_tokens=20, sampling=Sampling(temperature=0)).ids

    threads = [threading.Thread(target=run, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == alone


def test_an_abandoned_stream_frees_its_slot(model):
    for _ in range(8):
        stream = model.stream("Tell me", sampling=SEEDED)
        next(stream)
        stream.close()
    assert model.complete((1,), max_tokens=1).usage.completion_tokens == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.generate(""), "empty"),
        (lambda m: m.generate("  \n"), "empty"),
        (lambda m: m.generate([]), "messages"),
        (lambda m: m.generate([{"role": "robot", "content": "x"}]), "role"),
        (lambda m: m.generate("x", reasoning="extreme"), "reasoning"),
        (lambda m: m.generate("x", max_tokens=0), "max_tokens"),
        (lambda m: m.generate("x", response_format={"type": "json_schema"}), "schema must be a JSON schema"),
        (lambda m: m.generate("word " * 600), "512"),
        (lambda m: m.generate(mlx_gptoss.Conversation(messages=(Message("user", "x"),)), system="y"), "Conversation"),
        (lambda m: m.complete([], max_tokens=1), "empty"),
        (lambda m: m.complete([10**6], max_tokens=1), "token ids"),
        (lambda m: m.complete("abc"), "tokenizer.encode"),
        (lambda m: m.logits([-1]), "token ids"),
        (lambda m: m.generate(None), "a question, a list of messages or a Conversation"),
        (lambda m: m.generate(b"x"), "a question, a list of messages or a Conversation"),
        (lambda m: m.generate({"role": "user", "content": "x"}), "put it in brackets"),
        (lambda m: m.generate(["Hi"]), r'messages\[0\] must be a dict such as {"role": "user", .*, not \'Hi\''),
        (lambda m: m.generate([Message("user", "x")]), "append"),
        (lambda m: m.generate(m.agenerate("x")), "write await"),
        (lambda m: m.generate("x", temperature="hot"), r"temperature must be a number in \[0, 2\], not 'hot'"),
        (lambda m: m.generate("x", sampling=0), "sampling must be a Sampling"),
        (lambda m: m.generate("x", sampling=SEEDED, top_p=0.5), "sampling and top_p are both given"),
        (lambda m: m.complete([1], sampling=SEEDED, seed=3), "sampling and seed are both given"),
        (lambda m: m.generate("x", tools=print), "put it in brackets"),
        (lambda m: m.generate("x", tools=["print"]), "a tool must be a function"),
        (lambda m: m.generate("x", response_format="json"), "a pydantic class"),
        (lambda m: m.generate("x", response_format=int), "a pydantic class"),
        (lambda m: m.generate("x", response_format={"type": "xml"}), "json_schema"),
        (lambda m: m.logits([1] * 513), "context"),
    ],
)
def test_bad_requests_are_refused(model, call, message):
    with pytest.raises(InvalidRequest, match=message):
        call(model)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.generate(promt="x"), r"generate\(\) has no option 'promt'; did you mean 'prompt'\?"),
        (lambda m: m.stream("x", temprature=0), r"stream\(\) has no option 'temprature'; did you mean 'temperature'\?"),
        (lambda m: m.generate(), r"generate\(\) needs prompt"),
        (lambda m: m.generate("x", "y"), "give options by name"),
        (lambda m: m.generate("x", prompt="y"), "one prompt"),
        (lambda m: m.acomplete(), r"acomplete\(\) needs ids"),
    ],
)
def test_wrong_names_suggest_the_right_ones(model, call, message):
    with pytest.raises(TypeError, match=message):
        call(model)


def test_the_prompt_may_be_named(model):
    assert model.generate(prompt="Hi", temperature=0, max_tokens=3).ids == greedy_ids(model, 3)


def test_sampling_fields_by_name(model, monkeypatch):
    assert model.generate("Hi", temperature=0, max_tokens=9).ids == greedy_ids(model, 9)
    seeded = model.complete((1, 2), seed=5, max_tokens=9, logprobs=2)
    assert seeded.ids == model.complete((1, 2), sampling=SEEDED, max_tokens=9).ids
    assert {len(top) for top in seeded.top} == {2}
    monkeypatch.setattr(model, "default_sampling", Sampling(temperature=0))
    assert model.generate("Hi", seed=1, max_tokens=9).ids == greedy_ids(model, 9)


def greedy_ids(model, count):
    return model.generate("Hi", sampling=Sampling(temperature=0), max_tokens=count).ids


def test_reprs_are_short(model):
    assert re.fullmatch(r"Model\('.*mxfp4', mxfp4 on mlx, context 512\)", repr(model))
    reply = model.generate("Hi", temperature=0, max_tokens=30)
    assert len(repr(reply)) < 1000 and "Token(" not in repr(reply)
    assert repr(Message("user", "x")) == "Message(role='user', content='x')"
    asked = mlx_gptoss.Conversation(reasoning="high").append("x")
    assert eval(repr(asked), vars(mlx_gptoss) | {"Message": Message, "Conversation": mlx_gptoss.Conversation}) == asked


def test_total_tokens(model):
    usage = model.generate("Hi", temperature=0, max_tokens=3).usage
    assert usage.total_tokens == usage.prompt_tokens + 3


def test_finished_has_the_conversation_of_the_reply(model):
    reply = model.generate("Hi", temperature=0, max_tokens=30)
    *_, last = model.stream("Hi", temperature=0, max_tokens=30)
    assert last.conversation == reply.conversation
    assert last.conversation.messages[0] == Message("user", "Hi")
    *_, raw = model.stream_raw((1, 2), max_tokens=3)
    assert raw.conversation == mlx_gptoss.Conversation()


def test_streaming_refuses_before_the_first_event(model):
    with pytest.raises(InvalidRequest):
        model.stream("")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"backend": "tpu"}, InvalidRequest, "backend"),
        ({"dtype": "int8"}, InvalidRequest, "dtype"),
        ({"device": "quantum"}, InvalidRequest, "device"),
        ({"max_context": 0}, InvalidRequest, "max_context"),
        ({"max_context": 10**7}, InvalidRequest, "max_context"),
        ({"slots": 0}, InvalidRequest, "slots"),
        ({"quantize": "int3"}, InvalidRequest, "quantize must be one of .*mlx-4bit"),
        ({"quantize": "bf16"}, InvalidRequest, "quantize"),
    ],
)
def test_bad_options_of_load_are_refused(mini, options, error, message):
    with pytest.raises(error, match=message):
        mlx_gptoss.load(mini / "mxfp4", **options)


def test_load_of_what_is_not_there(tmp_path):
    with pytest.raises(CheckpointError):
        mlx_gptoss.load(tmp_path / "nothing")
    with pytest.raises(CheckpointError):
        mlx_gptoss.load(tmp_path)


def test_a_model_that_does_not_fit_is_refused_before_it_loads(mini, monkeypatch):
    monkeypatch.setattr("mlx_gptoss.backends.mlx.system_available", lambda: 50 << 20)
    monkeypatch.setattr("mlx_gptoss.backends.mlx.load_model", lambda *a: pytest.fail("it was loaded"))
    with pytest.raises(DoesNotFit, match=r"needs .* are available"):
        mlx_gptoss.load(mini / "mxfp4", device="cpu")


def test_a_missing_backend_names_the_remedy(mini, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "mlx_gptoss.backends.mlx", None)
    with pytest.raises(BackendUnavailable, match="pip install"):
        mlx_gptoss.load(mini / "mxfp4")


def test_a_checkpoint_without_a_tokenizer_still_takes_ids(mini, tmp_path):
    folder = tmp_path / "bare"
    shutil.copytree(mini / "mxfp4", folder)
    (folder / "tokenizer.json").unlink()
    with mlx_gptoss.load(folder, max_context=64) as model:
        assert len(model.complete((1, 2), max_tokens=3, sampling=Sampling(temperature=0)).ids) == 3
        with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
            model.generate("Hi")
        with pytest.raises(InvalidRequest, match="stop strings"):
            model.complete((1, 2), max_tokens=3, sampling=Sampling(stop="x"))


def test_a_closed_model_says_so(mini):
    model = mlx_gptoss.load(mini / "mxfp4", max_context=64)
    model.close()
    with pytest.raises(GptOssError, match="closed"):
        model.complete((1,), max_tokens=1)


def test_prompts_of_three_kinds():
    text = as_conversation("Hi", reasoning="high", system="Be brief.")
    chat = as_conversation(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}], reasoning="high"
    )
    assert text == chat
    assert as_conversation(text) is text


def test_an_answer_drops_its_reasoning_from_the_history_and_a_call_keeps_it():
    asked = as_conversation("Hi")
    thought = Message("assistant", "hm", channel="analysis")
    final = Message("assistant", "Hello", channel="final")
    call = Message("assistant", "{}", channel="commentary", recipient="functions.f")
    assert with_reply(asked, (thought, final)).messages == (*asked.messages, final)
    assert with_reply(asked, (thought, call)).messages == (*asked.messages, thought, call)


def test_describe_and_convert(mini, tmp_path):
    assert mlx_gptoss.describe(mini / "mxfp4").format == "mxfp4"
    report = mlx_gptoss.convert(mini / "mxfp4", tmp_path / "out", to="mlx-mxfp4")
    assert report.format == "mlx-mxfp4"
    assert mlx_gptoss.describe(tmp_path / "out").format == "mlx-mxfp4"


def test_the_bundled_model_is_small():
    assert sum(path.stat().st_size for path in NANO.iterdir() if path.is_file()) <= 4_000_000


def test_the_checkpoint_says_how_it_is_sampled():
    assert default_sampling({}) == Sampling()
    assert default_sampling({"do_sample": False, "temperature": 0.7}) == Sampling(temperature=0)
    assert default_sampling({"do_sample": True, "temperature": 0.7, "top_p": 0.9, "eos_token_id": 3}) == Sampling(
        temperature=0.7, top_p=0.9
    )


@pytest.mark.parametrize("name", ["mlx-4bit", "mlx-8bit", "mlx-nvfp4", "mlx-mxfp4", "mlx-mxfp4-q8"])
def test_quantizing_while_loading_is_converting_first(mini, tmp_path, name):
    mlx_gptoss.convert(mini / "mxfp4", tmp_path / "out", to=name)
    with mlx_gptoss.load(tmp_path / "out") as converted, mlx_gptoss.load(mini / "mxfp4", quantize=name) as quantized:
        assert quantized.format == converted.format == name
        assert quantized.plan.weights_bytes == converted.plan.weights_bytes
        assert (quantized.logits((1, 2, 3)) == converted.logits((1, 2, 3))).all()


def test_old_reasoning_of_a_chat_is_dropped_and_that_of_a_pending_call_is_kept():
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    chat = [
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "one", "reasoning": "old"},
        {"role": "user", "content": "2"},
        {"role": "assistant", "content": "two", "reasoning": "old too"},
        {"role": "user", "content": "3"},
        {"role": "assistant", "content": None, "reasoning": "pending", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "3"},
    ]
    analysis = [m.content for m in as_conversation(chat).messages if m.channel == "analysis"]
    assert analysis == ["pending"]
