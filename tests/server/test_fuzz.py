"""The server against requests that schemathesis makes up from its own OpenAPI page."""

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
    """A server whose replies are short, for want of context."""
    with mlx_gptoss.load(slots=4, max_context=160) as model, serve(model) as server:
        yield server


def ask_everything(server, idle, examples):
    """So many valid and invalid requests to every operation; how many there were. After each the server is idle."""
    asked = 0
    page = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    for operation in (found.ok() for found in page.get_all_operations()):
        for mode in GenerationMode:

            @given(case=operation.as_strategy(generation_mode=mode))
            @settings(max_examples=examples, **SETTINGS)
            def ask(case):
                nonlocal asked
                case.call_and_validate(checks=CHECKS, timeout=60)
                assert idle(server)
                asked += 1

            with contextlib.suppress(Unsatisfiable):  # nothing about an operation without fields is invalid
                ask()
    return asked


def test_no_request_breaks_it(fuzzed, idle):
    assert ask_everything(fuzzed, idle, 4) > 50


@pytest.mark.slow
def test_no_request_breaks_it_long(fuzzed, idle):
    print(ask_everything(fuzzed, idle, 200), "requests")
