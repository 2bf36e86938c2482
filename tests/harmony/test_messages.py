"""Conversations that grow turn by turn: results of calls, and which reasoning is kept."""

from __future__ import annotations

import pytest

from mlx_gptoss.harmony.messages import Conversation, Message, without_old_reasoning

ASKED = Message("user", "?")
THOUGHT = Message("assistant", "hm", "analysis")
PREAMBLE = Message("assistant", "I shall look.", "commentary")
CALL = Message("assistant", "{}", "commentary", "functions.f", "<|constrain|>json")
RESULT = Message("tool", "3", "commentary", "assistant", name="functions.f")
CODE = Message("assistant", "1 + 1", "analysis", "python", "code")
OUTPUT = Message("tool", "2", "analysis", "assistant", name="python")
ANSWER = Message("assistant", "three", "final")


@pytest.mark.parametrize(
    ("call", "function", "result"),
    [
        (CALL, "f", RESULT),
        (CALL, "functions.f", RESULT),
        (ASKED, "f", RESULT),  # no such call in the conversation
        (CODE, "python", Message("tool", "3", "analysis", "assistant", name="python")),
        (Message("assistant", "{}", "analysis", "browser.open", "code"), "browser.open", None),
        (Message("assistant", "{}", "commentary", "functions.python"), "python", None),
        (Message("assistant", "{}", "analysis", "functions.f"), "f", None),
        (Message("assistant", "{}", None, "functions.f"), "f", RESULT),
        (Message("assistant", "{}", "final", "functions.f"), "f", RESULT),
    ],
)
def test_the_author_of_a_result_is_the_recipient_of_the_call(
    call: Message, function: str, result: Message | None
) -> None:
    conversation = Conversation((ASKED, call)).with_result(function, "3")
    expected = result or Message("tool", "3", call.channel, "assistant", name=call.recipient)
    assert conversation.messages == (ASKED, call, expected)


def test_a_result_answers_the_latest_call_of_that_name() -> None:
    conversation = Conversation((CODE, Message("assistant", "{}", "commentary", "functions.python")))
    assert conversation.with_result("python", "3").messages[-1].name == "functions.python"


def test_reasoning_is_kept_until_the_final_answer() -> None:
    turn = (ASKED, THOUGHT, PREAMBLE, CALL, RESULT, THOUGHT, CODE, OUTPUT)
    assert without_old_reasoning(turn) == turn
    kept = (ASKED, PREAMBLE, CALL, RESULT, ANSWER)
    assert without_old_reasoning((*turn, ANSWER)) == kept
    assert without_old_reasoning((*turn, ANSWER, *turn)) == (*kept, *turn)
    assert without_old_reasoning((*turn, ANSWER, *turn, ANSWER)) == (*kept, *kept)
    assert without_old_reasoning(()) == ()
