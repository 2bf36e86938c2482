"""What the clients of soak.py do: each scenario sends one request, or breaks one off, and returns how it ended."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from soak_client import Connection, lines
from soak_dialects import CHAT, MESSAGES, OLLAMA_CHAT, OLLAMA_GENERATE, RESPONSES, Dialect, Said, new_word

if TYPE_CHECKING:
    from soak import Soak

Scenario = Callable[["Soak", Connection, random.Random], Awaitable[str]]
GENERATING = (CHAT, RESPONSES, MESSAGES, OLLAMA_CHAT, OLLAMA_GENERATE)
GRAMMARS = 1000  # of small schemas, more than grammar.py keeps
AT_ONCE = 8  # of them
CITIES = ("Oslo", "Paris", "Cairo", "Lima", "Tokyo", "Rome")
WEATHER = {
    "name": "get_weather",
    "description": "Get the current weather.",
    "parameters": {
        "type": "object",
        "properties": {"location": {"type": "string", "description": "City name"}},
        "required": ["location"],
    },
}
INVALID = (None, -1, 10**30, 1e308, "", "x" * 5000, [], [[[]]], {}, {"a": {"b": 1}}, True, "\ud800", float("nan"))
GARBAGE = (
    b"",
    b"\x16\x03\x01\x02",
    b"GET / HTTP/1.1\r\nHost: ",
    b"POST /v1/responses HTTP/1.1\r\nHost: x\r\n\r\n",
    b"\r\n" * 99,
    b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000\r\n\r\n{",
)
REFUSED: tuple[tuple[str, str, Any, int], ...] = (
    ("POST", "/v1/chat/completions", b"{", 400),
    ("POST", "/v1/chat/completions", {"messages": "x"}, 400),
    ("POST", "/v1/chat/completions", {"messages": [], "max_tokens": 2.5}, 400),
    ("POST", "/v1/responses", {"input": [{"type": "message", "role": "x", "content": 1}]}, 400),
    ("POST", "/v1/completions", {"prompt": "x", "logit_bias": {"1": 1000}}, 400),
    ("POST", "/v1/completions", {"prompt": "x", "max_tokens": 10**9, "stop": ["x" * 5000]}, 400),
    ("POST", "/v1/messages", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 0}, 400),
    ("POST", "/api/chat", {"model": "x", "messages": [{"role": "user", "images": ["x"]}]}, 400),
    ("GET", "/v1/responses/resp_unknown", None, 404),
    ("GET", "/no/such/path", None, 404),
    ("GET", "/v1/chat/completions", None, 405),
)
CHEAP: tuple[tuple[str, str, Any], ...] = (
    ("GET", "/v1/models", None),
    ("GET", "/api/tags", None),
    ("GET", "/api/ps", None),
    ("GET", "/metrics", None),
    ("GET", "/", None),
    ("POST", "/v1/messages/count_tokens", {"messages": [{"role": "user", "content": "What is 12 + 30?"}]}),
    ("POST", "/tokenize", {"content": "Reverse the word planet."}),
)


def few_tokens(r: random.Random) -> int:
    """Mostly a cut-off reply, so that many conversations fit into the time; some are long enough to finish."""
    return 100 if r.random() < 0.04 else r.choice((2, 3, 4, 4, 6, 6, 8, 8, 12, 16))


async def converse(soak: Soak, connection: Connection, r: random.Random) -> str:
    """A conversation about a word of its own, in any dialect, streamed or not."""
    return await talk(soak, connection, r, r.choice(GENERATING), few_tokens(r))


async def complete(soak: Soak, connection: Connection, r: random.Random) -> str:
    """A raw completion that only the answer is missing from: eleven tokens show the whole word."""
    return await talk(soak, connection, r, soak.completions, 12)


async def talk(soak: Soak, connection: Connection, r: random.Random, dialect: Dialect, tokens: int) -> str:
    word, stream = new_word(r), r.random() < 0.5
    body = {**dialect.body(word, tokens), "stream": stream, "model": soak.choose_model(r)}
    said = await soak.asked(connection, dialect, body)
    if said is not None:
        soak.compare(dialect, body, word, said)
    return f"{dialect.path}{' streamed' if stream else ''} {connection.status}"


async def cancel(soak: Soak, connection: Connection, r: random.Random) -> str:
    """A client that leaves: before anything arrives, or after the first events."""
    dialect = r.choice(GENERATING)
    body = {**dialect.body(new_word(r), 100), "stream": r.random() < 0.8, "model": soak.choose_model(r)}
    started = asyncio.create_task(connection.start("POST", dialect.path, json.dumps(body).encode()))
    try:
        done, _ = await asyncio.wait({started}, timeout=r.uniform(0, 0.2))
        if done and body["stream"] and started.exception() is None and connection.status == 200:
            count, most = 0, r.randint(1, 10)
            async for _ in lines(connection):
                count += 1
                if count == most:
                    break
    finally:
        started.cancel()
        await asyncio.gather(started, return_exceptions=True)
        connection.close()
    return "cancelled"


async def read_slowly(soak: Soak, connection: Connection, r: random.Random) -> str:
    """A client that takes a reply in small pieces, with a small window."""
    connection.close()
    slow, word = Connection(soak.port, receive_buffer=2048), new_word(r)
    body = {**CHAT.body(word, 100), "stream": True, "model": soak.models[0]}
    try:
        await slow.start("POST", CHAT.path, json.dumps(body).encode())
        text = b""
        async for chunk in slow.chunks():
            text += chunk
            await asyncio.sleep(0.05)
        if slow.status == 200:
            events = [json.loads(line[6:]) for line in text.split(b"\n") if line.startswith(b"data: {")]
            said = [CHAT.delta(event) for event in events]
            whole = Said("".join(one.reasoning for one in said), "".join(one.answer for one in said))
            soak.compare(CHAT, body, word, whole)
    finally:
        slow.close()
    return f"read slowly {slow.status}"


async def call_tool(soak: Soak, connection: Connection, r: random.Random) -> str:
    """A question that needs a tool: the call must be valid JSON with the argument that the schema requires."""
    city = r.choice(CITIES)
    body = {
        "model": soak.choose_model(r),
        "messages": [{"role": "user", "content": f"What is the weather in {city}?"}],
        "tools": [{"type": "function", "function": WEATHER}],
        "tool_choice": "required",
        "reasoning_effort": "low",
        "temperature": 0,
    }
    reply = await soak.expect(connection, "POST", CHAT.path, body)
    if reply is not None:
        (call,) = reply["choices"][0]["message"]["tool_calls"]
        if not isinstance(json.loads(call["function"]["arguments"])["location"], str):
            soak.fail(f"a call without its argument: {call}")
    return f"tool {connection.status}"


def under_schema(model: str, word: str, tokens: int) -> dict[str, Any]:
    """A chat request of which the reply may be one word only."""
    schema = {
        "type": "object",
        "properties": {"id": {"enum": [word]}},
        "required": ["id"],
        "additionalProperties": False,
    }
    return {
        "model": model,
        "messages": [{"role": "user", "content": "Hi"}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}},
        "reasoning_effort": "low",
        "temperature": 0,
        "max_completion_tokens": tokens,
    }


async def obey_schema(soak: Soak, connection: Connection, r: random.Random) -> str:
    """A reply under a schema that allows one word only, of its own: another's schema would show."""
    word = new_word(r)
    body = under_schema(soak.choose_model(r), word, 120)
    reply = await soak.expect(connection, "POST", CHAT.path, body)
    choice = {"finish_reason": None} if reply is None else reply["choices"][0]
    if choice["finish_reason"] == "stop" and json.loads(choice["message"]["content"]) != {"id": word}:
        soak.fail(f"a reply breaks its schema for {word}: {reply}")
    return f"schema {connection.status}"


async def read_long_prompt(soak: Soak, connection: Connection, r: random.Random) -> str:
    """A prompt of about 1,500 tokens that no cache has."""
    text = " ".join(new_word(r) for _ in range(190))
    body = {"model": soak.choose_model(r), "prompt": text, "max_tokens": 2, "temperature": 0}
    await soak.expect(connection, "POST", "/v1/completions", body)
    return f"long prompt {connection.status}"


async def keep_and_delete(soak: Soak, connection: Connection, r: random.Random) -> str:
    """A stored response, continued and deleted."""
    model = soak.models[0]
    body = {**RESPONSES.body(new_word(r), 4), "model": model, "store": True}
    first = await soak.expect(connection, "POST", RESPONSES.path, body)
    if first is not None:
        more = {
            "model": model,
            "input": "Hi",
            "previous_response_id": first["id"],
            "max_output_tokens": 4,
            "store": False,
        }
        await soak.expect(connection, "POST", RESPONSES.path, more)
        await soak.expect(connection, "DELETE", f"{RESPONSES.path}/{first['id']}")
    return f"stored response {connection.status}"


async def break_one_value(soak: Soak, connection: Connection, r: random.Random) -> str:
    """A request with one value replaced by a random one, or cut off: answered or refused."""
    dialect = r.choice(GENERATING)
    body: dict[str, Any] = {**dialect.body(new_word(r), 4), "stream": False}
    body[r.choice([*body, "tools", "stop", "n", "logit_bias", "nonsense"])] = r.choice(INVALID)
    content = json.dumps(body).encode()
    if r.random() < 0.2:
        content = content[: r.randrange(len(content))]
    await connection.request("POST", dialect.path, content)
    if connection.status not in (200, 400, 404, 413, 503):
        soak.fail(f"{connection.status} for {content[:300]!r}")
    return f"one value broken {connection.status}"


async def be_refused(soak: Soak, connection: Connection, r: random.Random) -> str:
    method, path, body, status = r.choice(REFUSED)
    answer = await connection.request(method, path, body)
    if connection.status != status:
        soak.fail(f"{method} {path}: {connection.status} instead of {status}: {answer[:200]!r}")
    return f"refused {status}"


async def look(soak: Soak, connection: Connection, r: random.Random) -> str:
    """A request that needs no model's step."""
    method, path, body = r.choice(CHEAP)
    await connection.request(method, path, body)
    if connection.status != 200:
        soak.fail(f"{method} {path}: {connection.status}")
    return f"{path} {connection.status}"


async def send_garbage(soak: Soak, connection: Connection, r: random.Random) -> str:
    """Bytes that are no request, or only the beginning of one."""
    stranger = Connection(soak.port)
    try:
        reader, writer = await stranger.open()
        writer.write(r.choice((*GARBAGE, r.randbytes(r.randint(1, 5000)))))
        if r.random() < 0.5:
            writer.write_eof()
            await asyncio.wait_for(reader.read(65536), 30)
    except ConnectionError:
        pass
    finally:
        stranger.close()
    return "garbage"


SCENARIOS: tuple[tuple[Scenario, int], ...] = (  # with the times that each occurs in a thousand
    (converse, 200),
    (complete, 80),
    (look, 298),
    (be_refused, 170),
    (break_one_value, 100),
    (cancel, 60),
    (send_garbage, 60),
    (keep_and_delete, 12),
    (call_tool, 8),
    (read_slowly, 7),
    (obey_schema, 4),
    (read_long_prompt, 1),
)


async def warm_up(soak: Soak, connection: Connection, seed: int) -> None:
    """Everything once, since it needs most memory; then as many schemas as the first model keeps grammars of, each with
    a whole reply, because a grammar grows while a text is matched."""
    r = random.Random(seed)
    for scenario, _ in SCENARIOS:
        await scenario(soak, connection, r)
    words = iter([new_word(r) for _ in range(GRAMMARS)])

    async def fill() -> None:
        own = Connection(soak.port)
        for word in words:
            await soak.expect(own, "POST", CHAT.path, under_schema(soak.models[0], word, 120))
        own.close()

    await asyncio.gather(*(fill() for _ in range(AT_ONCE)))
