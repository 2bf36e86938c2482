"""Functions that take text: under a lark grammar or a regular expression, broken and hostile ones included."""

from __future__ import annotations

import time
from random import Random
from typing import Any

import pytest

from mlx_gptoss.errors import GptOssError, InvalidRequest
from mlx_gptoss.harmony.grammar import MAX_DEFINITION, text_grammar
from mlx_gptoss.tokenizer import CALL, Tokenizer

CODEX_APPLY_PATCH = r"""
start: begin_patch hunk+ end_patch
begin_patch: "*** Begin Patch" LF
end_patch: "*** End Patch" LF?

hunk: add_hunk | delete_hunk | update_hunk
add_hunk: "*** Add File: " filename LF add_line+
delete_hunk: "*** Delete File: " filename LF
update_hunk: "*** Update File: " filename LF change_move? change?

filename: /(.+)/
add_line: "+" /(.*)/ LF -> line

change_move: "*** Move to: " filename LF
change: (change_context | change_line)+ eof_line?
change_context: ("@@" | "@@ " /(.+)/) LF
change_line: ("+" | "-" | " ") /(.*)/ LF
eof_line: "*** End of File" LF

%import common.LF
"""

PATCH = """*** Begin Patch
*** Add File: hello.txt
+Hello, <|call|> world!
+
*** Update File: src/a.py
*** Move to: src/b.py
@@ def f():
 a
-b
+é
*** Delete File: x
*** End Patch
"""


def test_codex_apply_patch(nano: Tokenizer, allows: Any) -> None:
    grammar = text_grammar("lark", CODEX_APPLY_PATCH, nano, "the grammar of 'apply_patch'")
    assert allows(grammar, nano, PATCH) and allows(grammar, nano, PATCH.rstrip("\n"))
    for wrong in (PATCH.replace("+Hello", "Hello"), PATCH.replace("*** End Patch\n", ""), "{" + PATCH, ""):
        assert not allows(grammar, nano, wrong)


def test_codex_apply_patch_is_valid_when_sampled(nano: Tokenizer, sample_text: Any) -> None:
    grammar, random = text_grammar("lark", CODEX_APPLY_PATCH, nano, "patch"), Random(1)
    texts = [sample_text(grammar, nano, CALL, random, 400) for _ in range(20)]
    ended = [text for text in texts if text is not None]
    assert len(ended) > 5
    for text in ended:
        assert text.startswith("*** Begin Patch\n*** ") and text.rstrip("\n").endswith("\n*** End Patch")


def test_a_regular_expression(nano: Tokenizer, allows: Any) -> None:
    grammar = text_grammar("regex", r"[a-z]+\d{2}", nano, "g")
    assert allows(grammar, nano, "abc12") and not allows(grammar, nano, "abc1") and not allows(grammar, nano, "12")


@pytest.mark.parametrize(
    ("syntax", "definition", "complaint"),
    [
        ("lark", "start: (", "Expected token"),
        ("lark", 'a: "b"', "no start rule"),
        ("lark", "start: foo", "unknown name"),
        ("lark", "start: " + "(" * 5000 + '"a"' + ")" * 5000, "too deeply nested"),
        ("lark", '%import /etc/passwd\nstart: "a"', "Expected name"),
        ("lark", "x" * (MAX_DEFINITION + 1), "smaller grammar"),
        ("regex", "(", "unclosed group"),
        ("regex", "(?!a)b", "look-around"),
        ("regex", "x" * (MAX_DEFINITION + 1), "smaller grammar"),
    ],
)
def test_a_broken_grammar_is_refused(nano: Tokenizer, syntax: Any, definition: str, complaint: str) -> None:
    with pytest.raises(InvalidRequest, match=complaint) as refusal:
        text_grammar(syntax, definition, nano, "the grammar of 'f'")
    message = str(refusal.value)
    assert message.startswith("the grammar of 'f'") and "\n" not in message and len(message) < 400


HOSTILE: dict[str, tuple[Any, str]] = {
    "repeated repetition": ("regex", "((a{1,1000}){1,1000}){1,1000}"),
    "many states": ("regex", ".*a.{300}"),
    "endless": ("lark", 'start: "a" start'),
    "ambiguous": ("lark", 'start: a\na: "a" | a a'),
    "doubling": ("lark", "start: x1\n" + "".join(f"x{n}: x{n + 1} x{n + 1}\n" for n in range(1, 40)) + 'x40: "a"'),
    "large counts": ("lark", 'start: b{1,100000}\nb: c{1,100000}\nc: "a"'),
    "intersections": ("lark", "start: A\nA: /[a-z]{1,400}/ & ~/.*abc.{50}/"),
    "many rules": (
        "lark",
        "start: " + "|".join(f"r{n}" for n in range(2500)) + "".join(f'\nr{n}: "{n}x"' for n in range(2500)),
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_grammar_is_refused_or_costs_little(nano: Tokenizer, name: str) -> None:
    syntax, definition = HOSTILE[name]
    started = time.process_time()
    try:
        matcher = text_grammar(syntax, definition, nano, "g").matcher(nano.special(CALL))
        (id,) = nano.encode("a")
        for _ in range(100):
            matcher.mask()
            matcher.accept(id)
    except GptOssError:  # also an InvalidRequest
        pass
    assert time.process_time() - started < 10  # CPU seconds; usually a hundredth of it
