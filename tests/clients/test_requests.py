"""The requests of real clients, in their shape and with our words: each is answered, and says what was ignored.

Each file in requests/ is one request. recorded_with: the client that sends this shape, with its version, as record.py
showed it; null for a shape that the client's documentation describes. reply: what the model writes, a final answer or
the arguments of a function. after: a request to send before it, whose reasoning item it refers to. ignored: what the
header X-Ignored-Fields has to name.
"""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest
from scripted import NextReply, calls, says, serving_script, thinks

REQUESTS = {path.stem: json.loads(path.read_text()) for path in sorted(Path(__file__).with_name("requests").iterdir())}

TEXTS = {"content", "delta", "text", "response", "arguments", "partial_json", "answer", "name"}


@pytest.fixture(scope="module")
def next_reply():
    return NextReply()


@pytest.fixture(scope="module")
def http(next_reply):
    with serving_script(next_reply) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


def send(http, request):
    body = request.get("body")
    return http.request(request["method"], request["path"], headers=request.get("headers"), json=body)


def written(answer: httpx.Response) -> str:
    """What the model wrote: the texts of all events, lines or objects of the answer, in order."""

    def texts(value, key=""):
        if isinstance(value, dict):
            for name, item in value.items():
                yield from texts(item, name)
        elif isinstance(value, list):
            for item in value:
                yield from texts(item, key)
        elif isinstance(value, str) and key in TEXTS:
            yield value

    lines = (line.removeprefix("data: ") for line in answer.text.splitlines())
    return "".join(text for line in lines if line.startswith("{") for text in texts(json.loads(line)))


@pytest.mark.parametrize("name", REQUESTS)
def test_request_is_answered(http, next_reply, name):
    request = REQUESTS[name]
    if "after" in request:
        first = send(http, REQUESTS[request["after"]]).json()
        body = json.dumps(request["body"]).replace("REASONING_ID", first["output"][0]["id"])
        request = {**request, "body": json.loads(body)}
    kind, text = request.get("reply", ("final", "Hello."))
    next_reply.reply = [thinks("A thought."), says(text) if kind == "final" else calls(kind, text)]
    answer = send(http, request)
    assert answer.status_code == 200, answer.text
    if request["method"] == "POST" and "count" not in name and "show" not in name:
        assert text.strip('{}"').split()[-1].strip('"') in written(answer)
    ignored = answer.headers.get("X-Ignored-Fields", "")
    assert sorted(filter(None, ignored.split(", "))) == sorted(request["ignored"])
