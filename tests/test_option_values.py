"""Every option of load, generate, stream, complete and logits is checked for type and range, by one table."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np
import pytest

import mlx_gptoss
from mlx_gptoss.errors import GptOssError, InvalidRequest
from mlx_gptoss.options import GenerationOptions, LoadOptions
from mlx_gptoss.sampling import Sampling

NAN, INF, HUGE, LONGEST = math.nan, math.inf, 10**400, 10**5000  # Python does not print the last one
LOOP: list[Any] = []
LOOP.append(LOOP)
NOT_NUMBERS = ("1", None, True, [1], {}, b"1", object(), 1j)
NOT_INTEGERS = (*NOT_NUMBERS[:1], *NOT_NUMBERS[2:], 2.5, 1.0, NAN, INF, -INF)
NOT_TEXTS = (1, 2.5, NAN, True, b"x", ["x"], {}, object())

# For each field, values that are refused, and values that are not. Strings to stop at have tests of their own.
SAMPLING: dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]] = {
    "temperature": ((*NOT_NUMBERS, NAN, INF, -INF, -0.1, 2.1, HUGE, -LONGEST), (0, 2, 0.5)),
    "top_p": ((*NOT_NUMBERS, NAN, INF, -INF, 0, -1, 1.1, LONGEST), (1, 0.01)),
    "top_k": ((*NOT_INTEGERS, None, -1, -LONGEST), (0, 1, 2**31, 2**64, HUGE)),
    "min_p": ((*NOT_NUMBERS, NAN, INF, -0.1, 1, LONGEST), (0, 0.99)),
    "repetition_penalty": ((*NOT_NUMBERS, NAN, INF, 0, -1, 10.1, LONGEST), (10, 0.1)),
    "presence_penalty": ((*NOT_NUMBERS, NAN, INF, -2.1, 2.1, LONGEST), (-2, 2)),
    "frequency_penalty": ((*NOT_NUMBERS, NAN, INF, -2.1, 2.1, LONGEST), (-2, 2)),
    "logit_bias": (
        (1, "x", [1], True, [(1, 1.0)], {"1": 1.0}, {-1: 1.0}, {True: 1.0}, {1.0: 1.0}, {1: 101}, {1: NAN}, {1: INF},
         {1: "1"}, {1: None}, {1: LONGEST}, {LONGEST: 1.0}, {10**6: 1.0}),
        (None, {}, {5: -100}, {5: 100.0}),
    ),
    "seed": ((*NOT_INTEGERS, -1, 2**64, LONGEST), (None, 0, 2**64 - 1)),
    "logprobs": ((*NOT_INTEGERS, None, -1, 21, LONGEST), (0, 20)),
}  # fmt: skip
GENERATION: dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]] = {
    "sampling": ((1, 0.5, "greedy", {"temperature": 0}, True, [Sampling()]), (None, Sampling(temperature=0))),
    "max_tokens": ((*NOT_INTEGERS, 0, -1, -LONGEST), (1, 2**64, HUGE, LONGEST)),
    "reasoning": ((*NOT_TEXTS, "extreme", "", "LOW"), (None, "low", "high")),
    "system": (NOT_TEXTS, (None, "Be brief.", "")),
    "tools": ((1, "x", {}, None, True, [1], ["f"], [None], [{}], LOOP), ((), [])),
    "response_format": ((1, "json", [], True, {}, {"type": 1}, {"type": "yaml"}, {"type": "json_schema"}), (None,)),
    "tool_choice": ((1, None, [], True, "sometimes", {}, {"type": "function"}, {"type": 1}), ("auto", "none")),
    "stop_token_ids": (
        (1, "12", None, {1: 2}, True, [1.0], [True], ["1"], [-1], [NAN], [10**6], [LONGEST], [1] * 65, LOOP),
        ((), [1], (1, 2)),
    ),
    "adapter": (NOT_TEXTS, (None,)),
    "parallel_tool_calls": ((1, 0, "no", None, NAN, []), (True, False)),
}
LOAD: dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]] = {
    "backend": ((*NOT_TEXTS, None, "tpu", ""), ("mlx",)),
    "device": ((*NOT_TEXTS, "quantum", "", "cuda:-1", "cpu\0"), ("cpu",)),
    "dtype": ((*NOT_TEXTS, "int8", "", "FLOAT32"), (None, "float32")),
    "adapters": ((1, "x", True, ["x"], {1: "x"}, {"": "x"}, {"x": 1}), (None, {})),
    "max_context": ((*NOT_INTEGERS, 0, -1, -LONGEST, 10**7, LONGEST), (None, 64)),
    "slots": ((*NOT_INTEGERS, None, 0, -1, HUGE, LONGEST), (1, 2)),
    "quantize": ((*NOT_TEXTS, "int3", "", "bf16"), (None,)),
    "kv_bits": ((*NOT_INTEGERS, 0, 4, 16, -8, LONGEST), (None, 8)),
    "speculate": ((1, 0, "yes", None, 2.5), (True, False)),
    "custom_kernels": ((1, 0, "no", None), (True, False)),
    "max_waiting": ((*NOT_INTEGERS, -1, -LONGEST), (None, 0, HUGE)),
    "prefix_cache": ((*NOT_INTEGERS, -1, -LONGEST, LONGEST), (None, 0, 10**6)),
    "prompt_cache": ((1, True, b"folder", [], {}), (None,)),
}
IDS = (1, 2.5, None, "12", [1.0], ["1"], [NAN], [None], [[1]], [-1], [10**6], [LONGEST], {"a": 1}, object())


def refused(table: dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]]) -> list[Any]:
    return [pytest.param(name, value, id=f"{name}-{n}") for name in table for n, value in enumerate(table[name][0])]


def accepted(table: dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]]) -> list[Any]:
    return [pytest.param(name, value, id=f"{name}-{n}") for name in table for n, value in enumerate(table[name][1])]


@pytest.fixture(scope="module", params=["mlx", "cuda"])
def model(request, backend_module):
    backend_module(request.param)
    with mlx_gptoss.load(None, backend=request.param, device="cpu", max_context=256, slots=2) as loaded:
        yield loaded


def expect_error(name: str, use: Callable[[], object]) -> None:
    """The error is one short line that begins with, or quotes, the option's name."""
    with pytest.raises(GptOssError) as caught:
        use()
    text = str(caught.value)
    assert name.rstrip("s") in text and "\n" not in text and len(text) < 400, text


def test_the_tables_have_every_option():
    assert SAMPLING.keys() | {"stop"} == {field.name for field in fields(Sampling)}
    assert GENERATION.keys() | SAMPLING.keys() | {"stop"} == {field.name for field in fields(GenerationOptions)}
    assert LOAD.keys() == {field.name for field in fields(LoadOptions)}


@pytest.mark.parametrize(("name", "value"), refused(SAMPLING))
def test_sampling_refuses(model, name, value):
    expect_error(name, lambda: model.complete([1, 2], max_tokens=1, sampling=Sampling(**{name: value})))


@pytest.mark.parametrize(("name", "value"), [case for case in refused(SAMPLING) if case.values[1] is not None])
def test_sampling_by_name_refuses_the_same(model, name, value):
    """But for None, which leaves a field as the model has it."""
    expect_error(name, lambda: model.complete([1, 2], max_tokens=1, **{name: value}))
    expect_error(name, lambda: model.stream("Hi", max_tokens=1, **{name: value}))


@pytest.mark.parametrize(("name", "value"), accepted(SAMPLING))
def test_sampling_accepts(model, name, value):
    sampling = Sampling(**{"temperature": 0.5, name: value})
    assert 1 <= len(model.complete([1, 2], max_tokens=2, sampling=sampling).ids) <= 2


@pytest.mark.parametrize("method", ["generate", "stream"])
@pytest.mark.parametrize(("name", "value"), refused(GENERATION))
def test_generating_refuses(model, name, value, method):
    expect_error(name, lambda: getattr(model, method)("Hi", **{name: value}))


@pytest.mark.parametrize(("name", "value"), accepted(GENERATION))
def test_generating_accepts(model, name, value):
    with_end = {"max_tokens": 2, name: value}
    events = model.stream("Hi", **with_end)
    assert next(events)
    events.close()


@pytest.mark.parametrize("max_tokens", GENERATION["max_tokens"][0], ids=lambda value: type(value).__name__)
def test_completing_refuses(model, max_tokens):
    expect_error("max_tokens", lambda: model.complete([1], max_tokens=max_tokens))
    expect_error("max_tokens", lambda: model.stream_raw([1], max_tokens=max_tokens))


@pytest.mark.parametrize("sampling", GENERATION["sampling"][0])
def test_completing_refuses_other_sampling(model, sampling):
    expect_error("sampling", lambda: model.complete([1], max_tokens=1, sampling=sampling))


@pytest.mark.parametrize("ids", [*IDS, []])
def test_ids_are_integers_of_the_vocabulary(model, ids):
    for use in (model.logits, lambda ids: model.complete(ids, max_tokens=1), model.stream_raw):
        with pytest.raises(InvalidRequest, match="token id"):
            use(ids)


def test_numpys_integers_are_ids(model):
    ids = np.array([1, 2, 3])
    assert (model.logits(ids) == model.logits([1, 2, 3])).all()


@pytest.mark.parametrize("prompt", [1, 2.5, None, b"Hi", {"role": "user"}, [1], ["Hi"], [None], [{}], [[]], object()])
def test_prompts_of_other_types(model, prompt):
    for method in (model.generate, model.stream):
        with pytest.raises(InvalidRequest):
            method(prompt, max_tokens=1)


@pytest.mark.parametrize(("name", "value"), refused(LOAD))
def test_loading_refuses(name, value):
    expect_error(name, lambda: mlx_gptoss.load(None, **{"backend": "mlx", "device": "cpu", name: value}))


@pytest.mark.parametrize(("name", "value"), accepted(LOAD))
def test_loading_accepts(name, value):
    options = {"backend": "mlx", "device": "cpu", "max_context": 64, name: value}
    with mlx_gptoss.load(None, **options) as loaded:
        assert loaded.complete([1], max_tokens=1).ids


@pytest.mark.parametrize("model", [1, 2.5, True, b"nano", ["nano"], {}, NAN])
def test_a_model_is_a_path_or_an_id(model):
    expect_error("path_or_repo_id", lambda: mlx_gptoss.load(model))
