"""Stand-ins for what hosted tools need: a web with search engines, a model with scripted replies, MCP servers."""

from __future__ import annotations

import asyncio
import gzip
import json
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from mock_runner import MockRunner

import mlx_gptoss
from mlx_gptoss.backends.base import Limits, Row, Sampled
from mlx_gptoss.engine import Engine
from mlx_gptoss.harmony.messages import Conversation, Message
from mlx_gptoss.harmony.render import render_reply
from mlx_gptoss.model import Model
from mlx_gptoss.tokenizer import Tokenizer

pytest.importorskip("httpx", reason="the browser needs the extra hosted")
pytest.importorskip("lxml", reason="the browser needs the extra hosted")
pytest.importorskip("mcp", reason="MCP servers need the extra hosted")
from mlx_gptoss.server.guard import Gate
from mlx_gptoss.server.hosted.loop import HostedReply
from mlx_gptoss.server.hosted.selection import hosted_tools_of
from mlx_gptoss.server.hosted.sessions import HostedTools
from mlx_gptoss.server.hosted.settings import BrowserSettings, HostedSettings
from mlx_gptoss.server.models.named import NamedModel
from mlx_gptoss.server.run import Server, listen
from mlx_gptoss.server.service import Service

PLANETS = (
    """<html><head><title>The planets</title><style>p {color: red}</style></head><body>
<h1>Planets</h1><p>There are <b>eight</b> planets. See <a href="/moons">the moons</a> or
<a href="https://example.org/sun">the sun</a>.</p>
<ul><li>Mercury</li><li>Venus</li></ul><script>alert(1)</script>
"""
    + "".join(f"<p>Line {n} about planet {n % 8}.</p>\n" for n in range(60))
    + "</body></html>"
)
RESULTS = [
    {"title": "The <b>planets</b>", "url": "URL/planets", "content": "Eight of them &amp; no more."},
    {"title": "Moons", "url": "URL/moons", "content": "Many."},
    {"title": "bad", "url": "javascript:alert(1)", "content": "left out"},
]


@dataclass
class Web:
    """The stand-in web. answers: path -> (status, headers, body) or a function that gives them. seen: its requests."""

    url: str
    answers: dict[str, Any] = field(default_factory=dict)
    seen: list[tuple[str, dict[str, str], Any]] = field(default_factory=list)


def _handler(web: Web) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self, body: Any = None) -> None:
            web.seen.append((self.path, dict(self.headers), body))
            answer = web.answers.get(urlsplit(self.path).path, (404, {}, b"not here"))
            status, headers, content = answer(self) if callable(answer) else answer
            self.send_response(status)
            for name, value in {"Content-Type": "text/html", **headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            with suppress(OSError):  # the client has left
                self.wfile.write(content)

        def do_POST(self) -> None:
            self.do_GET(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def log_message(self, *_: Any) -> None:
            pass

    return Handler


@pytest.fixture
def web() -> Iterator[Web]:
    """A web on the loopback: /planets, /moons, a search engine of every kind, and more that a test adds."""
    web = Web("")
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(web))
    web.url = f"http://127.0.0.1:{server.server_address[1]}"
    results = [{**one, "url": one["url"].replace("URL", web.url)} for one in RESULTS]
    brave = {"web": {"results": [{**one, "description": one["content"]} for one in results]}}
    exa = {"results": [{**one, "summary": one["content"]} for one in results]}
    json_type = {"Content-Type": "application/json"}

    def searxng_or_exa(handler: BaseHTTPRequestHandler) -> Any:
        answer = exa if handler.command == "POST" else {"results": results}
        return 200, json_type, json.dumps(answer).encode()

    web.answers = {
        "/planets": (200, {}, PLANETS.encode()),
        "/moons": (200, {}, b"<title>Moons</title><p>Moons of planets.</p>"),
        "/search": searxng_or_exa,
        "/res/v1/web/search": (200, json_type, json.dumps(brave).encode()),
        "/zipped": (200, {"Content-Encoding": "gzip"}, gzip.compress(PLANETS.encode())),
        "/bomb": (200, {"Content-Encoding": "gzip"}, gzip.compress(b"<p>" + b"a" * 50_000_000)),
        "/text": (200, {"Content-Type": "text/plain; charset=latin-1"}, "Größe 【1†x】".encode("latin-1", "replace")),
        "/image": (200, {"Content-Type": "image/png"}, b"\x89PNG"),
        "/slow": lambda handler: time.sleep(3) or (200, {}, b"late"),
        "/to-planets": (302, {"Location": "/planets"}, b""),
        "/loop": (302, {"Location": "/loop"}, b""),
    }
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield web
    server.shutdown()
    server.server_close()


@pytest.fixture
def browser_settings(web: Web) -> BrowserSettings:
    """Settings whose search engine is the stand-in, and whose pages may be on the loopback."""
    return BrowserSettings("searxng", url=web.url, allow_addresses=("127.0.0.0/8",), timeout_s=2, view_tokens=300)


class ScriptedRunner(MockRunner):
    """Samples the tokens of `replies`, one reply for each request, whatever the prompt. prompts: what it was given."""

    def __init__(self, tokenizer: Tokenizer, max_context: int) -> None:
        super().__init__(Limits(slots=2, max_context=max_context, chunk=64))
        self.config = replace(self.config, vocab_size=tokenizer.vocab_size)
        self.replies: deque[Sequence[int]] = deque()
        self.prompts: list[tuple[int, ...]] = []
        self._replies: dict[int, tuple[int, Sequence[int]]] = {}  # slot -> the prompt's length, the reply

    def feed(self, row: Row, number: int) -> Sampled | None:
        if super().feed(replace(row, mask=None), number) is None:  # the mask may be of a larger vocabulary
            return None
        slot = self.slots[row.slot]
        if row.prompt is not None:
            self.prompts.append(row.prompt)
            self._replies[row.slot] = len(row.prompt), self.replies.popleft()
        start, reply = self._replies[row.slot]
        place = len(slot.history) - start
        token = reply[place] if place < len(reply) else 0  # a step that was submitted ahead of the end
        if row.mask is not None and place < len(reply):
            self.check(bool(row.mask[token // 8] >> token % 8 & 1), f"token {place} of the reply is masked out")
        slot.fresh = token
        return Sampled(token, -1.0)


@dataclass
class Scripted:
    """A model whose replies are scripted, and the conversation of a test with it."""

    model: Model
    runner: ScriptedRunner
    service: Service

    def will_say(self, *replies: Sequence[Message]) -> None:
        """Queue replies, each a list of messages."""
        self.runner.replies += [render_reply(reply, self.model.tokenizer) for reply in replies]

    def prompt(self, index: int) -> str:
        """The prompt of a reply as text, special tokens included."""
        tokenizer, text, run = self.model.tokenizer, "", []
        names = {id: name for name, id in tokenizer.specials.items()}
        for id in (*self.runner.prompts[index], None):
            if id is None or id in names:
                text += tokenizer.decode(run) + ("" if id is None else names[id])
                run = []
            else:
                run.append(id)
        return text


@pytest.fixture
def scripted_model() -> Iterator[Callable[..., Any]]:
    """Makes models with scripted replies: scripted_model(max_context=...)."""
    engines: list[Engine] = []
    with mlx_gptoss.load(slots=1, max_context=64) as nano:
        tokenizer = nano.tokenizer

    def make(max_context: int = 4096) -> Scripted:
        runners: list[ScriptedRunner] = []

        def make_runner() -> ScriptedRunner:
            runners.append(ScriptedRunner(tokenizer, max_context))
            return runners[0]

        engines.append(Engine(make_runner))
        checkpoint: Any = SimpleNamespace(config=runners[0].config, stop_ids=(), generation_config={})
        plan: Any = None
        model = Model(checkpoint, "scripted", tokenizer, engines[-1], "mock", plan, "scripted", 0.0)
        return Scripted(model, runners[0], Service([NamedModel(model, "scripted")], Gate()))

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture
def answer(scripted_model: Callable[..., Any]) -> Callable[..., Any]:
    """Runs one response with hosted tools: answer(settings, tools, replies, **options of HostedReply.start).

    Returns its events, and the scripted model. events: all that batches() yields, up to an error.
    """

    def run(
        settings: HostedSettings,
        tools: Sequence[dict[str, Any]],
        replies: Sequence[Sequence[Message]],
        scripted: Any = None,
        functions: Sequence[Any] = (),
        watch: Callable[[HostedReply, Any], None] = lambda queue, event: None,
        **options: Any,
    ) -> tuple[list[Any], Any]:
        scripted = scripted or scripted_model()
        scripted.will_say(*replies)
        model = scripted.model

        async def work() -> list[Any]:
            hosted = HostedTools(settings)
            hosted.count_tokens = lambda text: len(model.tokenizer.encode(text))
            try:
                names = [function.name for function in functions]
                session = await hosted.session(hosted_tools_of(tools, settings), client_names=names)
                conversation = Conversation((Message("user", "Hello"),), functions=tuple(functions))
                queue = await HostedReply.start(
                    scripted.service,
                    session,
                    session.declare(conversation),
                    lambda c, choice, limit: model.stream(c, tool_choice=choice, max_tokens=limit),
                    **options,
                )
                events = []
                try:
                    async for batch in queue.batches():
                        for _, event in batch:
                            events.append(event)
                            watch(queue, event)
                finally:
                    scripted.service.finish(queue)
                assert not scripted.service.open_queues
                return events
            finally:
                await hosted.close()

        events = asyncio.run(work())
        assert not scripted.runner.violations
        return events, scripted

    return run


@pytest.fixture
def scripted_server(scripted_model: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """Starts servers with hosted tools and a scripted model: scripted_server(settings, replies).

    Returns OpenAI's client, and the scripted model, whose `service` is the server's.
    """
    openai = pytest.importorskip("openai")
    with ExitStack() as stack:

        def start(settings: HostedSettings, replies: Sequence[Sequence[Message]]) -> Any:
            scripted = scripted_model()
            scripted.will_say(*replies)
            scripted.service = Service([NamedModel(scripted.model, "scripted")], Gate(), hosted=HostedTools(settings))
            listener = listen("127.0.0.1", 0)
            server = Server(scripted.service, drain_s=5)
            thread = threading.Thread(target=server.serve_on, args=(listener,))
            thread.start()
            stack.callback(thread.join, 60)
            stack.callback(server.drain)
            url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
            return stack.enter_context(openai.OpenAI(base_url=url, api_key="none", max_retries=0)), scripted

        yield start


MCP_SERVER = '''
import sys, time, os
from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError

server = MCPServer("stand-in")

@server.tool()
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b

@server.tool()
def fail(why: str) -> str:
    """Fail."""
    raise ToolError(why)

@server.tool()
def secret() -> str:
    """The variable SECRET, and whether HOME of the server is visible."""
    return os.environ.get("SECRET", "none") + os.environ.get("NOT_PASSED", "")

@server.tool()
def sleep(seconds: float) -> str:
    """Sleep."""
    time.sleep(seconds)
    return "slept"

@server.tool()
def die() -> str:
    """End the server."""
    os._exit(3)

if sys.argv[1] == "stdio":
    server.run("stdio")
else:
    server.run("streamable-http", host="127.0.0.1", port=int(sys.argv[1]))
'''


@pytest.fixture(scope="session")
def mcp_program(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of a real MCP server: its argument is "stdio" or a port."""
    path = tmp_path_factory.mktemp("mcp") / "server.py"
    path.write_text(MCP_SERVER)
    return str(path)


@contextmanager
def mcp_over_http(program: str) -> Iterator[str]:
    """The URL of the MCP server, over streamable HTTP."""
    import socket
    import subprocess

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen([sys.executable, program, str(port)], stderr=subprocess.DEVNULL)
    try:
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}/mcp"
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def mcp_url(mcp_program: str) -> Iterator[str]:
    with mcp_over_http(mcp_program) as url:
        yield url


@pytest.fixture
def query() -> Callable[[str], dict[str, list[str]]]:
    """The query of a path."""
    return lambda path: parse_qs(urlsplit(path).query)
