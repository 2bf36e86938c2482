"""Two servers behind HAProxy, with the configuration in the server's README."""

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
from mlx_gptoss.server.models.named import NamedModel

pytestmark = pytest.mark.skipif(shutil.which("haproxy") is None, reason="haproxy is not installed")
README = Path(__file__).parents[2] / "mlx_gptoss/server/README.md"
PATH = "/v1/completions"
BODY = {"prompt": "Hi", "max_tokens": 1, "temperature": 0}
SESSIONS = [f"session {number}" for number in range(12)]


@pytest.fixture(scope="module")
def servers(serve):
    """Two servers with a model each, named "a" and "b", that accept any Host header, as with --host 0.0.0.0."""
    with ExitStack() as stack:
        found = []
        for name in ("a", "b"):
            model = stack.enter_context(mlx_gptoss.load(max_context=2048, max_waiting=1))
            found.append(stack.enter_context(serve(model, allowed_hosts=None)))
            found[-1].service.models = [NamedModel(model, name)]
        yield found


@pytest.fixture(scope="module")
def fleet(servers, tmp_path_factory):
    """A client of the load balancer."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    text = README.read_text().split("```haproxy\n")[1].split("```")[0]
    for documented, actual in (
        ("bind :8000", port),
        ("10.0.0.1:8080", servers[0].port),
        ("10.0.0.2:8080", servers[1].port),
    ):
        assert documented in text
        text = text.replace(documented, f"{'bind ' if 'bind' in documented else ''}127.0.0.1:{actual}")
    file = tmp_path_factory.mktemp("fleet") / "haproxy.cfg"
    file.write_text(text)
    balancer = subprocess.Popen(["haproxy", "-db", "-f", str(file)], stderr=subprocess.DEVNULL)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            until = time.monotonic() + 60
            while not is_healthy(client) and time.monotonic() < until:
                time.sleep(0.02)
            yield client
    finally:
        balancer.terminate()
        balancer.wait(60)


def is_healthy(client):
    try:
        return client.get("/health").status_code == 200
    except httpx.HTTPError:
        return False


def server_of(client, session=None, **fields):
    """The name of the server that answered."""
    headers = {} if session is None else {"X-Session": session}
    return client.post(PATH, json={**BODY, **fields}, headers=headers).raise_for_status().json()["model"]


@pytest.fixture(scope="module")
def homes(fleet):
    found = {session: server_of(fleet, session) for session in SESSIONS}
    assert set(found.values()) == {"a", "b"}
    return found


def test_session_named_by_header_or_body_stays_on_its_server(fleet, homes):
    for session, home in homes.items():
        assert server_of(fleet, session) == home
        assert server_of(fleet, metadata={"a": "long " * 9000}, prompt_cache_key=session) == home
        assert server_of(fleet, session, prompt_cache_key="another") == home


def test_requests_without_a_session_are_spread(fleet):
    assert {server_of(fleet) for _ in range(20)} == {"a", "b"}


def test_second_turn_hits_the_prefix_cache(fleet):
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


def test_stored_responses_are_found(fleet):
    for session in SESSIONS[:6]:
        headers = {"X-Session": session}
        first = fleet.post("/v1/responses", json={"input": "Hi", "max_output_tokens": 1}, headers=headers).json()
        assert fleet.get(f"/v1/responses/{first['id']}", headers=headers).json()["id"] == first["id"]


def test_stream_is_not_buffered(fleet, servers):
    bias = {str(id): -100 for id in servers[0].service.model.tokenizer.specials.values()}
    body = {**BODY, "max_tokens": 1900, "logit_bias": bias, "stream": True}
    with fleet.stream("POST", PATH, json=body) as answer:
        lines = filter(None, answer.iter_lines())
        next(lines)
        running = sum(server.service.model.status.running for server in servers)
        assert len(list(lines)) > 100 and running == 1  # the first line arrived while the reply was being generated


def test_draining_server_hands_its_sessions_over_but_not_its_responses(fleet, servers, homes, monkeypatch):
    """Before HAProxy has noticed: the health checks still succeed, so only the 503 of each request shows it."""
    gate = servers[0].service.gate
    check = gate.check

    def check_draining(scope):
        gate.draining = True
        try:
            check(scope)
        finally:
            gate.draining = False

    monkeypatch.setattr(gate, "check", check_draining)
    for session, home in homes.items():
        assert server_of(fleet, session) == "b"
        response = fleet.post("/v1/responses", json={"input": "Hi"}, headers={"X-Session": session})
        assert response.status_code == (503 if home == "a" else 200)


def test_health_check_moves_sessions_away_and_back(fleet, servers, homes):
    session = next(session for session, home in homes.items() if home == "a")
    body, headers = {"input": "Hi", "max_output_tokens": 1}, {"X-Session": session}
    servers[0].service.gate.draining = True
    try:
        deadline = time.monotonic() + 60
        while fleet.post("/v1/responses", json=body, headers=headers).status_code == 503:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        servers[0].service.gate.draining = False
    deadline = time.monotonic() + 60
    while "a" not in {server_of(fleet, session) for session in SESSIONS} and time.monotonic() < deadline:
        time.sleep(0.1)
    assert {session: server_of(fleet, session) for session in SESSIONS} == homes


def test_sessions_of_a_stopped_server_move(fleet, servers, homes):
    servers[0].drain()
    until = time.monotonic() + 60
    while is_listening(servers[0]) and time.monotonic() < until:
        time.sleep(0.01)
    assert [server_of(fleet, session) for session in homes] == ["b"] * len(homes)


def is_listening(server):
    with socket.socket() as connection:
        return connection.connect_ex(("127.0.0.1", server.port)) == 0
