"""Ranks on hosts of their own, with a network between them that is slow, loses packets, and is cut."""

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
    """Ranks with a server, and what posts to it from rank 0's host: a process whose stdout is the answer's body."""
    ranks = start(count, *CLI, "serve", "--port", "0", "--max-context", "1024", "--slots", "1", network=network)
    at = next(filter(None, (re.search(r"at (http://\S+:\d+),", line) for line in ranks[0].stderr)))[1]
    ranks[0].stderr.readline()  # an example

    def post(path, **body):
        command = [*network.inside(0), sys.executable, "-c", POST, at + path, json.dumps(body)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    return ranks, post


@pytest.mark.parametrize(
    ("launcher", "backend", "count"), [("ring", "mlx", 2), ("ring", "mlx", 3), ("torchrun", "cuda", 2)]
)
def test_greedy_text_is_that_of_one_process(request, slow_network, launcher, backend, count):
    network, start = slow_network(count, **SLOW), request.getfixturevalue(launcher)
    command = ["generate", PROMPT, "--temperature", "0", "--max-tokens", str(TOKENS), "--json"]
    (code, out, err), *others = start(count, *CLI, *command, network=network).end()
    assert code == 0 and all(other[:2] == (0, "") for other in others), (err, others)  # on stderr torch misses names
    with mlx_gptoss.load(backend=backend, device="cpu") as alone:
        wanted = alone.generate(PROMPT, sampling=Sampling(temperature=0), max_tokens=TOKENS)
    found = json.loads(out)
    assert (found["text"], found["reasoning"]) == (wanted.text, wanted.reasoning) and wanted.text + wanted.reasoning
    count = network.count()
    assert count.arrived > 500 and count.lost > 0 and count.taken_s >= SLOW["delay_s"], count


def test_a_server_answers(ring, slow_network):
    _, post = serve(ring, 2, slow_network(2, **SLOW))
    messages = [{"role": "user", "content": PROMPT}]
    answers = []
    for _ in range(2):
        with post("/v1/chat/completions", messages=messages, temperature=0, max_tokens=TOKENS) as client:
            answers.append(json.loads(client.stdout.read()))
    assert answers[0]["choices"] == answers[1]["choices"] and answers[0]["usage"]["completion_tokens"] > 1


def cut_amid_a_request(start, network, *paths):
    """Cut what connects three ranks. What rank 0 has said when all have ended."""
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
def test_a_rank_whose_link_is_cut(request, slow_network, launcher):
    """Nobody is told: all ranks have only the silence to go by."""
    error = cut_amid_a_request(request.getfixturevalue(launcher), slow_network(3), (1, 0), (1, 2))
    assert error == "error: rank 1 has given no sign of life for 8 seconds; all ranks have ended, start them again"


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_cut_between_two_followers(request, slow_network, launcher):
    """Both still reach rank 0, which hears it from them."""
    error = cut_amid_a_request(request.getfixturevalue(launcher), slow_network(3), (1, 2))
    assert re.fullmatch(r"error: rank [12] failed: for it rank [12] has given no sign of life for 8 seconds; .*", error)
