"""Vercel's AI SDK, unmodified, through each of its providers: tool loops, streams, structured output."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from programs import FOLDER, find_program, run
from scripted import WEATHER, WEATHER_ANSWER, WEATHER_THOUGHT, calls, check_weather, says, thinks

pytestmark = pytest.mark.slow
KINDS = ("responses", "chat", "compatible", "anthropic")
SHOWS_REASONING = {"responses", "compatible", "anthropic"}  # createOpenAI().chat() drops it


@pytest.fixture
def ask(tmp_path):
    """Runs ai_sdk.mjs and returns what it prints."""
    node = find_program("node", "nothing but Node.js")
    if FOLDER is None or not Path(FOLDER, "node_modules", "ai").is_dir():
        packages = "ai @ai-sdk/openai @ai-sdk/openai-compatible @ai-sdk/anthropic"
        pytest.skip(f"no AI SDK: npm install {packages}, and name the folder in CLIENT_PROGRAMS")
    shutil.copy(Path(__file__).with_name("ai_sdk.mjs"), tmp_path)
    (tmp_path / "node_modules").symlink_to(Path(FOLDER, "node_modules").resolve())
    return lambda server, kind, scenario: json.loads(
        run([node, "ai_sdk.mjs", kind, server.url, scenario], tmp_path, {})
    )


@pytest.mark.parametrize("kind", KINDS)
def test_tool_and_result(ask, scripted_server, kind):
    server = scripted_server(WEATHER)
    answer = ask(server, kind, "tool")
    assert answer["text"] == WEATHER_ANSWER and answer["called"] == [["get_weather", {"location": "Oslo"}]]
    if kind in SHOWS_REASONING:
        assert answer["reasoning"][0] == WEATHER_THOUGHT
        check_weather(server.script.prompts)
    else:
        assert "<|start|>functions.get_weather to=assistant" in server.script.prompts[1]


@pytest.mark.parametrize("kind", KINDS)
def test_stream(ask, scripted_server, kind):
    answer = ask(scripted_server([[thinks("Two and two."), says("Four.")]]), kind, "stream")
    assert answer["text"] == "Four." and answer["outputTokens"] > 0
    assert answer["reasoning"] == ("Two and two." if kind in SHOWS_REASONING else "")


@pytest.mark.parametrize("kind", KINDS)
def test_structured_output(ask, scripted_server, kind):
    reply = calls("json", '{"answer": "Oslo"}') if kind == "anthropic" else says('{"answer": "Oslo"}')
    assert ask(scripted_server([[reply]]), kind, "object") == {"output": {"answer": "Oslo"}}
