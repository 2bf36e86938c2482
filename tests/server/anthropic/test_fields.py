"""The other fields of /v1/messages."""

from __future__ import annotations

import pytest
from anthropic_requests import SUM, ignored, post, refused


@pytest.mark.parametrize(
    ("fields", "effort"),
    [
        ({}, "medium"),
        ({"thinking": {"type": "disabled"}}, "low"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "low"),
        ({"thinking": {"type": "enabled", "budget_tokens": 31_999}}, "high"),
        ({"thinking": {"type": "adaptive"}}, "medium"),
        ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "max"}}, "high"),
        ({"output_config": {"effort": "low"}}, "low"),
    ],
)
def test_reasoning_effort(seen, fields, effort):
    assert seen(**fields).reasoning == effort


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({}, set()),
        ({"max_tokens": None, "stop_sequences": ["1"]}, set()),
        (
            {"metadata": {"user_id": "a"}, "service_tier": "auto", "container": "c"},
            {"metadata", "service_tier", "container"},
        ),
        ({"context_management": {"edits": []}, "betas": ["x"]}, {"context_management", "betas"}),
        ({"mcp_servers": [{"type": "url", "url": "http://a", "name": "a"}]}, {"mcp_servers"}),
        ({"cache_control": {"type": "ephemeral"}}, {"cache_control"}),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {}, "mood": "b"}]}
                ]
            },
            {"cache_control", "messages[].content[].mood"},
        ),
        ({"messages": [{**SUM, "id": "msg_1"}]}, {"messages[].id"}),
        ({"output_config": {"tone": "warm"}}, {"output_config.tone"}),
    ],
)
def test_fields_without_effect_are_named(http, fields, names):
    assert ignored(post(http, **fields)) == names


def test_tools_that_are_not_served_are_left_out_while_functions_remain(http, seen, weather):
    others = [
        {"type": "web_search_20250305", "name": "web_search", "max_uses": 5},
        {"type": "bash_20250124", "name": "bash"},
        {"type": "text_editor_20250728", "name": "str_replace_based_edit_tool"},
    ]
    mine = {**weather, "cache_control": {"type": "ephemeral"}, "input_examples": [{"location": "Rome"}]}
    names = {f"tools[].{tool['type']}" for tool in others} | {"cache_control", "tools[].input_examples"}
    assert ignored(post(http, tools=[*others, mine])) == names
    assert [function.name for function in seen(tools=[*others, mine]).functions] == ["get_weather"]
    assert "web_search_20250305" in refused(http, tools=others)
    assert "'bash'" in refused(http, tools=[*others, mine], tool_choice={"type": "tool", "name": "bash"})


def test_models_have_the_fields_of_both_dialects(client, server):
    (listed,) = client.models.list()
    assert (listed.id, listed.type, listed.display_name) == ("mlx-gptoss-nano", "model", "mlx-gptoss-nano")
    assert listed.created_at.timestamp() == server.service.created and listed.max_input_tokens == 4096
    page = client.models.list()
    assert (page.has_more, page.first_id, page.last_id) == (False, listed.id, listed.id)
    assert client.models.retrieve("claude-of-any-name").id == listed.id
