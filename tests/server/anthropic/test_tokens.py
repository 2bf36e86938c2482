"""Token counts of /v1/messages, and the prefix cache."""

from __future__ import annotations

import pytest
from anthropic_requests import MODEL, SUM, THINKING, create, said


@pytest.mark.parametrize("fields", [{}, {"system": "Be brief."}, {"thinking": THINKING}, {"with_tools": True}])
def test_count_tokens(client, weather, fields):
    fields = dict(fields)
    if fields.pop("with_tools", False):
        fields |= {"tools": [weather]}
    counted = client.messages.count_tokens(model=MODEL, messages=[SUM], **fields)
    usage = create(client, **{"max_tokens": 1100, **fields}).usage
    assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens
    assert usage.cache_creation_input_tokens == 0


def test_a_billing_header_does_not_defeat_the_prefix_cache(client):
    rules = "\n".join(f"Rule {number}: be brief, and say what you mean." for number in range(40))

    def ask(cch, messages):
        header = f"x-anthropic-billing-header: cc_version=2.1.{cch}; cc_entrypoint=cli; cch={cch};"
        blocks = [{"type": "text", "text": header}, {"type": "text", "text": f"X-Anthropic-Other: {cch}\n{rules}"}]
        return create(client, system=blocks, messages=messages)

    first = ask("11111", [SUM])
    history = [SUM, {"role": "assistant", "content": first.content}, {"role": "user", "content": "Add 5 to that."}]
    second = ask("22222", history)
    prompt = first.usage.input_tokens + first.usage.cache_read_input_tokens
    assert prompt > 400 and second.usage.cache_read_input_tokens > 0.9 * prompt


def test_transport_lines_are_dropped_from_the_system_prompt_alone(seen):
    line = "x-anthropic-billing-header: a"
    conversation = seen(system=f"{line}\nBe brief.\n{line}", messages=[{"role": "user", "content": line}])
    assert (conversation.instructions, said(conversation)) == ("Be brief.\n", [("user", None, line)])
    assert seen(system=[{"type": "text", "text": line}]).instructions is None
