"""Measures how long one client's body keeps the others waiting: `python tests/server/longest_gap.py`.

For each body the largest that the limits allow is sent, while two other processes ask for /health without a pause and
read a stream. The table has the status, the seconds that the request took, and the longest gaps in milliseconds:
between two answers of /health, and between two events of the stream. A body with a gap over --target is sent again, at
most --tries times in all, and the smallest of its longest gaps counts: what the body causes comes every time, what
other programs cause does not. The first row, where nothing is sent, is what the machine itself adds. Ends with the
rows that were over the target every time.

--limit SECONDS ends a request by closing its connection. --only WORD selects bodies by their name. --body-mb N and
--values N size the bodies for a server with other limits.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import multiprocessing
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.sharedctypes import Synchronized
from typing import Any

CHAT, COMPLETIONS, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
COUNT, INPUT_TOKENS, GENERATE = "/v1/messages/count_tokens", "/v1/responses/input_tokens", "/api/generate"
WORDS = "The quick brown fox jumps over the lazy dog, and then it goes home. "

Body = tuple[str, str, Callable[[], bytes]]


def user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


def text_of(size: int) -> str:
    return (WORDS * (size // len(WORDS) + 1))[:size]


def encoded(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode(errors="surrogatepass")


def texts(size: int) -> Iterator[Body]:
    """One long string wherever an endpoint takes text."""
    places: dict[str, tuple[str, Callable[[str], Any]]] = {
        "chat": (CHAT, lambda text: {"messages": user(text)}),
        "chat, system": (CHAT, lambda text: {"messages": [{"role": "system", "content": text}, *user("Hi")]}),
        "chat, a field without effect": (CHAT, lambda text: {"messages": user("Hi"), "x": text, "max_tokens": 1}),
        "chat, call's arguments": (CHAT, lambda text: {"messages": _called(text)}),
        "chat, prefill": (CHAT, lambda text: {"messages": [*user("Hi"), {"role": "assistant", "content": text}]}),
        "chat, user": (CHAT, lambda text: {"messages": user("Hi"), "user": text, "max_tokens": 1}),
        "chat, model": (CHAT, lambda text: {"messages": user("Hi"), "model": text, "max_tokens": 1}),
        "completions": (COMPLETIONS, lambda text: {"prompt": text}),
        "completions, 16 x echo": (COMPLETIONS, lambda text: {"prompt": text, "echo": True, "n": 16}),
        "responses": (RESPONSES, lambda text: {"input": text}),
        "responses, truncated": (RESPONSES, lambda text: {"input": [*user(text), *user("Hi")], "truncation": "auto"}),
        "responses, instructions": (RESPONSES, lambda text: {"input": "Hi", "instructions": text}),
        "responses, input_tokens": (INPUT_TOKENS, lambda text: {"input": text}),
        "messages": (MESSAGES, lambda text: {"messages": user(text), "max_tokens": 1}),
        "messages, system": (MESSAGES, lambda text: {"messages": user("Hi"), "system": text, "max_tokens": 1}),
        "messages, prefill": (
            MESSAGES,
            lambda text: {"messages": [*user("Hi"), {"role": "assistant", "content": text}], "max_tokens": 1},
        ),
        "count_tokens": (COUNT, lambda text: {"messages": user(text)}),
        "ollama chat": ("/api/chat", lambda text: {"messages": user(text)}),
        "ollama chat, truncated": ("/api/chat", lambda text: {"messages": user(text), "truncate": True}),
        "ollama generate": (GENERATE, lambda text: {"prompt": text}),
        "ollama generate, raw": (GENERATE, lambda text: {"prompt": text, "raw": True}),
        "tokenize": ("/tokenize", lambda text: {"content": text, "with_pieces": True}),
        "apply-template": ("/apply-template", lambda text: {"messages": user(text)}),
        "a name without type": (CHAT, lambda text: {text: 1, "messages": user("Hi"), "max_tokens": 1}),
    }
    for name, (path, body) in places.items():
        yield f"text: {name}", path, lambda body=body: encoded(body(text_of(size)))
    kinds = {
        "no spaces": "a",
        "base64": "QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVo5",
        "digits": "1234567890",
        "spaces": " ",
        "line breaks": "\n",
        "quotes": '"',
        "two bytes": "é",
        "three bytes": "日",
        "four bytes": "😀",
        "special tokens": "<|end|>",
        "half special tokens": "<|",
        "transport lines": "x-anthropic-a\n",
        "lone surrogates": "\ud800",
    }
    for name, unit in kinds.items():
        count = size // len(json.dumps(unit, ensure_ascii=False).encode(errors="surrogatepass")[1:-1])
        for path, body in (
            (COMPLETIONS, lambda text: {"prompt": text}),
            (COUNT, lambda text: {"messages": user("Hi"), "system": text}),
        ):
            yield f"{name}: {path}", path, lambda unit=unit, n=count, body=body: encoded(body(unit * n))


def _called(text: str) -> list[dict[str, Any]]:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"text": text}}}
    return [*user("Hi"), {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "1"}]


def structures(size: int, values: int) -> Iterator[Body]:
    """Many values, deep nesting, many tools, many messages, many ids, and no JSON."""
    many = max(1, min(values - 100, size // 12))
    small = {"[]": "[]", "{}": "{}", "0": "0", '"a"': '"a"', '{"a":1}': '{"a":1}', '{"type":"a"}': '{"type":"a"}'}
    for name, one in small.items():
        count = many // (1 + one.count("{") + one.count("["))
        listed = "[" + ",".join([one] * count) + "]"
        for path, field, rest in (
            (CHAT, "messages", ""),
            (CHAT, "x", ',"messages":[{"role":"user","content":"Hi"}],"max_tokens":1'),
            (CHAT, "tools", ',"messages":[{"role":"user","content":"Hi"}]'),
            (COMPLETIONS, "prompt", ""),
            (COMPLETIONS, "stop", ',"prompt":"Hi"'),
            (RESPONSES, "input", ""),
            (RESPONSES, "include", ',"input":"Hi"'),
            (MESSAGES, "system", ',"messages":[{"role":"user","content":"Hi"}],"max_tokens":1'),
            (GENERATE, "images", ',"prompt":"Hi"'),
            ("/detokenize", "tokens", ""),
        ):
            yield f"values {name}: {path} {field}", path, lambda f=field, v=listed, r=rest: f'{{"{f}":{v}{r}}}'.encode()
    parts = many // 4
    for path, wrap in {
        CHAT: lambda content: {"messages": user(content)},
        RESPONSES: lambda content: {"input": user(content)},
        MESSAGES: lambda content: {"messages": user(content), "max_tokens": 1},
    }.items():
        yield f"text parts: {path}", path, lambda w=wrap: encoded(w([{"type": "text", "text": ""}] * parts))
        yield f"image parts: {path}", path, lambda w=wrap: encoded(w([{"type": "image", "a": "a"}] * parts))
    names = ",".join(f'"k{index}":0' for index in range(many))
    yield "names: chat", CHAT, lambda: f'{{{names},"messages":[{{"role":"user","content":"Hi"}}]}}'.encode()
    yield "names: message", CHAT, lambda: f'{{"messages":[{{"role":"user","content":"Hi",{names}}}]}}'.encode()
    yield "names: metadata", RESPONSES, lambda: f'{{"input":"Hi","metadata":{{{names}}}}}'.encode()
    yield "names: logit_bias", CHAT, lambda: f'{{"messages":[],"logit_bias":{{{names}}}}}'.encode()
    for depth in (500, 50_000):
        yield f"depth {depth}", CHAT, lambda d=depth: b'{"messages":' + b"[" * d + b"]" * d + b"}"
        yield f"depth {depth} of objects", CHAT, lambda d=depth: b'{"x":' * d + b"0" + b"}" * d
    hello = "Hello there, how are you today? " * 4  # more tokens than the context holds, or a long prefill would follow
    for count in (100_000, 10_000):
        messages = [*user(hello), {"role": "assistant", "content": hello}] * (min(count, many // 3) // 2)
        for path in (CHAT, MESSAGES, RESPONSES, COUNT, INPUT_TOKENS, "/api/chat", "/apply-template"):
            field = "input" if path in (RESPONSES, INPUT_TOKENS) else "messages"
            body = {field: [*messages, *user("Hi")], "max_tokens": 1}
            yield f"{count} messages: {path}", path, lambda b=body: encoded(b)
    long = text_of(1 << 20)  # too long for the context, but the tools are read first
    for count, properties in ((150, 30), (150, 300), (1024, 20), (16, 3000)):
        properties = min(properties, many // count // 3)
        schema = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(properties)}}
        functions = [{"name": f"f{i}", "description": f"Tool {i}", "parameters": schema} for i in range(count)]
        strict = [{"type": "function", "function": {**function, "strict": True}} for function in functions]
        loose = [{"type": "function", "function": function} for function in functions]
        named = [{"name": f["name"], "input_schema": schema} for f in functions]
        flat = [{"type": "function", **function} for function in functions]
        label = f"{count} tools of {properties}"
        yield f"{label}: chat", CHAT, lambda t=loose: encoded({"messages": user(long), "tools": t, "max_tokens": 1})
        yield (
            f"{label}, strict: chat",
            CHAT,
            lambda t=strict: encoded({"messages": user(long), "tools": t, "max_tokens": 1}),
        )
        yield f"{label}: responses", RESPONSES, lambda t=flat: encoded({"input": long, "tools": t})
        yield f"{label}: messages", MESSAGES, lambda t=named: encoded({"messages": user(long), "tools": t})
    for where, make in {
        "description": lambda text: {"name": "f", "description": text},
        "default": lambda text: {"name": "f", "parameters": {"type": "object", "default": text}},
        "unread field": lambda text: {"name": "f", "x": text},
    }.items():
        tools = lambda m=make: [{"type": "function", "function": m("a\n" * (size // 3 - 100))}]  # noqa: E731
        yield f"tool's {where}", CHAT, lambda t=tools: encoded({"messages": user("Hi"), "tools": t(), "max_tokens": 1})
    ids = "[" + ",".join(["104"] * many) + "]"
    yield "ids: completions", COMPLETIONS, lambda: f'{{"prompt":{ids},"echo":true}}'.encode()
    yield "ids: detokenize", "/detokenize", lambda: f'{{"tokens":{ids}}}'.encode()
    yield "ids: stop_token_ids", CHAT, lambda: f'{{"messages":[],"stop_token_ids":{ids}}}'.encode()
    for name, content in {
        "zeros": b"\x00",
        "letters": b"a",
        "spaces": b" ",
        "broken UTF-8": b"\xff",
        "quotes": b'"',
        "commas": b",",
        "digits": b"1",
        "line breaks": b"\n",
    }.items():
        yield f"no JSON: {name}", CHAT, lambda c=content: c * size
    yield "a number", CHAT, lambda: b'{"seed":' + b"1" * (size - 100) + b"}"
    yield "a fraction", CHAT, lambda: b'{"temperature":0.' + b"1" * (size - 100) + b"}"
    stops = {"stop": ["ab" * 512] * 16, "messages": user("Hi"), "max_tokens": 16}
    yield "stop strings", CHAT, lambda: encoded(stops)


def probe_health(port: int, gap: Synchronized[float], stop: Any) -> None:
    """Ask for /health without a pause. gap: the longest time between two answers, in seconds."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    last = time.perf_counter()
    while not stop.is_set():
        connection.request("GET", "/health")
        connection.getresponse().read()
        now = time.perf_counter()
        gap.value, last = max(gap.value, now - last), now
        time.sleep(0.001)


def probe_stream(port: int, gap: Synchronized[float], stop: Any) -> None:
    """Read one stream after the other. gap: the longest time between two events of a stream, in seconds."""
    body = encoded({"prompt": "12 + 30 = ", "max_tokens": 2000, "stream": True, "logit_bias": {}, "temperature": 2})
    while not stop.is_set():
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
        connection.request("POST", COMPLETIONS, body, {"Content-Type": "application/json"})
        answer, last = connection.getresponse(), None
        while not stop.is_set() and answer.readline():
            now = time.perf_counter()
            gap.value, last = max(gap.value, now - (last or now)), now
        connection.close()


def send(port: int, path: str, body: bytes, limit: float) -> tuple[str, float]:
    """Send one body. Returns the status, or "-" if there was none within the limit, and the seconds that it took."""
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    started, answer = time.perf_counter(), b""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.settimeout(limit)
        try:
            threading.Thread(target=_send_all, args=(connection, head.encode() + b"\r\n\r\n" + body)).start()
            while b"\r\n\r\n" not in answer and (piece := connection.recv(65536)):
                answer += piece
            length = int(answer.lower().partition(b"content-length:")[2].split()[0] if b"ontent-" in answer else 0)
            while len(answer.partition(b"\r\n\r\n")[2]) < length and (piece := connection.recv(1 << 20)):
                answer += piece
        except (OSError, IndexError, ValueError):
            pass
        return answer[9:12].decode() or "-", time.perf_counter() - started


def _send_all(connection: socket.socket, data: bytes) -> None:
    with contextlib.suppress(OSError):  # the server answered before the end, or the limit is over
        connection.sendall(data)


@contextmanager
def server(arguments: list[str]) -> Iterator[int]:
    """A server in a process of its own. Yields its port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlx_gptoss_cli", "serve", "--port", str(port), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        process.wait(60)


Row = tuple[str, int, str, float, float, float]


def measure(port: int, bodies: list[Body], limit: float, tries: int = 3, target: float = 0.0) -> Iterator[Row]:
    """Yield for each body its name and size, the status, the seconds it took, and the gaps of /health and a stream.

    target: seconds; a body whose gaps are all shorter is not sent again.
    """
    context = multiprocessing.get_context("spawn")
    health, stream, stop = context.Value("d", 0.0), context.Value("d", 0.0), context.Event()
    probes = [
        context.Process(target=probe, args=(port, gap, stop), daemon=True)
        for probe, gap in ((probe_health, health), (probe_stream, stream))
    ]
    for process in probes:
        process.start()
    time.sleep(3)
    try:
        for name, path, make in bodies:
            body, status, seconds = make(), "-", 0.0
            gaps: list[tuple[float, float]] = []
            for _ in range(tries):
                time.sleep(0.2)
                health.value = stream.value = 0.0
                if body:
                    status, seconds = send(port, path, body, limit)
                time.sleep(0.3 if body else 2.0)
                gaps.append((health.value, stream.value))
                shortest = [min(column) for column in zip(*gaps, strict=True)]
                if max(shortest) < target:
                    break
            yield name, len(body), status, seconds, shortest[0], shortest[1]
    finally:
        stop.set()
        for process in probes:
            process.join(10)
            process.kill()


def main() -> None:
    from mlx_gptoss.server import guard

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--limit", type=float, default=120, metavar="SECONDS")
    parser.add_argument("--only", default="", metavar="WORD")
    parser.add_argument("--body-mb", type=float, default=guard.Gate.max_body_bytes / 2**20, metavar="N")
    parser.add_argument("--values", type=int, default=guard.MAX_JSON_VALUES, metavar="N")
    parser.add_argument("--max-context", default="131072", metavar="N")
    parser.add_argument("--tries", type=int, default=3, metavar="N")
    parser.add_argument("--target", type=float, default=100, metavar="MS", help="a shorter gap needs no second try")
    options = parser.parse_args()
    size = int(options.body_mb * 2**20) - 1000
    every = [*texts(size), *structures(size, options.values)]
    bodies = [("nothing", "", lambda: b""), *(body for body in every if options.only in body[0])]
    print(f"{'body':45} {'MB':>6} {'status':>6} {'s':>7} {'/health ms':>10} {'stream ms':>10}", flush=True)
    worst, over = [0.0, 0.0], []
    with server(["--max-context", options.max_context, "--slots", "4"]) as port:
        for row in measure(port, bodies, options.limit, options.tries, options.target / 1e3):
            name, length, status, seconds, health, stream = row
            line = f"{name:45} {length / 2**20:6.1f} {status:>6} {seconds:7.2f}"
            line += f" {health * 1e3:10.0f} {stream * 1e3:10.0f}"
            print(line, flush=True)
            worst = [max(worst[0], health), max(worst[1], stream)]
            if max(health, stream) >= options.target / 1e3:
                over.append(line)
    print(f"{'longest':45} {'':6} {'':6} {'':7} {worst[0] * 1e3:10.0f} {worst[1] * 1e3:10.0f}")
    print(f"{len(bodies) - 1} bodies, {len(over)} rows at or over {options.target:.0f} ms", *over, sep="\n")


if __name__ == "__main__":
    main()
