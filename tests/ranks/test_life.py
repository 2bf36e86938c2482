"""How ranks run and end: a server on two of them, and what happens if one is lost or differs from the other."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket

import httpx
import pytest

CLI = ["-m", "mlx_gptoss_cli"]
SERVE = [*CLI, "serve", "--port", "0", "--max-context", "1024", "--slots", "2"]
ENDLESS = {"prompt": "abc", "max_tokens": 1000, "temperature": 1.5, "logit_bias": {"339": -100, "340": -100}}


def address(ranks) -> str:
    """URL of rank 0's server, once it serves."""
    for line in ranks[0].stderr:
        if found := re.search(r"at (http://\S+:\d+),", line):
            ranks[0].stderr.readline()  # the example request
            client = httpx.Client(transport=httpx.HTTPTransport(retries=5), timeout=60)
            assert client.get(f"{found[1]}/health").status_code == 200
            return found[1]
    raise AssertionError("rank 0 ended before it served")


def exit_code(process, seconds=60.0) -> int:
    return process.wait(timeout=seconds)


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return probe.connect_ex(("127.0.0.1", port)) != 0


def ask(url, content, **options):
    body = {"messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 12, **options}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_server_on_two_ranks_and_a_rank_that_is_killed(ring):
    """It answers, uses the prefix cache, and ends when a rank is killed during a request: the closed connection tells,
    not a missing heartbeat."""
    ranks = ring(2, *SERVE)
    url = address(ranks)
    content = " ".join(["What is 12 + 30?"] * 10)
    first, second = ask(url, content), ask(url, content)
    assert first["choices"] == second["choices"]
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] > 100
    sampled = [ask(url, "Hello", temperature=1.2, seed=seed)["choices"] for seed in (3, 3)]
    assert sampled[0] == sampled[1]
    with httpx.stream("POST", f"{url}/v1/completions", json={**ENDLESS, "stream": True}, timeout=60) as stream:
        next(stream.iter_lines())
        ranks[1].kill()
        assert exit_code(ranks[0]) == 1
    output = ranks[0].stderr.read()  # MLX's ring may have printed a line of its own first
    assert re.findall("error: .*", output) == ["error: rank 1 has ended; all ranks have stopped, start them again"], (
        output
    )
    assert is_free(int(url.rpartition(":")[2])) and is_free(ranks.port) and is_free(ranks.port - 1)


@pytest.mark.parametrize(
    ("command", "code"),
    [(["show"], 0), (["--help"], 0), (["generate", "a", "--nonsense"], 2), (["generate"], 2), (["batch", "a", "b"], 1)],
)
def test_a_command_that_loads_nothing_ends_the_other_ranks(ring, tmp_path, command, code):
    ranks = ring(2, *CLI, *[str(tmp_path / word) if len(word) == 1 else word for word in command])
    (first, _, _), other = ranks.end()
    assert (first, other) == (code, (0, "", ""))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_to_all_ranks_ends_them_cleanly(ring, number, code):
    ranks = ring(2, *SERVE)
    address(ranks)
    for process in reversed(ranks.processes):
        process.send_signal(number)
    assert [exit_code(process) for process in ranks.processes] == [code, 0]
    assert ranks[0].stderr.read().strip() == ranks[1].stdout.read() == ranks[1].stderr.read() == ""


@pytest.mark.slow
def test_a_rank_that_hangs(ring):
    """Its connection stays open, but it sends no heartbeats."""
    ranks = ring(2, *SERVE)
    address(ranks)
    ranks[1].send_signal(signal.SIGSTOP)
    assert exit_code(ranks[0]) == 1
    assert "rank 1 sent no heartbeat for 8 seconds" in ranks[0].stderr.read()


def test_the_other_ranks_end_when_rank_0_is_killed(ring):
    ranks = ring(2, *SERVE)
    address(ranks)
    ranks[0].kill()
    assert exit_code(ranks[1]) == 1
    assert ranks[1].stdout.read() == ""


def test_another_checkpoint_under_the_same_name(ring, mini, tmp_path):
    """Each rank has its own folder; the weights differ in one bit of the last norm."""
    for rank in (0, 1):
        shutil.copytree(mini / "mxfp4", tmp_path / str(rank) / "model")
    change_last_norm(tmp_path / "1" / "model")
    command = "import os, sys; os.chdir(sys.argv.pop(1) + os.environ['MLX_RANK']); "
    command += "from mlx_gptoss_cli.main import main; main()"
    ranks = ring(2, "-c", command, f"{tmp_path}/", "generate", "abc", "--raw", "--model", "model", "--backend", "mlx")
    (code, out, err), (_, others_out, others_err) = ranks.end()
    assert (code, out, others_out, others_err) == (1, "", "", "")
    assert (
        err == "error: rank 1 has another checkpoint than rank 0 under that name; copy the same files to all machines\n"
    )


def change_last_norm(folder):
    """Flip one bit in a checkpoint's last norm."""
    for file in folder.glob("*.safetensors"):
        data = bytearray(file.read_bytes())
        end = 8 + int.from_bytes(data[:8], "little")
        tensor = json.loads(data[8:end]).get("model.norm.weight")
        if tensor is not None:
            data[end + tensor["data_offsets"][0]] ^= 64
            file.write_bytes(data)


def test_the_error_names_the_rank_without_enough_memory(ring, tmp_path):
    """Rank 1 pretends that it has 100 MB."""
    code = "import os, sys; import mlx_gptoss.backends.mlx as mlx; mlx.available_memory = lambda device: "
    code += "(10**8 if os.environ['MLX_RANK'] == '1' else 10**11); from mlx_gptoss_cli.main import main; main()"
    ranks = ring(2, "-c", code, "generate", "abc")
    (code, out, err), _ = ranks.end()
    assert (code, out) == (1, "")
    assert err.startswith("error: rank 1: its share of the bundled model needs ") and "50.0 MB are available" in err


def test_a_backend_that_the_launcher_does_not_start(ring):
    (code, _, err), _ = ring(2, *CLI, "generate", "abc", "--backend", "cuda").end()
    message = "the cuda backend needs ranks started with torchrun: use that, or leave out --backend"
    assert (code, err) == (1, f"error: {message}\n")
