"""Sampling refuses what no backend could honour, and says what it takes."""

from __future__ import annotations

import pytest

from mlx_gptoss.errors import InvalidRequest
from mlx_gptoss.sampling import MAX_STOP_CHARACTERS, MAX_STOPS, Sampling


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -0.1}, {"temperature": 2.1}, {"temperature": float("nan")}, {"temperature": "1"},
        {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1}, {"top_k": 1.5}, {"min_p": 1.0}, {"min_p": -0.1},
        {"repetition_penalty": 0.0}, {"presence_penalty": 3.0}, {"frequency_penalty": -2.5},
        {"logit_bias": {-1: 1.0}}, {"logit_bias": {1: 101.0}}, {"logit_bias": {"1": 1.0}},
        {"seed": -1}, {"seed": 2**64}, {"seed": True}, {"stop": ("",)}, {"stop": (1,)}, {"logprobs": 21},
    ],
)  # fmt: skip
def test_out_of_range_is_refused_by_name(options):
    with pytest.raises(InvalidRequest, match=next(iter(options))):
        Sampling(**options)


def test_a_single_stop_string_is_a_tuple_of_one():
    assert Sampling(stop="END").stop == ("END",)
    assert Sampling(stop=["a", "b"]).stop == ("a", "b")


def test_greedy_and_penalized():
    assert Sampling(temperature=0).greedy and not Sampling().greedy
    assert Sampling(frequency_penalty=0.1).penalized and not Sampling(logit_bias={1: 2.0}).penalized


def test_stop_strings_have_a_bound():
    assert len(Sampling(stop=["x" * MAX_STOP_CHARACTERS] * MAX_STOPS).stop) == MAX_STOPS
    with pytest.raises(InvalidRequest, match="stop has 17 strings, more than 16; give fewer"):
        Sampling(stop=["x"] * 17)
    with pytest.raises(InvalidRequest, match="stop has a string of 1025 characters, more than 1024; shorten it"):
        Sampling(stop="x" * 1025)
