"""How bodies are parsed: in json's C code where that is short, else in its Python code, with the same result."""

from __future__ import annotations

import json
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_gptoss.server import body, guard

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(VALUES, st.sampled_from([None, 1]))
def test_the_python_decoder_reads_what_json_reads(value: object, indent: int | None) -> None:
    text = json.dumps(value, indent=indent)
    assert body.PythonDecoder().decode(text) == json.loads(text) == value


@pytest.mark.parametrize(
    "text", ["", "{", "[1,]", '{"a" 1}', '"\n"', "nul", "[" * 100_000, "1" * 5000, '{"a":1,}', "[] 1"]
)
def test_it_refuses_what_json_refuses(text: str) -> None:
    for loads in (json.loads, body.PythonDecoder().decode):
        with pytest.raises((ValueError, RecursionError)):
            loads(text)


@pytest.mark.parametrize(
    ("text", "in_c"),
    [
        ("[" + "0," * 19_000 + "0]", True),
        ("[" + "0," * 100_000 + "0]", False),
        ("{" + ",".join(f'"k{n}" : 0' for n in range(30_000)) + "}", False),
        ('"' + "a" * 1_000_000 + '"', True),
    ],
)
def test_a_body_of_many_values_is_not_parsed_in_one_call(
    monkeypatch: pytest.MonkeyPatch, text: str, in_c: bool
) -> None:
    used = []
    monkeypatch.setattr(body.PythonDecoder, "decode", lambda decoder, text: used.append(text))

    class Anything:
        def validate_python(self, content: object) -> object:
            return content

    body._validated(Anything(), text.encode())  # type: ignore[arg-type]
    assert (used == []) == in_c


def test_a_body_of_too_many_names(http) -> None:
    names = ",".join(f'"k{n}":0' for n in range(body.MAX_NAMES + 10))
    answer = http.post("/tokenize", content=f'{{"content":"a","x":{{{names}}}}}')
    assert answer.status_code == 400 and "20000 names" in answer.json()["error"]["message"]
    assert http.post("/tokenize", json={"content": "a", "x": [{"k": 0}] * 40_000}).status_code == 200


def test_a_long_body_is_read_on_another_thread(http, monkeypatch) -> None:
    threads = []
    validated = body._validated

    def spy(*args):
        threads.append(threading.current_thread().name)
        return validated(*args)

    monkeypatch.setattr(body, "_validated", spy)
    for size in (10, body.SMALL_BODY):
        assert http.post("/tokenize", json={"content": "a " * (size // 2)}).status_code in (200, 400)
    assert threads[0] != threads[1] and threads[1].startswith("mlx-gptoss request")


@pytest.mark.parametrize(
    ("content", "status", "words"),
    [
        (b"\xff\xfe", 400, "not JSON"),
        ('{"content": "a"}'.encode("utf-8-sig"), 200, "tokens"),
        ('{"content": "\ud800"}'.encode(errors="surrogatepass"), 400, "not JSON"),
        (b'{"content": "\\ud800"}', 200, "tokens"),
        (b"[" + b"0," * guard.MAX_JSON_VALUES + b"0]", 413, "commas and brackets"),
        (b'{"content": "' + b"," * guard.MAX_JSON_VALUES + b'"}', 413, "commas and brackets"),
    ],
)
def test_bodies_that_are_not_requests(http, content, status, words) -> None:
    answer = http.post("/tokenize", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == status and words in answer.text
