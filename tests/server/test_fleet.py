"""Two servers behind HAProxy, configured as the README says."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

import mlx_gptoss

pytestmark = pytest.mark.skipif(shutil.which("haproxy") is None, reason="haproxy is not installed")
README = Path(__file__).parents[2] / "README.md"
PATH = "/v1/completions"
BODY = {"prompt": "Hi", "max_tokens": 1, "temperature": 0}
SESSIONS = [f"session {number}" for number in range(12)]


@pytest.fixture(scope="module")
def servers(serve):
    """Two of them, each with a model of its own, and its name for it; open to the network, as --host 0.0.0.0 is."""
    with ExitStack() as stack:
        found = []
        for name in ("a", "b"):
            model = stack.enter_context(mlx_gptoss.load(max_context=2048, max_waiting=1))
            found.append(stack.enter_context(serve(model, allowed_hosts=None)))
            found[-1].service.model_id = name
        yield found


@pytest.fixture(scope="module")
def fleet(servers, tmp_path_factory):
    """A client of the balancer."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    text = README.read_text().split("```haproxy\n")[1].split("```")[0]
    for written, here in (("bind :8000", port), ("10.0.0.1:8080", servers[0].port), ("10.0.0.2:8080", servers[1].port)):
        assert written in text
        text = text.replace(written, f"{'bind ' if 'bind' in written else ''}127.0.0.1:{here}")
    file = tmp_path_factory.mktemp("fleet") / "haproxy.cfg"
    file.write_text(text)
    balancer = subprocess.Popen(["haproxy", "-db", "-f", str(file)], stderr=subprocess.DEVNULL)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            until = time.monotonic() + 60
            while not answers(client) and time.monotonic() < until:
                time.sleep(0.02)
            yield client
    finally:
        balancer.terminate()
        balancer.wait(60)


def answers(client):
    try:
        return client.get("/health").status_code == 200
    except httpx.HTTPError:
        return False


def who(client, session=None, **fields):
    """The server that answered."""
    headers = {} if session is None else {"X-Session": session}
    return client.post(PATH, json={**BODY, **fields}, headers=headers).raise_for_status().json()["model"]


@pytest.fixture(scope="module")
def homes(fleet):
    found = {session: who(fleet, session) for session in SESSIONS}
    assert set(found.values()) == {"a", "b"}
    return found


def test_a_session_stays_on_its_server_whether_header_or_body_names_it(fleet, homes):
    for session, home in homes.items():
        assert who(fleet, session) == home
        assert who(fleet, metadata={"a": "long " * 9000}, prompt_cache_key=session) == home
        assert who(fleet, session, prompt_cache_key="another") == home


def test_requests_without_a_name_are_spread(fleet):
    assert {who(fleet) for _ in range(20)} == {"a", "b"}


def test_a_second_turn_finds_what_is_known_of_the_first(fleet):
    messages = [{"role": "user", "content": "Add 12 and 30. " * 40}]
    for session in SESSIONS[:6]:
        usage = [
            fleet.post(
                "/v1/chat/completions",
                json={"messages": messages, "max_tokens": 1, "prompt_cache_key": session},
            ).json()["usage"]
            for _ in range(2)
        ]
        assert usage[1]["prompt_tokens_details"]["cached_tokens"] > 256


def test_responses_are_found_again(fleet):
    for session in SESSIONS[:6]:
        headers = {"X-Session": session}
        first = fleet.post("/v1/responses", json={"input": "Hi", "max_output_tokens": 1}, headers=headers).json()
        assert fleet.get(f"/v1/responses/{first['id']}", headers=headers).json()["id"] == first["id"]


def test_a_stream_comes_through_as_it_is_made(fleet, servers):
    bias = {str(id): -100 for id in servers[0].service.model.tokenizer.specials.values()}
    body = {**BODY, "max_tokens": 1900, "logit_bias": bias, "stream": True}
    with fleet.stream("POST", PATH, json=body) as answer:
        lines = filter(None, answer.iter_lines())
        next(lines)
        running = sum(server.service.model.status.running for server in servers)
        assert len(list(lines)) > 100 and running == 1  # the first line has come before the last one was made


def test_a_server_that_shuts_down_hands_its_sessions_over_and_keeps_its_responses(fleet, servers, homes):
    servers[0].service.gate.draining = True  # HAProxy has not heard of it yet
    try:
        for session, home in homes.items():
            assert who(fleet, session) == "b"
            asked = fleet.post("/v1/responses", json={"input": "Hi"}, headers={"X-Session": session})
            assert asked.status_code == (503 if home == "a" else 200)
    finally:
        servers[0].service.gate.draining = False
    until = time.monotonic() + 60
    while "a" not in {who(fleet, session) for session in SESSIONS} and time.monotonic() < until:
        time.sleep(0.1)
    assert {session: who(fleet, session) for session in SESSIONS} == homes


def test_a_server_that_is_gone_hands_its_sessions_over(fleet, servers, homes):
    servers[0].drain()
    until = time.monotonic() + 60
    while listens(servers[0]) and time.monotonic() < until:
        time.sleep(0.01)
    assert [who(fleet, session) for session in homes] == ["b"] * len(homes)


def listens(server):
    with socket.socket() as connection:
        return connection.connect_ex(("127.0.0.1", server.port)) == 0
