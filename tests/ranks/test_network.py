"""Ranks on separate hosts, with a network between them that is slow, loses packets, or is cut."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

import mlx_gptoss
from mlx_gptoss import Sampling

CLI = ["-m", "mlx_gptoss_cli"]
PROMPT, TOKENS = "What is 12 + 30?", 8
SLOW = {"delay_s": 0.005, "loss": 0.01}
POST = """
import sys, urllib.request
request = urllib.request.Request(sys.argv[1], sys.argv[2].encode(), {"Content-Type": "application/json"})
for line in urllib.request.urlopen(request, timeout=60):
    print(line.decode(), end="", flush=True)
"""


def serve(start, count, network):
    """Start ranks with a server. Returns them and post(), which sends a request from rank 0's host.

    post() returns a process whose stdout is the body of the answer.
    """
    ranks = start(count, *CLI, "serve", "--port", "0", "--max-context", "1024", "--slots", "1", network=network)
    at = next(filter(None, (re.search(r"at (http://\S+:\d+),", line) for line in ranks[0].stderr)))[1]
    ranks[0].stderr.readline()  # the example request

    def post(path, **body):
        command = [*network.command_prefix(0), sys.executable, "-c", POST, at + path, json.dumps(body)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    return ranks, post


@pytest.mark.parametrize(
    ("launcher", "backend", "count"), [("ring", "mlx", 2), ("ring", "mlx", 3), ("torchrun", "cuda", 2)]
)
def test_greedy_text_equals_that_of_one_process(request, slow_network, launcher, backend, count):
    network, start = slow_network(count, **SLOW), request.getfixturevalue(launcher)
    command = ["generate", PROMPT, "--temperature", "0", "--max-tokens", str(TOKENS), "--json"]
    (code, out, err), *others = start(count, *CLI, *command, network=network).end()
    assert code == 0 and all(other[:2] == (0, "") for other in others), (
        err,
        others,
    )  # torch warns about host names on stderr
    with mlx_gptoss.load(backend=backend, device="cpu") as alone:
        expected = alone.generate(PROMPT, sampling=Sampling(temperature=0), max_tokens=TOKENS)
    found = json.loads(out)
    assert (found["text"], found["reasoning"]) == (
        expected.text,
        expected.reasoning,
    ) and expected.text + expected.reasoning
    count = network.count()
    assert count.arrived > 500 and count.lost > 0 and count.mean_delay_s >= SLOW["delay_s"], count


def test_a_server_answers_over_a_slow_network(ring, slow_network):
    _, post = serve(ring, 2, slow_network(2, **SLOW))
    messages = [{"role": "user", "content": PROMPT}]
    answers = []
    for _ in range(2):
        with post("/v1/chat/completions", messages=messages, temperature=0, max_tokens=TOKENS) as client:
            answers.append(json.loads(client.stdout.read()))
    assert answers[0]["choices"] == answers[1]["choices"] and answers[0]["usage"]["completion_tokens"] > 1


def cut_during_a_request(start, network, *paths):
    """Cut links between three ranks during a request. Returns rank 0's error, once all have ended."""
    ranks, post = serve(start, 3, network)
    endless = {"max_tokens": 1000, "temperature": 1.5, "logit_bias": {"339": -100, "340": -100}}
    with post("/v1/completions", prompt="abc", stream=True, **endless) as client:
        client.stdout.readline()
        network.cut(*paths)
        try:
            assert [process.wait(120) for process in ranks.processes] == [1, 1, 1]
        finally:
            client.kill()
    (error,) = re.findall("error: .*", ranks[0].stderr.read())
    return error


LAUNCHERS = ["ring", pytest.param("torchrun", marks=pytest.mark.slow)]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_links_of_one_rank_are_cut(request, slow_network, launcher):
    """No connection is closed: the ranks notice only that heartbeats stop."""
    error = cut_during_a_request(request.getfixturevalue(launcher), slow_network(3), (1, 0), (1, 2))
    assert error == "error: rank 1 sent no heartbeat for 8 seconds; all ranks have stopped, start them again"


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_link_between_two_followers_is_cut(request, slow_network, launcher):
    """Both still reach rank 0 and report it."""
    error = cut_during_a_request(request.getfixturevalue(launcher), slow_network(3), (1, 2))
    assert re.fullmatch(r"error: rank [12] failed: its neighbour rank [12] sent no heartbeat for 8 seconds; .*", error)
