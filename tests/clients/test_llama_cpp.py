"""llama.cpp's server tests for chat, tools, messages and responses, as a list of which hold here: LLAMA_CPP.md.

Each case sends what the test of that name sends, in our words, and checks what it checks of the protocol. Words of a
certain model and llama.cpp's build number are not checked. A row of the list that says "no" has to fail: when it no
longer does, the list is out of date.
"""

from __future__ import annotations

import re
from pathlib import Path

import llama_cpp_anthropic  # noqa: F401 - registers its cases
import llama_cpp_chat  # noqa: F401 - registers its cases
import llama_cpp_responses  # noqa: F401 - registers its cases
import llama_cpp_tools  # noqa: F401 - registers its cases
import openai
import pytest
from llama_cpp_cases import CASES, Asker
from scripted import NextReply, says, serving_script, thinks

ROW = re.compile(r"^\| `(?P<case>[\w\[\], .-]+)` \| (?P<holds>yes|no) \|")
LIST = [ROW.match(line) for line in Path(__file__).with_name("LLAMA_CPP.md").read_text().splitlines()]
HOLDS = {row["case"]: row["holds"] == "yes" for row in LIST if row}


@pytest.fixture(scope="module")
def server():
    next_reply = NextReply()
    with serving_script(next_reply) as running:
        yield Asker(running, next_reply)


def test_the_list_has_every_case():
    assert HOLDS.keys() == CASES.keys()


@pytest.mark.parametrize("name", HOLDS)
def test_case(server, name):
    server.reply(thinks("Well."), says("A very long book."))
    if HOLDS[name]:
        CASES[name](server)
    else:
        with pytest.raises((AssertionError, KeyError, openai.APIError)):
            CASES[name](server)
