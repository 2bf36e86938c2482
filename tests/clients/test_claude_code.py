"""Claude Code, unmodified, with the settings that CLIENTS.md gives: a Bash call and its result, a second turn."""

from __future__ import annotations

import json

import pytest
from programs import find_program, project, run
from scripted import answers_with_tool, calls, says, thinks

pytestmark = pytest.mark.slow
LISTS = answers_with_tool("Bash", '{"command": "ls"}', "There is notes.txt.", "I list the files.")


@pytest.fixture
def claude(tmp_path):
    """Runs `claude -p` in a project and returns the events that it prints."""
    program = find_program("claude", "@anthropic-ai/claude-code")

    def ask(server, question, *arguments, output="stream-json"):
        environment = {
            "ANTHROPIC_BASE_URL": server.url,
            "ANTHROPIC_AUTH_TOKEN": "none",
            "ANTHROPIC_MODEL": "gpt-oss-20b",
            "ANTHROPIC_SMALL_FAST_MODEL": "gpt-oss-20b",
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        }
        command = [program, "-p", question, "--output-format", output, "--verbose", *arguments]
        printed = run(command, tmp_path, environment, project(tmp_path))
        return [json.loads(line) for line in printed.splitlines()] if output == "stream-json" else printed

    return ask


def blocks(events, kind):
    """The content blocks of one kind in the messages that Claude Code printed."""
    messages = [event["message"] for event in events if event["type"] in ("assistant", "user")]
    return [block for message in messages for block in message["content"] if block["type"] == kind]


def test_bash_call_and_second_request(claude, scripted_server):
    server = scripted_server(LISTS)
    events = claude(server, "What files are here?", "--include-partial-messages", "--allowedTools", "Bash")
    result = events[-1]
    assert (result["type"], result["is_error"], result["result"]) == ("result", False, "There is notes.txt.")
    assert blocks(events, "thinking")[0]["thinking"] == "I list the files."
    assert blocks(events, "tool_use")[0]["input"] == {"command": "ls"}
    assert "notes.txt" in blocks(events, "tool_result")[0]["content"]
    first, second = server.script.prompts
    assert "x-anthropic-billing-header" not in first + second
    assert second.startswith(first.removesuffix("<|start|>assistant"))  # nothing of the prefix is computed again
    assert "<|channel|>analysis<|message|>I list the files.<|end|>" in second
    assert result["usage"]["cache_read_input_tokens"] > 0


def test_conversation_continued(claude, scripted_server):
    server = scripted_server([[thinks("Sums."), says("Four.")], [thinks("More."), says("Six.")]])
    claude(server, "What is 2 + 2?")
    assert claude(server, "Add 2.", "--continue")[-1]["result"] == "Six."
    assert "<|channel|>final<|message|>Four.<|end|>" in server.script.prompts[1]


def test_structured_output(claude, scripted_server):
    schema = {"type": "object", "properties": {"answer": {"type": "string"}}, "required": ["answer"]}

    def reply(prompt):
        if "<|start|>functions.StructuredOutput to=assistant" in prompt:
            return [says("Oslo.")]
        return [calls("StructuredOutput", '{"answer": "Oslo"}')]

    events = claude(scripted_server(reply), "What is the capital of Norway?", "--json-schema", json.dumps(schema))
    assert events[-1]["structured_output"] == {"answer": "Oslo"}


def test_context_is_counted(claude, scripted_server):
    printed = claude(scripted_server([]), "/context", output="text")
    assert "System prompt" in printed and "Tokens:** 0 " not in printed
