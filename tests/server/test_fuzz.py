"""The server against requests that schemathesis generates from its OpenAPI schema."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable

import mlx_gptoss

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
from schemathesis import GenerationMode  # noqa: E402
from schemathesis.checks import not_a_server_error  # noqa: E402
from schemathesis.specs.openapi.checks import (  # noqa: E402
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [not_a_server_error, content_type_conformance, response_schema_conformance, status_code_conformance]
SETTINGS = {
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    "phases": [Phase.explicit, Phase.generate],
    "derandomize": True,
    "database": None,
}


@pytest.fixture(scope="module")
def fuzzed(serve):
    """A server whose replies are short because its context is."""
    with mlx_gptoss.load(slots=4, max_context=160) as model, serve(model) as server:
        yield server


def send_to_all_operations(server, idle, examples):
    """Send up to `examples` valid and as many invalid requests to every operation; return how many were sent.

    After each of them the server must become idle.
    """
    sent = 0
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    for operation in (found.ok() for found in schema.get_all_operations()):
        for mode in GenerationMode:

            @given(case=operation.as_strategy(generation_mode=mode))
            @settings(max_examples=examples, **SETTINGS)
            def ask(case):
                nonlocal sent
                case.call_and_validate(checks=CHECKS, timeout=60)
                assert idle(server)
                sent += 1

            with contextlib.suppress(Unsatisfiable):  # an operation without fields has no invalid request
                ask()
    return sent


def test_no_request_breaks_the_server(fuzzed, idle):
    assert send_to_all_operations(fuzzed, idle, 4) > 50


@pytest.mark.slow
def test_no_request_breaks_the_server_long(fuzzed, idle):
    print(send_to_all_operations(fuzzed, idle, 200), "requests")
