"""Anthropic's own client, and a look at what the model is given."""

from __future__ import annotations

import pytest
from anthropic_requests import post

anthropic = pytest.importorskip("anthropic", reason="/v1/messages is tested through Anthropic's own client")


@pytest.fixture(scope="module")
def client(server):
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def weather(weather_tool):
    function = weather_tool["function"]
    return {"name": function["name"], "description": function["description"], "input_schema": function["parameters"]}


@pytest.fixture
def seen(model, monkeypatch, http):
    """A function that sends a request and returns the Conversation that the model was given."""
    conversations = []
    stream = type(model).stream

    def recording_stream(self, prompt, **options):
        conversations.append(prompt)
        return stream(self, prompt, **options)

    monkeypatch.setattr(type(model), "stream", recording_stream)

    def send(**fields):
        answer = post(http, **fields)
        assert answer.status_code == 200, answer.text
        return conversations[-1]

    return send
