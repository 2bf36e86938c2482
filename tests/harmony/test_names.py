"""Names of functions: what the model sees, and the way back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_gptoss.harmony.header import MAX_RECIPIENT_CHARACTERS
from mlx_gptoss.harmony.names import MAX_NAME_CHARACTERS, NAMESPACE, ToolNames


@pytest.mark.parametrize(
    ("name", "spelling"),
    [
        ("get_weather", "get_weather"),
        ("mcp__github__create-issue", "mcp__github__create-issue"),
        ("a.b", "a.b"),
        ("get weather", "get_weather"),
        ("search/web:v2", "search_web_v2"),
        ("functions.add", "functions.add"),
        ("日本", "function_4f6d5e4a0f0e"),
    ],
)
def test_spellings(name: str, spelling: str) -> None:
    names = ToolNames([name])
    assert names.spelling(name) == spelling or spelling.startswith("function_")
    assert names.original(names.spelling(name)) == name


def test_a_safe_name_keeps_its_spelling_whatever_else_is_declared() -> None:
    for declared in (["a b", "a_b"], ["a_b", "a b"]):
        names = ToolNames(declared)
        assert (names.spelling("a_b"), names.spelling("a b")) == ("a_b", "a_b_")


def test_an_undeclared_name_is_spelled_by_the_same_rule() -> None:
    assert ToolNames([]).recipient("old tool") == "functions.old_tool"
    assert ToolNames([]).recipient("functions.old") == "functions.old"
    assert ToolNames([]).original("old_tool") == "old_tool"


@given(st.lists(st.text(min_size=1, max_size=300), unique=True, max_size=8))
def test_every_name_has_its_own_spelling_that_fits_a_header(declared: list[str]) -> None:
    names = ToolNames(declared)
    spellings = [names.spelling(name) for name in declared]
    assert len(set(spellings)) == len(declared)
    assert [names.original(spelling) for spelling in spellings] == declared
    for name, spelling in zip(declared, spellings, strict=True):
        assert len(NAMESPACE + spelling) < MAX_RECIPIENT_CHARACTERS
        assert len(spelling) <= MAX_NAME_CHARACTERS + len(declared)
        assert not any(character.isspace() or character in "<|>" for character in spelling), name
