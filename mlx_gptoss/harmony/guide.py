"""Guided replies: which tokens a reply may contain, so that it is well-formed Harmony and obeys the request.

A guide enforces the tool choice, the response format, and what functions take. A reply alternates headers and bodies.
Headers are those that the model was trained to write, for a recipient that may be called, so that the parser reads them
as the guide intended. Two kinds of bodies follow a grammar: the final answer under a response format, and the arguments
of a call. All others are free.

In a free body every token is allowed. Nearly all tokens of a reply are in one, and there the engine runs as it does
without a guide: the mask begins with the next header. So a free body may contain special tokens that a model in
confusion writes, and the guide reads them as the parser does: `<|start|>`, `<|channel|>` and tokens that end a message
lead to a header, others mean nothing. What the request promises holds all the same: the turn does not end from within
analysis, and a call that is due comes.

A call ends the turn (`<|call|>` is a stop token), so a guided turn has at most one call. If a call is required, at most
one analysis and one preamble precede it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

from ..errors import GptOssError, InvalidRequest
from ..tokenizer import CALL, CHANNEL, END, ENDOFTEXT, RETURN, START, Tokenizer
from ..untrusted.cancel import check_cancelled
from .builtin import BUILTIN_TOOLS
from .grammar import Grammar, Matcher, Vocabulary, arguments_grammar, json_grammar, text_grammar, vocabulary
from .header_trie import Body, HeaderTrie, Recipient, header_trie, recipient_tries
from .messages import BuiltinTool, Conversation, Function, ToolChoice
from .names import ToolNames

MAX_COMPILE_S = 0.1  # for the functions of one request, before it is submitted; the others are compiled when called

Compile = Callable[[], Grammar]
_ANY_OBJECT = {"type": "object"}


def guide_for(conversation: Conversation, tokenizer: Tokenizer, choice: ToolChoice) -> HarmonyGuide | None:
    """Return the guide of one reply to `conversation`, or None if it has neither tools nor a response format.

    Raises InvalidRequest for what cannot be enforced: a response format, the schema of a strict function, a grammar;
    and for a required call if no function is declared.

    Grammars are cached, so a conversation's next request takes next to no time. Those of new functions take about a
    millisecond each: they are compiled here, off the engine's thread, up to MAX_COMPILE_S.
    """
    response_format, functions = conversation.response_format, conversation.functions
    if choice.kind == "required" and not functions:
        raise InvalidRequest("tool_choice requires a call, but no function is declared: give tools, or leave it out")
    if response_format is None and not functions and not conversation.builtin_tools:
        return None
    allowed = [] if choice.kind == "none" else [f for f in functions if not choice.names or f.name in choice.names]
    calls = {_recipient(f, conversation.names): _compiler(f, tokenizer) for f in allowed}
    if choice.kind == "auto":
        calls |= _builtin_calls(conversation.builtin_tools, tokenizer)
    _compile_some(allowed, calls)
    final = None if response_format is None else json_grammar(response_format.schema, tokenizer, "response_format")
    return HarmonyGuide(tokenizer, final, calls, must_call=choice.kind == "required")


def _recipient(function: Function, names: ToolNames) -> Recipient:
    return Recipient(names.recipient(function.name), "json" if function.text_format is None else "text")


def _compiler(function: Function, tokenizer: Tokenizer) -> Compile | None:
    """Return what compiles the grammar of a function's input, a cached one if possible; None if it takes any text."""
    form = function.text_format
    if form is None:
        where = f"the parameters of {function.name!r}"
        return partial(arguments_grammar, function.parameters, tokenizer, where, function.strict)
    if form.syntax is None:
        return None
    return partial(text_grammar, form.syntax, form.definition, tokenizer, f"the grammar of {function.name!r}")


def _builtin_calls(tools: Iterable[BuiltinTool], tokenizer: Tokenizer) -> Iterator[tuple[Recipient, Compile | None]]:
    """Yield the recipients that calls of built-in tools are addressed to.

    Their JSON may be any object: the model has its own order of the arguments, from training, and a schema would fix
    another one.
    """
    for name in tools:
        functions = BUILTIN_TOOLS[name].functions
        for function in functions:
            yield Recipient(f"{name}.{function.name}"), partial(json_grammar, _ANY_OBJECT, tokenizer, "any object")
        if not functions:
            yield Recipient(name, "code"), None


def _compile_some(functions: Iterable[Function], calls: Mapping[Recipient, Compile | None]) -> None:
    """Compile grammars while time is left; those that may be refused in any case. Raises InvalidRequest."""
    until = time.perf_counter() + MAX_COMPILE_S
    for function, compile in zip(functions, calls.values(), strict=False):
        check_cancelled()
        if compile is not None and (function.strict or function.text_format or time.perf_counter() < until):
            compile()


class HarmonyGuide:
    """The engine's Guide of one reply. It starts where the prompt ends, after `<|start|>assistant`."""

    def __init__(
        self, tokenizer: Tokenizer, final: Grammar | None, calls: Mapping[Recipient, Compile | None], *, must_call: bool
    ) -> None:
        """Begin a reply.

        final: the grammar of the final answer; None for any text.
        calls: what compiles the grammar of a call, or None for any text, for every recipient that may be called.
        must_call: whether the turn has to end in a call.
        """
        self._tokenizer = tokenizer
        self._vocabulary: Vocabulary = vocabulary(tokenizer)
        self._final = final
        self._calls = {recipient.name: compile for recipient, compile in calls.items()}
        self._tries = recipient_tries(tokenizer, tuple(calls)) if calls else None
        self._must_call = must_call
        self._ids = {tokenizer.specials[name]: name for name in _READ_IN_BODIES if name in tokenizer.specials}
        self._assistant = tokenizer.encode("assistant")
        self._seen_kinds: set[str] = set()  # kinds of the bodies so far
        self._body: Body | None = None  # None within a header
        self._matcher: Matcher | None = None  # of a body with a grammar
        self._trie: HeaderTrie = self._headers()  # within a header: what may follow

    def mask(self) -> bytes | None:
        """Return the mask of the tokens that may come next (the format is that of backends.base.Row); None in a free
        body, where all may."""
        if self._matcher is not None:
            return self._matcher.mask()
        return self._vocabulary.mask(self._trie) if self._body is None else None

    def accept(self, token: int) -> None:
        """Append a token to the reply. Raises GptOssError for one that the mask does not allow."""
        if self._matcher is not None:
            self._matcher.accept(token)
        elif self._body is None:
            self._accept_header_token(token)
        elif token in self._ids:
            self._leave_body(self._ids[token])

    def ends_with(self, token: int) -> bool | None:
        """Whether the turn ends with a token. In a free body that is not always as the stop tokens say: analysis is
        followed by something, and a call by nothing."""
        name = self._ids.get(token)
        if name is None or self._body is None or self._matcher is not None:
            return None
        if self._body.kind == "call":
            return True
        unfinished = self._body.kind == "analysis" or (self._body.kind == "preamble" and self._call_due)
        return False if unfinished and name in (RETURN, CALL, ENDOFTEXT) else None

    def _accept_header_token(self, token: int) -> None:
        if token not in self._trie:
            raise GptOssError(f"token {token} is not allowed in this header; was it sampled without the mask?")
        step = self._trie[token]
        if isinstance(step, Body):
            self._begin_body(step)
        else:
            self._trie = step

    def _begin_body(self, body: Body) -> None:
        self._body = body
        self._seen_kinds.add(body.kind)
        if body.kind == "final" and self._final is not None:
            self._matcher = self._final.matcher(self._tokenizer.special(RETURN))
        compile = self._calls[body.recipient] if body.recipient is not None else None
        if compile is not None:
            self._matcher = compile().matcher(self._tokenizer.special(CALL))

    def _leave_body(self, name: str) -> None:
        """Begin a header after the special token `name`, which may be a part of it."""
        self._body = None
        headers = self._headers()
        if name == CHANNEL:
            step = headers[self._tokenizer.special(CHANNEL)]
            assert isinstance(step, dict)
            self._trie = step
            return
        for id in reversed(self._assistant):
            headers = {id: headers}
        self._trie = headers if name == START else {self._tokenizer.special(START): headers}

    @property
    def _call_due(self) -> bool:
        """Whether no final answer may come.

        Under a response format, a preamble has to lead to a call: before a final answer, it would become part of the
        answer's text, which would then not be JSON.
        """
        return self._must_call or (self._final is not None and "preamble" in self._seen_kinds)

    def _headers(self) -> HeaderTrie:
        """Return the headers that may come now, from after "assistant" to `<|message|>`."""
        kinds = set() if self._call_due else {"final"}
        if not self._call_due or "analysis" not in self._seen_kinds:
            kinds.add("analysis")
        if (self._final is None or self._calls) and not (self._call_due and "preamble" in self._seen_kinds):
            kinds.add("preamble")
        return header_trie(self._tokenizer, kinds, self._tries)


_READ_IN_BODIES = (START, CHANNEL, END, RETURN, CALL, ENDOFTEXT)  # the special tokens that mean something there
