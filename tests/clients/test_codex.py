"""Codex CLI, unmodified, with the configuration that CLIENTS.md gives: a shell call and its result, a second turn."""

from __future__ import annotations

import json

import pytest
from programs import find_program, project, run
from scripted import answers_with_tool, calls, says, thinks

pytestmark = pytest.mark.slow
CONFIG = """\
model = "{model}"
model_provider = "mlx-gptoss"

[model_providers.mlx-gptoss]
name = "mlx-gptoss"
base_url = "{url}/v1"
wire_api = "responses"
"""
LISTS = answers_with_tool("exec_command", '{"cmd": "ls"}', "There is notes.txt.", "I list the files.")


@pytest.fixture
def codex(tmp_path):
    """Runs `codex exec` in a project and returns the events that it prints."""
    program = find_program("codex", "@openai/codex")

    def execute(server, *arguments, model="gpt-oss-20b"):
        home = tmp_path / ".codex"
        home.mkdir(exist_ok=True)
        (home / "config.toml").write_text(CONFIG.format(model=model, url=server.url))
        command = [program, "exec", "--json", "--skip-git-repo-check", *arguments]
        temporary = tmp_path / "temporary"  # Codex has no sandbox if its home is in the folder for temporary files
        temporary.mkdir(exist_ok=True)
        environment = {"TMPDIR": str(temporary), "CODEX_HOME": str(home), "CODEX_OSS_BASE_URL": f"{server.url}/v1"}
        output = run(command, tmp_path, environment, project(tmp_path))
        return [json.loads(line) for line in output.splitlines() if line.startswith("{")]

    return execute


def items(events, kind):
    return [event["item"] for event in events if event["type"] == "item.completed" and event["item"]["type"] == kind]


def test_shell_call_and_second_request(codex, scripted_server):
    server = scripted_server(LISTS)
    events = codex(server, "What files are here?")
    assert [item["text"] for item in items(events, "agent_message")] == ["There is notes.txt."]
    (command,) = items(events, "command_execution")
    assert command["exit_code"] == 0 and "notes.txt" in command["aggregated_output"]
    assert items(events, "reasoning")[0]["text"] == "I list the files."
    assert events[-1]["type"] == "turn.completed" and events[-1]["usage"]["output_tokens"] > 0
    first, second = server.script.prompts
    assert second.startswith(first.removesuffix("<|start|>assistant"))  # nothing of the prefix is computed again
    assert "<|channel|>analysis<|message|>I list the files.<|end|>" in second and "notes.txt" in second


def test_conversation_resumed(codex, scripted_server):
    server = scripted_server([[thinks("Sums."), says("Four.")], [thinks("More."), says("Six.")]])
    codex(server, "What is 2 + 2?")
    events = codex(server, "resume", "--last", "Add 2.")
    assert [item["text"] for item in items(events, "agent_message")] == ["Six."]
    assert "<|channel|>final<|message|>Four.<|end|>" in server.script.prompts[1]
    assert "<|channel|>analysis<|message|>Sums." not in server.script.prompts[1]  # reasoning of a finished turn


def test_output_schema(codex, scripted_server, tmp_path):
    server = scripted_server([[says('{"answer": "Oslo"}')]])
    schema = {"type": "object", "properties": {"answer": {"type": "string"}}, "required": ["answer"]}
    (tmp_path / "schema.json").write_text(json.dumps({**schema, "additionalProperties": False}))
    events = codex(server, "--output-schema", str(tmp_path / "schema.json"), "What is the capital of Norway?")
    assert [json.loads(item["text"]) for item in items(events, "agent_message")] == [{"answer": "Oslo"}]


def test_patch_under_its_grammar(codex, scripted_server, tmp_path):
    """With a model name of its own catalog, Codex offers apply_patch as a custom tool with a grammar."""
    patch = "*** Begin Patch\n*** Add File: new.txt\n+Buy bread.\n*** End Patch\n"

    def reply(prompt):
        if "<|start|>functions.apply_patch to=assistant" in prompt:
            return [says("Done.")]
        return [thinks("I add it."), calls("apply_patch", patch, None)]

    server = scripted_server(reply)
    events = codex(server, "--sandbox", "workspace-write", "Add bread.", model="gpt-5.5")
    assert [item["text"] for item in items(events, "agent_message")] == ["Done."]
    assert (tmp_path / "project" / "new.txt").read_text() == "Buy bread.\n"


def test_oss_finds_the_server_as_ollama(codex, scripted_server):
    events = codex(scripted_server(LISTS), "--oss", "--local-provider", "ollama", "What files are here?")
    assert [item["text"] for item in items(events, "agent_message")] == ["There is notes.txt."]
