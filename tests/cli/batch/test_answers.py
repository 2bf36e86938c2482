"""mlx-gptoss batch: the answers, and errors for malformed lines and files."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
import tracemalloc

import httpx
import pytest
from batch_requests import CHAT, COMPLETIONS, ONE, RESPONSES, question, request, steady

import mlx_gptoss
from mlx_gptoss.errors import InvalidRequest
from mlx_gptoss.server import batch as server_batch
from mlx_gptoss.server.app import build_app
from mlx_gptoss.server.batch import Batch
from mlx_gptoss.server.batch_files import MAX_LINE_BYTES, RequestFile
from mlx_gptoss.server.guard import Gate
from mlx_gptoss.server.models.named import NamedModel, model_names
from mlx_gptoss.server.responses.store import ResponseStore
from mlx_gptoss.server.service import Service


def test_an_answer_is_what_the_server_would_send(run, model):
    asked = [question(number) for number in range(3)]
    asked += [
        (CHAT, {}),
        (CHAT, {"messages": [{"role": "user", "content": "Hi"}], "temperature": "hot"}),
        (CHAT, {"messages": [{"role": "user", "content": "Hi"}], "model": "gpt-4"}),
        (CHAT, {"messages": [{"role": "wizard", "content": "Hi"}]}),
        (CHAT, {"messages": [{"role": "user", "content": "Hi " * 2000}]}),
        (CHAT, {"messages": [{"role": "user", "content": "Hi"}], "top_logprobs": 2}),
        (RESPONSES, {"input": [{"type": "image"}]}),
        (RESPONSES, {"input": "Hi", "previous_response_id": "resp_1"}),
        (COMPLETIONS, {"prompt": "Hi", "best_of": 3}),
        (COMPLETIONS, ["Hi"]),
        (COMPLETIONS, "Hi"),
    ]
    service = Service([NamedModel(model, *model_names(None))], Gate(), store=ResponseStore(max_bytes=0))

    async def served():
        transport = httpx.ASGITransport(build_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return [await client.post(url, json=body) for url, body in asked]

    wanted = [(answer.status_code, steady(answer.json())) for answer in asyncio.run(served())]
    entries = run(*(request(str(place), *one) for place, one in enumerate(asked)))
    entries.sort(key=lambda entry: int(entry["custom_id"]))
    assert [(entry["response"]["status_code"], steady(entry["response"]["body"])) for entry in entries] == wanted
    assert [status for status, _ in wanted[:6]] == [200, 200, 200, 400, 400, 200]  # any model name is this model
    assert {status for status, _ in wanted[6:]} == {400}
    assert all(entry["error"] is None and entry["response"]["request_id"] for entry in entries)


def test_bad_lines_get_an_error_of_their_own(run, tmp_path):
    good = (COMPLETIONS, {"prompt": "Hi", "max_tokens": 1, "temperature": 0})
    bad = [
        (b'{"custom_id": "a', None, "invalid_json_line"),
        (b"\xff\xfe", None, "invalid_json_line"),
        (b"[" * 100_000, None, "invalid_json_line"),
        (b'"a line"', None, "invalid_json_line"),
        (b'{"a": "' + b"x" * MAX_LINE_BYTES + b'"}', None, "line_too_long"),
        (request("", *good), None, "missing_required_parameter"),
        (request("first", *good), None, "duplicate_custom_id"),
        (request("first", *good), None, "duplicate_custom_id"),
        (b'{"custom_id": "b", "method": "POST", "url": "/v1/completions"}', "b", "missing_required_parameter"),
        (request("get", *good, method="GET"), "get", "invalid_method"),
        (request("url", "/v1/embeddings", {}), "url", "invalid_url"),
        (request("urls", ["/v1/completions"], {}), "urls", "invalid_url"),
        (request("more", *good, priority=1), "more", "unknown_parameter"),
    ]  # fmt: skip
    lines = [b"", request("first", *good), *(line for line, _, _ in bad), request("\ud800 last", *good)]
    entries = run(*lines)
    errors = [entry for entry in entries if entry["error"]]
    shown = {entry["error"]["line"]: (entry["custom_id"], entry["error"]["code"]) for entry in errors}
    assert shown == {place: (custom_id, code) for place, (_, custom_id, code) in enumerate(bad, 3)}
    assert all(entry["response"] is None for entry in errors)
    assert {entry["custom_id"] for entry in entries if not entry["error"]} == {"first", "\ud800 last"}
    assert len(entries) == len(lines) - 1

    whole = (tmp_path / "out.jsonl").read_bytes().splitlines(keepends=True)
    removed = [line for line in whole if b'"response":null' in line][:5]
    (tmp_path / "out.jsonl").write_bytes(b"".join(line for line in whole if line not in removed))
    again = run(*lines)
    assert sorted(json.dumps(steady(one)) for one in again) == sorted(json.dumps(steady(one)) for one in entries)


def test_streaming_is_refused(run):
    (entry,) = run(request("a", COMPLETIONS, {"prompt": "Hi", "stream": True}))
    assert entry["response"]["status_code"] == 400
    assert entry["response"]["body"]["error"]["param"] == "stream"


def test_slots_are_busy_and_few_lines_are_under_way(run, lines, model, monkeypatch):
    """Each step waits until the engine has the expected number of requests, so that the result does not depend on the
    speed of the two threads."""
    entered, ended, under_way, most, seen = [], [], set(), 0, []

    def counted(whole):
        async def answer(body, service):
            nonlocal most
            under_way.add(id(body))
            most = max(most, len(under_way))
            try:
                return await whole(body, service)
            finally:
                under_way.remove(id(body))

        return answer

    def enter(*args, **options):
        stream = enter_uncounted(*args, **options)
        entered.append(stream)
        return stream

    def submit(runner, rows):
        until = time.monotonic() + 300
        while len(entered) < min(len(ended) + 8, len(lines)) and time.monotonic() < until:
            time.sleep(0.001)
        seen.append((len(lines) - len(ended), narrow.status.running))
        return submit_uncounted(runner, rows)

    def release(runner, slot):
        ended.append(slot)
        release_uncounted(runner, slot)

    kind = model._engine.call(type)
    submit_uncounted, release_uncounted = kind.submit, kind.release
    monkeypatch.setattr(kind, "submit", submit)
    monkeypatch.setattr(kind, "release", release)
    counting = {url: (form, counted(whole)) for url, (form, whole) in server_batch.ENDPOINTS.items()}
    monkeypatch.setattr(server_batch, "ENDPOINTS", counting)
    with mlx_gptoss.load(slots=4, max_context=1024, backend="mlx", device="cpu") as narrow:
        enter_uncounted = narrow._engine.submit
        monkeypatch.setattr(narrow._engine, "submit", enter)
        run(*lines, model=narrow)
    assert len(entered) == len(ended) == len(lines) and most == 8
    full = [running for left, running in seen[1:] if left >= 8]  # the first request starts alone
    assert len(full) > 40 and set(full) == {4}


def test_a_line_costs_few_bytes_of_memory(tmp_path):
    with (tmp_path / "in.jsonl").open("wb") as file:
        for number in range(5000):
            file.write(request(f"a rather long custom_id with the number {number}", CHAT, {"text": "x" * 1000}) + b"\n")
    tracemalloc.start()
    requests = RequestFile(tmp_path / "in.jsonl")
    current, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert requests.total == 5000
    assert current < 5000 * 30 and peak < 5000 * 80 + 200_000
    assert sum(1 for _ in requests.pending()) == 5000
    for number in range(5000):
        entry = {"custom_id": f"a rather long custom_id with the number {number}"}
        assert requests.mark_answered(entry) and not requests.mark_answered(entry)
    assert list(requests.pending()) == []


@pytest.mark.parametrize(
    ("requests_bytes", "answers_bytes", "message"),
    [
        (b"", None, "empty"),
        (b"\n\n", None, "empty"),
        (b"id,question\n1,Hi\n", None, "contains no request; line 1: the line is not JSON"),
        (ONE, b"my notes", "not an answer file, see its line 1"),
        (ONE, b'{"id":"batch_req_1","custom_id":"b"}\n', "answers 'b', which no line"),
        (ONE, b'{"id":"batch_req_1","custom_id":"a"}\n' * 2, "line 2 of"),
        (ONE, b'{"id":"batch_req_1","custom_id":null,"error":{"line":1}}\n', "answers 'None'"),
        (ONE, b'{"id":"batch_req_1","custom_id\n{"id":"batch_req_1","custom_id":"a"}\n', "see its line 1"),
    ],
)
def test_other_files_are_refused_and_not_changed(tmp_path, requests_bytes, answers_bytes, message):
    requests, answers = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    requests.write_bytes(requests_bytes)
    if answers_bytes is not None:
        answers.write_bytes(answers_bytes)
    with pytest.raises(InvalidRequest) as refused:
        Batch(requests, answers)
    assert message in str(refused.value)
    assert (answers.read_bytes() if answers.exists() else None) == answers_bytes
    assert requests.read_bytes() == requests_bytes


def test_the_requests_are_not_written_over(tmp_path):
    (tmp_path / "in.jsonl").write_bytes(ONE)
    os.link(tmp_path / "in.jsonl", tmp_path / "linked.jsonl")
    for name in ("in.jsonl", "linked.jsonl"):
        with pytest.raises(InvalidRequest, match="is the file of requests"):
            Batch(tmp_path / "in.jsonl", tmp_path / name)


def test_without_the_extra_the_error_names_it():
    code = (
        "import sys; sys.modules['fastapi'] = None; sys.argv = ['mlx-gptoss', 'batch', 'in', 'out']\n"
        "from mlx_gptoss_cli.main import main; main()"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert out.returncode == 1 and out.stderr.count("\n") == 1
    assert "pip install 'mlx-gptoss[serve]'" in out.stderr
