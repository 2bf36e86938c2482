"""The replies of one turn: what the client sees of each, and their counts and messages added up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from ...chat.reply import Event, Finished, FinishReason, TextDelta, ToolCall, ToolCallDelta, Usage
from ...harmony.messages import Message
from .citations import CitationReader
from .events import AnyEvent, HostedCallDelta
from .sessions import Session


@dataclass
class Round:
    """Reads one reply. Calls of hosted tools are kept back, and citations become events. The deltas of a first call
    are passed on, unless it has to be approved.

    calls: the hosted ones, in order. client_called: whether there is a call that the client has to run.
    end: the reply's last event, which is kept back, too.
    """

    session: Session
    calls: list[ToolCall] = field(default_factory=list)
    client_called: bool = False
    end: Finished | None = None
    _citations: CitationReader | None = None
    _preamble: bool = False

    def read(self, event: Event) -> Iterator[AnyEvent]:
        """Yield what the client is to see of one event."""
        if isinstance(event, TextDelta) and self.session.browser is not None:
            yield from self._text(event)
            return
        if not isinstance(event, TextDelta):
            yield from self._end_text()
        if isinstance(event, Finished):
            self.end = event
        elif isinstance(event, (ToolCall, ToolCallDelta)) and (owner := self.session.owner(event.name)) is not None:
            if isinstance(event, ToolCall):
                self.calls.append(event)
            elif owner.tool is not None and not self.calls and not self.session.must_approve(owner):
                container = self.session.container_id() if owner.tool == "python" else None
                yield HostedCallDelta(event.id, owner.tool, owner.name, event.text, owner.server_label, container)
        else:
            self.client_called = self.client_called or isinstance(event, ToolCall)
            yield event

    def _text(self, event: TextDelta) -> Iterator[AnyEvent]:
        if self._citations is not None and event.preamble != self._preamble:
            yield from self._end_text()
        if self._citations is None:
            assert self.session.browser is not None
            self._citations, self._preamble = CitationReader(self.session.browser.cited_page), event.preamble
        yield from self._citations.push(event)

    def _end_text(self) -> Iterator[AnyEvent]:
        if self._citations is not None:
            yield from self._citations.flush(self._preamble)
        self._citations = None


@dataclass
class Turn:
    """Adds up the replies of one turn. messages: all of its messages, results included."""

    messages: tuple[Message, ...] = ()
    replies: list[Finished] = field(default_factory=list)

    @property
    def completion_tokens(self) -> int:
        """Tokens generated so far."""
        return sum(reply.usage.completion_tokens for reply in self.replies)

    def add(self, end: Finished) -> None:
        """Take in a reply."""
        self.messages += end.messages
        self.replies.append(end)

    def finished(self, reason: FinishReason) -> Finished:
        """One Finished for all replies. The time to the first token is the first reply's, rates are the last one's."""
        first, last, all = self.replies[0], self.replies[-1], self.replies
        return Finished(
            finish_reason=reason,
            usage=Usage(
                sum(reply.usage.prompt_tokens for reply in all),
                self.completion_tokens,
                sum(reply.usage.cached_tokens for reply in all),
            ),
            timings=replace(last.timings, ttft_s=first.timings.ttft_s),
            tokens=tuple(token for reply in all for token in reply.tokens),
            messages=self.messages,
            reasoning_tokens=sum(reply.reasoning_tokens for reply in all),
            drafted=sum(reply.drafted for reply in all),
            accepted=sum(reply.accepted for reply in all),
        )
