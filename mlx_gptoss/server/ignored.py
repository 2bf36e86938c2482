"""Request fields without effect: named once in the log, and in the response header X-Ignored-Fields.

A client may send more than this server knows: hints, switches of other servers, fields of tomorrow. They are accepted
(fields.RequestModel). So that nobody has to guess, an endpoint passes their names to ignore().
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from itertools import islice

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = "X-Ignored-Fields"
MAX_HEADER_CHARACTERS = 1024
MAX_NAMES = 100  # of one request
MAX_LOGGED_NAMES = 1000  # names come from clients, and each is kept
_UNSAFE = re.compile(r"[^\w.\[\]-]", re.ASCII)

log: logging.Logger = logging.getLogger(__name__)
_logged: set[str] = set()


def ignore(request: Request, names: Iterable[str]) -> None:
    """Report fields of this request that have no effect. `names`: their paths, such as "messages[].mood"."""
    named: set[str] = request.scope.setdefault("ignored_fields", set())
    named.update(_UNSAFE.sub("_", name[:100]) for name in islice(names, max(0, MAX_NAMES - len(named))))


def log_ignored(names: Iterable[str]) -> None:
    """Log each name, the first time that this process sees it."""
    for name in sorted(set(names) - _logged):
        if len(_logged) < MAX_LOGGED_NAMES:
            _logged.add(name)
            log.warning("the request field %s has no effect; further requests with it are not logged", name)


class ReportIgnored:
    """ASGI middleware that writes the header and the log for what ignore() was told."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def reporting_send(message: Message) -> None:
            if message["type"] == "http.response.start" and (names := scope.get("ignored_fields")):
                log_ignored(names)
                MutableHeaders(scope=message)[HEADER] = ", ".join(sorted(names))[:MAX_HEADER_CHARACTERS]
            await send(message)

        await self.app(scope, receive, reporting_send)
