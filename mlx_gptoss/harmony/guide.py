"""What a reply may say, token by token: whole Harmony, calls as tool_choice wants them, JSON that obeys its schema.

A reply is a header, a body, a header, ... Under a guide a header is one of those that the model was trained on, for a
recipient that may be called, so that the parser reads what the guide meant. Bodies are any text, analysis always, but
for two kinds: the final answer where a response format is asked for, and the arguments of a function with `strict`.

Only special tokens that would leave the structure are kept out of a free body: the model can think as long as it
likes, but not end its turn by that. A call ends the turn (`<|call|>` is a stop id): under a guide a turn has one call
at most. Where a call is due, neither analysis nor a preamble comes a second time before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ..errors import GptOssError, InvalidRequest
from ..tokenizer import CALL, CHANNEL, CONSTRAIN, END, MESSAGE, RETURN, START, Tokenizer
from .builtin import BUILTIN_TOOLS
from .grammar import Grammar, Matcher, Vocabulary, vocabulary
from .header import MAX_RECIPIENT_CHARACTERS, NAMESPACE
from .messages import BuiltinTool, Conversation, Function, ToolChoice


@dataclass(frozen=True)
class Body:
    """What may follow a header: JSON under a grammar, or, without one, any text; then one of `ends`."""

    kind: str  # "analysis", "preamble", "final" or "call"
    ends: tuple[str, ...]
    grammar: Grammar | None = None


HeaderTrie = dict[int, "HeaderTrie | Body"]  # token -> what may come after it


def guide_for(
    conversation: Conversation, tokenizer: Tokenizer, choice: ToolChoice, *, parallel_tool_calls: bool
) -> HarmonyGuide | None:
    """The guide of one reply to `conversation`; None where the model is free.

    Raises InvalidRequest for a schema that cannot be enforced, and for a choice of a function that there is none of.
    """
    form, functions = conversation.response_format, conversation.functions
    if choice.kind == "required" and not functions:
        raise InvalidRequest("tool_choice wants a function called, and there is none; give tools, or leave it out")
    tools = [] if choice.kind == "none" else [f for f in functions if choice.name in (None, f.name)]
    restricted = choice.kind != "auto" or not parallel_tool_calls
    if (
        form is None
        and not any(f.strict for f in tools)
        and not (restricted and (functions or conversation.builtin_tools))
    ):
        return None
    calls = {NAMESPACE + function.name: _arguments_grammar(function, tokenizer) for function in tools}
    if choice.kind == "auto":
        calls |= dict.fromkeys(_builtin_recipients(conversation.builtin_tools))
    final = None if form is None else Grammar(form.schema, tokenizer, "response_format")
    return HarmonyGuide(tokenizer, final, calls, must_call=choice.kind == "required")


def _arguments_grammar(function: Function, tokenizer: Tokenizer) -> Grammar | None:
    """The grammar of a strict function's arguments; None for any text."""
    if len(NAMESPACE + function.name) > MAX_RECIPIENT_CHARACTERS:
        raise InvalidRequest(f"the name of a function has {len(function.name)} characters; give it a shorter one")
    if not function.strict:
        return None
    nothing = {"type": "object", "additionalProperties": False}
    schema = nothing if function.parameters is None else function.parameters
    return Grammar(schema, tokenizer, f"the parameters of {function.name!r}")


def _builtin_recipients(tools: Iterable[BuiltinTool]) -> Iterator[str]:
    """Whom calls of built-in tools are addressed to."""
    for name in tools:
        functions = BUILTIN_TOOLS[name].functions
        yield from [f"{name}.{function.name}" for function in functions] if functions else [name]


class HarmonyGuide:
    """engine.Guide of one reply, from behind `<|start|>assistant` on."""

    def __init__(
        self, tokenizer: Tokenizer, final: Grammar | None, calls: dict[str, Grammar | None], *, must_call: bool
    ) -> None:
        """final: of the final answer, None for any text. calls: recipients that may be called, with the grammar of
        their arguments or None for any. must_call: whether the turn has to end in a call."""
        self._tokenizer = tokenizer
        self._vocabulary: Vocabulary = vocabulary(tokenizer)
        self._final = final
        self._calls = calls
        self._must_call = must_call
        self._seen_kinds: set[str] = set()  # kinds of bodies so far
        self._body: Body | None = None  # None within a header
        self._matcher: Matcher | None = None  # of a body with a grammar
        self._trie: HeaderTrie = {}
        self._mask = b""
        self._begin_header([])

    def mask(self) -> bytes:
        return self._mask if self._matcher is None else self._matcher.mask()

    def accept(self, token: int) -> None:
        if self._matcher is not None:
            self._matcher.accept(token)
        elif self._body is None:
            self._accept_header_token(token)
        elif self._tokenizer.is_special(token):
            self._begin_header([self._tokenizer.special(START), *self._tokenizer.encode("assistant")])

    def _accept_header_token(self, token: int) -> None:
        """One more token of a header."""
        if token not in self._trie:
            raise GptOssError(f"token {token} fits into no header; was it sampled without its mask?")
        step = self._trie[token]
        if isinstance(step, Body):
            self._begin_body(step)
        else:
            self._trie = step
            self._mask = self._vocabulary.mask(step)

    def _begin_body(self, body: Body) -> None:
        self._body = body
        self._seen_kinds.add(body.kind)
        ends = [self._tokenizer.special(name) for name in body.ends]
        if body.grammar is None:
            self._mask = self._vocabulary.mask(ends, self._vocabulary.text_mask)
        else:
            self._matcher = body.grammar.matcher(*ends)

    def _begin_header(self, prefix: list[int]) -> None:
        """before: what stands between the last message and the header's first free token."""
        self._body = None
        self._trie = {}
        for ids, body in self._headers():
            node = self._trie
            for id in [*prefix, *ids[:-1]]:
                step = node.setdefault(id, {})
                assert isinstance(step, dict)  # `<|message|>` ends every header and stands nowhere else
                node = step
            node[ids[-1]] = body
        self._mask = self._vocabulary.mask(self._trie)

    def _headers(self) -> Iterator[tuple[list[int], Body]]:
        """The headers that may come now, from behind "assistant" to `<|message|>`, and what follows each.

        With a response format a preamble has to lead to a call: before the final answer it would be part of the text.
        """
        call_due = self._must_call or (self._final is not None and "preamble" in self._seen_kinds)
        if not call_due or "analysis" not in self._seen_kinds:
            yield self._header_ids(CHANNEL, "analysis", MESSAGE), Body("analysis", (END,))
        if (self._final is None or self._calls) and not (call_due and "preamble" in self._seen_kinds):
            yield self._header_ids(CHANNEL, "commentary", MESSAGE), Body("preamble", (END,))
        if not call_due:
            body = Body("final", (RETURN, END)) if self._final is None else Body("final", (RETURN,), self._final)
            yield self._header_ids(CHANNEL, "final", MESSAGE), body
            yield self._header_ids(CHANNEL, "final", " ", CONSTRAIN, "json", MESSAGE), body
        for recipient, grammar in self._calls.items():
            body = Body("call", (CALL,), grammar)
            for channel in ("commentary", "analysis"):
                for form in ((), (" ", CONSTRAIN, "json"), (" json",), (" code",)):
                    yield self._header_ids(CHANNEL, channel, f" to={recipient}", *form, MESSAGE), body
                    yield self._header_ids(f" to={recipient}", CHANNEL, channel, *form, MESSAGE), body

    def _header_ids(self, *pieces: str) -> list[int]:
        """Special tokens by name, and text, piece by piece as it is rendered."""
        special = self._tokenizer.specials
        return [
            id for piece in pieces for id in ([special[piece]] if piece in special else self._tokenizer.encode(piece))
        ]
