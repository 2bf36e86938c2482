"""What crosses the pipe between a server and the process of a model."""

from __future__ import annotations

import pickle

import pytest

from mlx_gptoss import errors
from mlx_gptoss.harmony.openai import from_chat
from mlx_gptoss.sampling import Sampling
from mlx_gptoss.server.models.messages import Failed, Start
from mlx_gptoss.server.models.worker import sendable

ERRORS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.GptOssError)]


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: kind.__name__)
def test_errors_arrive_as_they_are(kind):
    error = kind("no room", retry_after_s=7) if kind is errors.Busy else kind("no room")
    arrived = pickle.loads(pickle.dumps(Failed(1, sendable(error)))).error
    assert type(arrived) is kind and str(arrived) == "no room" and vars(arrived) == vars(error)


def test_an_unexpected_error_arrives_as_its_text():
    class Unknown(Exception):
        pass

    arrived = pickle.loads(pickle.dumps(Failed(None, sendable(Unknown("what?"))))).error
    assert type(arrived) is RuntimeError and str(arrived) == "Unknown: what?"


def test_conversations_arrive_as_they_are():
    tool = {"type": "function", "function": {"name": "a b", "parameters": {"type": "object"}}}
    conversation = from_chat([{"role": "user", "content": "Hi \ud800"}], reasoning="low", tools=[tool])
    start = Start(3, "stream", conversation, {"sampling": Sampling(temperature=0.5, stop=("x",))})
    assert pickle.loads(pickle.dumps(start)) == start
