"""Guided replies: which tokens a reply may contain, so that it is well-formed Harmony and obeys the request.

A guide enforces the tool choice, the response format and the schemas of strict functions. A reply alternates headers
and bodies. Headers are those that the model was trained to write, for a recipient that may be called, so that the
parser reads them as the guide intended. Bodies are any text, except two kinds that follow a JSON schema: the final
answer under a response format, and the arguments of a function with `strict`. Analysis is always free text.

In a free body, only the special tokens that would break the structure are masked out: the model may think as long as
it likes, but it cannot end the turn from within its analysis. A call ends the turn (`<|call|>` is a stop token), so a
guided turn has at most one call. If a call is required, at most one analysis and one preamble precede it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ..errors import GptOssError, InvalidRequest
from ..tokenizer import CALL, CHANNEL, CONSTRAIN, END, MESSAGE, RETURN, START, Tokenizer
from .builtin import BUILTIN_TOOLS
from .grammar import Grammar, Matcher, Vocabulary, vocabulary
from .messages import BuiltinTool, Conversation, Function, ToolChoice

_NO_ARGUMENTS = {"type": "object", "additionalProperties": False}


@dataclass(frozen=True)
class Body:
    """What may follow a header: JSON under `grammar` (None: any text), then one of the special tokens `ends`."""

    kind: str  # "analysis", "preamble", "final" or "call"
    ends: tuple[str, ...]
    grammar: Grammar | None = None


HeaderTrie = dict[int, "HeaderTrie | Body"]  # token id -> what may follow it


def guide_for(
    conversation: Conversation, tokenizer: Tokenizer, choice: ToolChoice, *, parallel_tool_calls: bool
) -> HarmonyGuide | None:
    """Return the guide of one reply to `conversation`, or None if there is nothing to enforce.

    parallel_tool_calls: False limits the turn to one call, which takes a guide if there are tools.

    Raises InvalidRequest for a schema that cannot be enforced, and for a required call if no function is
    declared.
    """
    response_format, functions = conversation.response_format, conversation.functions
    if choice.kind == "required" and not functions:
        raise InvalidRequest("tool_choice requires a call, but no function is declared: give tools, or leave it out")
    allowed = [] if choice.kind == "none" else [f for f in functions if not choice.names or f.name in choice.names]
    restricted = choice.kind != "auto" or bool(choice.names) or not parallel_tool_calls
    if (
        response_format is None
        and not any(f.strict for f in allowed)
        and not (restricted and (functions or conversation.builtin_tools))
    ):
        return None
    calls = {conversation.names.recipient(f.name): _arguments_grammar(f, tokenizer) for f in allowed}
    if choice.kind == "auto":
        calls |= dict.fromkeys(_builtin_recipients(conversation.builtin_tools))
    final = None if response_format is None else Grammar(response_format.schema, tokenizer, "response_format")
    return HarmonyGuide(tokenizer, final, calls, must_call=choice.kind == "required")


def _arguments_grammar(function: Function, tokenizer: Tokenizer) -> Grammar | None:
    """Return the grammar of a strict function's arguments; None for a function whose arguments are free text."""
    if not function.strict:
        return None
    schema = _NO_ARGUMENTS if function.parameters is None else function.parameters
    return Grammar(schema, tokenizer, f"the parameters of {function.name!r}")


def _builtin_recipients(tools: Iterable[BuiltinTool]) -> Iterator[str]:
    """Yield the recipients that calls of built-in tools are addressed to."""
    for name in tools:
        functions = BUILTIN_TOOLS[name].functions
        yield from [f"{name}.{function.name}" for function in functions] if functions else [name]


class HarmonyGuide:
    """The engine's Guide of one reply. It starts where the prompt ends, after `<|start|>assistant`."""

    def __init__(
        self, tokenizer: Tokenizer, final: Grammar | None, calls: dict[str, Grammar | None], *, must_call: bool
    ) -> None:
        """Begin a reply.

        final: the grammar of the final answer; None for any text.
        calls: recipient -> the grammar of its arguments, or None for any text, for every recipient that may be called.
        must_call: whether the turn has to end in a call.
        """
        self._tokenizer = tokenizer
        self._vocabulary: Vocabulary = vocabulary(tokenizer)
        self._final = final
        self._calls = calls
        self._must_call = must_call
        self._seen_kinds: set[str] = set()  # kinds of the bodies so far
        self._body: Body | None = None  # None within a header
        self._matcher: Matcher | None = None  # of a body with a grammar
        self._trie: HeaderTrie = {}  # within a header: what may follow
        self._mask = b""  # valid unless there is a matcher
        self._begin_header([])

    def mask(self) -> bytes:
        """Return the mask of the tokens that may come next (the format is that of backends.base.Row)."""
        return self._mask if self._matcher is None else self._matcher.mask()

    def accept(self, token: int) -> None:
        """Append a token to the reply. Raises GptOssError for one that the mask does not allow."""
        if self._matcher is not None:
            self._matcher.accept(token)
        elif self._body is None:
            self._accept_header_token(token)
        elif self._tokenizer.is_special(token):
            self._begin_header([self._tokenizer.special(START), *self._tokenizer.encode("assistant")])

    def _accept_header_token(self, token: int) -> None:
        if token not in self._trie:
            raise GptOssError(f"token {token} is not allowed in this header; was it sampled without the mask?")
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
        """Build the trie of the headers that may come now. `prefix`: ids between the last body and each header."""
        self._body = None
        self._trie = {}
        for ids, body in self._headers():
            node = self._trie
            for id in [*prefix, *ids[:-1]]:
                step = node.setdefault(id, {})
                assert isinstance(step, dict)  # `<|message|>` ends every header and occurs nowhere else in one
                node = step
            node[ids[-1]] = body
        self._mask = self._vocabulary.mask(self._trie)

    def _headers(self) -> Iterator[tuple[list[int], Body]]:
        """Yield the headers that may come now, from after "assistant" to `<|message|>`, each with its body.

        Under a response format, a preamble has to lead to a call: before a final answer, it would become part of the
        answer's text, which would then not be JSON.
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
                for content_type in ((), (" ", CONSTRAIN, "json"), (" json",), (" code",)):
                    yield self._header_ids(CHANNEL, channel, f" to={recipient}", *content_type, MESSAGE), body
                    yield self._header_ids(f" to={recipient}", CHANNEL, channel, *content_type, MESSAGE), body

    def _header_ids(self, *pieces: str) -> list[int]:
        """Return the ids of a header. Each piece, a special token's name or text, is encoded apart, as in render.py."""
        ids: list[int] = []
        for piece in pieces:
            id = self._tokenizer.specials.get(piece)
            ids += self._tokenizer.encode(piece) if id is None else [id]
        return ids
