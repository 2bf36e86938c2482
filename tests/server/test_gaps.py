"""No body that the limits allow keeps other requests waiting, and no text is encoded that nobody waits for.

longest_gap.py measures the same in wall-clock time, body by body.
"""

from __future__ import annotations

import json
import socket
import threading
import time

import longest_gap
import pytest
from holds import holds

from mlx_gptoss import tokenizer
from mlx_gptoss.errors import Cancelled
from mlx_gptoss.server import guard
from mlx_gptoss.tokenizer import Tokenizer
from mlx_gptoss.untrusted.cancel import cancellable

HOLD_S = 0.1  # CPU time; the longest measured is a third of it
SIZE = guard.MAX_BODY_BYTES - 1000


def quick(bodies):
    """The bodies that each stress another step: reading, parsing, validating, converting, encoding, answering."""
    names = (
        "text: chat",
        "text: responses",
        "text: completions",
        "text: messages, system",
        "text: tokenize",
        "text: a name without type",
        "two bytes: /v1/completions",
        'values {"a":1}: /v1/chat/completions messages',
        'values {"type":"a"}: /v1/responses input',
        "values []: /v1/completions prompt",
        "values 0: /detokenize tokens",
        "text parts: /v1/responses",
        "names: message",
        "10000 messages: /v1/responses",
        "10000 messages: /v1/messages",
        "150 tools of 30: chat",
        "tool's description",
        "ids: completions",
        "no JSON: commas",
        "no JSON: zeros",
        "depth 50000",
    )
    found = {name: (path, make) for name, path, make in bodies if name in names}
    assert set(found) == set(names)
    return [(name, *found[name]) for name in names]


@pytest.mark.slow
def test_no_body_holds_the_event_loop_or_the_lock(serve, model) -> None:
    bodies = quick([*longest_gap.texts(SIZE), *longest_gap.structures(SIZE, guard.MAX_JSON_VALUES)])
    longest = {}
    with holds() as held, serve(model) as server:
        for name, path, make in bodies:
            body = make()
            tries = []
            for _ in range(3):  # the CPU time of a call varies, too, when caches are shared
                held.reset()
                status, _ = longest_gap.send(server.port, path, body, 60)
                assert status in ("200", "400", "413"), name
                tries.append(max(held.callback, held.call))
            longest[name] = min(tries)
    assert {name: hold for name, hold in longest.items() if hold[0] > HOLD_S} == {}


def test_a_body_in_chunks_of_one_byte_does_not_hold_the_event_loop(serve, model) -> None:
    head = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    with holds() as held, serve(model) as server:
        tries = []
        for _ in range(3):
            held.reset()
            with socket.create_connection(("127.0.0.1", server.port)) as connection:
                connection.sendall(head + b"1\r\na\r\n" * 100_000 + b"0\r\n\r\n")
                assert connection.recv(100).startswith(b"HTTP/1.1 400")
            tries.append(held.callback)
            if tries[-1][0] < 5 * HOLD_S:
                break
    assert min(tries)[0] < 5 * HOLD_S  # the profiler takes most of it; without pieces it is sixteen times as long


@pytest.mark.benchmark
@pytest.mark.slow
def test_the_longest_gap_of_every_body_is_under_a_tenth_of_a_second() -> None:
    bodies = [*longest_gap.texts(SIZE), *longest_gap.structures(SIZE, guard.MAX_JSON_VALUES)]
    with longest_gap.server(["--max-context", "131072", "--slots", "4"]) as port:
        rows = list(longest_gap.measure(port, bodies, 60, target=0.1))
    assert [row for row in rows if max(row[4:]) > 0.1] == []


def test_encoding_ends_when_nobody_waits(model) -> None:
    slices = model.tokenizer.encode_slices("Hello world. " * 50_000)
    with cancellable() as flag:
        assert next(slices)
        flag.set()
        with pytest.raises(Cancelled):
            next(slices)
    assert model.tokenizer.encode("Hello")  # outside of the block


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/completions", lambda text: {"prompt": text}),
        ("/tokenize", lambda text: {"content": text}),
        ("/v1/responses", lambda text: {"input": text, "truncation": "auto"}),
        ("/v1/messages/count_tokens", lambda text: {"messages": [{"role": "user", "content": text}]}),
    ],
)
def test_encoding_ends_when_the_client_leaves(serve, model, monkeypatch, path, fields) -> None:
    """The thread is stopped between two slices: they are made to wait until the client is gone."""
    started, left, ended = threading.Event(), threading.Event(), threading.Event()
    counts = []
    check = tokenizer.check_cancelled

    def check_after_the_client_left() -> None:
        started.set()
        left.wait(60)
        counts.append(1)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                check()
            except Cancelled:
                ended.set()
                raise
            time.sleep(0.001)

    with serve(model) as server:
        monkeypatch.setattr(tokenizer, "check_cancelled", check_after_the_client_left)
        body = json.dumps(fields("Hello world. " * 500)).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(head + body)
            assert started.wait(60)
        left.set()
        assert ended.wait(60)
    assert len(counts) == 1


def test_a_long_prompt_is_encoded_in_slices_of_bounded_size(model) -> None:
    for text in ("a" * 500_000, "Hello world. " * 50_000, "1" * 500_000, " " * 500_000, "日" * 500_000, "😀" * 500_000):
        pieces = list(tokenizer._slices(text))
        assert "".join(pieces) == text
        assert max(map(len, pieces)) <= tokenizer.MAX_WORD_CHARACTERS + tokenizer.SLICE_CHARACTERS


def test_a_pair_of_surrogates_is_not_cut() -> None:
    text = "a" + "\ud83d\ude00" * tokenizer.MAX_WORD_CHARACTERS
    pieces = list(tokenizer._slices(text))
    assert len(pieces) > 1 and "".join(pieces) == text
    assert all("\udc00" <= piece[-1] < "\ue000" for piece in pieces)


def test_special_tokens_are_found_at_the_edges_of_slices(model, monkeypatch) -> None:
    text = "Hello<|end|>there<|start|><|end|" * 20 + "<|end|>"
    whole = model.tokenizer.encode_with_specials(text)
    monkeypatch.setattr(tokenizer, "SLICE_CHARACTERS", 3)
    assert model.tokenizer.encode_with_specials(text) == whole
    assert Tokenizer.decode(model.tokenizer, whole, specials=True) == text
