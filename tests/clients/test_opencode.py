"""opencode, unmodified, with the configuration that CLIENTS.md gives: a bash call and its result, reasoning shown."""

from __future__ import annotations

import json

import pytest
from programs import find_program, project, run
from scripted import answers_with_tool, says

pytestmark = pytest.mark.slow
LISTS = answers_with_tool("bash", '{"command": "ls"}', "There is notes.txt.", "I list the files.")
PROVIDERS = {"@ai-sdk/openai-compatible": "/v1", "@ai-sdk/openai": "/v1", "@ai-sdk/anthropic": "/v1"}


def config(package, url):
    """The content of opencode.json."""
    limit = {"context": 131072, "output": 32768}
    model = {"name": "gpt-oss 20b", "reasoning": True, "tool_call": True, "limit": limit}
    options = {"baseURL": url + PROVIDERS[package], "apiKey": "none"}
    provider = {"npm": package, "name": "mlx-gptoss", "options": options, "models": {"gpt-oss-20b": model}}
    return {
        "$schema": "https://opencode.ai/config.json",
        "autoupdate": False,
        "share": "disabled",
        "model": "mlx-gptoss/gpt-oss-20b",
        "provider": {"mlx-gptoss": provider},
    }


def reply(prompt):
    """opencode also asks for the title of the conversation."""
    return [says("Files")] if "You are a title generator" in prompt else LISTS(prompt)


@pytest.mark.parametrize("package", PROVIDERS)
def test_bash_call_and_second_request(tmp_path, scripted_server, package):
    program = find_program("opencode", "opencode-ai")
    server = scripted_server(reply)
    folder = project(tmp_path)
    (folder / "opencode.json").write_text(json.dumps(config(package, server.url)))
    environment = {"OPENCODE_DISABLE_AUTOUPDATE": "1", "OPENCODE_DISABLE_MODELS_FETCH": "1"}
    command = [program, "run", "--format", "json", "--thinking", "What files are here?"]
    events = [json.loads(line) for line in run(command, tmp_path, environment, folder).splitlines()]
    parts = {event["type"]: event["part"] for event in events}
    assert parts["text"]["text"] == "There is notes.txt."
    assert parts["tool_use"]["state"]["input"]["command"] == "ls"
    assert "notes.txt" in parts["tool_use"]["state"]["output"]
    assert "I list the files." in [event["part"]["text"] for event in events if event["type"] == "reasoning"]
    second = next(prompt for prompt in server.script.prompts if "<|start|>functions.bash to=assistant" in prompt)
    assert "<|channel|>analysis<|message|>I list the files.<|end|>" in second
