"""Connections to rank 0's port that are no ranks: they can neither end it nor delay it, and the secret stays secret."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from rank_sockets import SECRET, connect

from mlx_gptoss.errors import GptOssError
from mlx_gptoss.ranks import Follower, Leader, follower, handshake
from mlx_gptoss.ranks.handshake import MAX_LINE_BYTES, MAX_WAITING, PROTOCOL, Reception, introduce
from mlx_gptoss.ranks.launch import Launch

CLI = ["-m", "mlx_gptoss_cli"]
HELLO = {"mlx-gptoss": PROTOCOL, "challenge": "00" * 32, "rank": 1, "port": 0}
GARBAGE = [
    b'{"token":"\\ud800"}\n',
    b'{"token": "guess", "rank": 1, "port": 1}\n',
    json.dumps({**HELLO, "proof": "\ud800"}).encode() + b"\n",
    json.dumps({**HELLO, "proof": "00" * 32}).encode() + b"\n",
    *(json.dumps({**HELLO, "proof": proof}).encode() + b"\n" for proof in (None, 7, [], {}, True, "")),
    *(
        json.dumps({**HELLO, "proof": "0", "rank": rank}).encode() + b"\n"
        for rank in (0, 2, -1, 10**400, 1.0, True, "1")
    ),
    *(json.dumps({**HELLO, "proof": "0", "port": port}).encode() + b"\n" for port in (-1, 1 << 16, 10**400, None, "1")),
    *(json.dumps({**HELLO, "proof": "0", "challenge": one}).encode() + b"\n" for one in (None, 7, [], "\ud800", "")),
    *(json.dumps({**HELLO, "proof": "0", "mlx-gptoss": one}).encode() + b"\n" for one in (1, 3, 10**400, None, "2")),
    b'{"mlx-gptoss": 1e999, "rank": NaN}\n',
    b"[]\n",
    b"7\n",
    b"null\n",
    b"\n",
    b"\n\n\n\n",
    b"[" * 900 + b"\n",
    b'{"a":' * 180 + b"\n",
    b"{" + b"9" * 998 + b"\n",
    b'{"rank": ' + b"9" * 900 + b"}\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    bytes(range(256)) * 4,
    b"\xff" * 5000,
    b"\0" * 5000,
    b"x" * MAX_LINE_BYTES,
    b"x" * (1 << 20),
    json.dumps(HELLO).encode(),  # half a frame
    json.dumps(HELLO).encode()[:20],
]


@contextlib.contextmanager
def leading(launch: Launch) -> Iterator[list[Leader]]:
    """A Leader that accepts ranks on a thread; the list has it once all have connected."""
    leaders: list[Leader] = []
    thread = threading.Thread(target=lambda: leaders.append(Leader(launch)), daemon=True)
    thread.start()
    connect(launch.port).close()
    yield leaders
    thread.join(60)
    assert leaders, "rank 0 does not start"
    leaders[0].close()


def join(launch: Launch) -> float:
    """Connect as a rank. Returns how many seconds it took."""
    started = time.monotonic()
    channel, neighbours = follower._join(launch)
    taken = time.monotonic() - started
    channel.close()
    neighbours.close()
    return taken


def replies(port: int, data: bytes) -> list[dict[str, object]]:
    """What rank 0 sends to a connection that sends `data`, until it closes it."""
    with connect(port) as stranger:
        lines = stranger.makefile("rb")
        found = [json.loads(lines.readline())]
        with contextlib.suppress(OSError):  # rank 0 has closed it already
            stranger.sendall(data)
            stranger.shutdown(socket.SHUT_WR)
            found += [json.loads(line) for line in lines]
    return found


def test_garbage(launches):
    """Each is disconnected, and gets no proof; the rank connects after them."""
    with leading(launches[0]) as leaders:
        for data in GARBAGE:
            greeting, *rest = replies(launches[0].port, data)
            assert set(greeting) == {"mlx-gptoss", "challenge"} and all(set(reply) == {"error"} for reply in rest)
        assert not leaders
        assert join(launches[1]) < 30


def test_random_garbage(launches):
    rng = random.Random(3)
    with leading(launches[0]) as leaders:
        for _ in range(300):
            data = rng.choice(GARBAGE) if rng.random() < 0.7 else rng.randbytes(rng.randrange(1, 2000))
            data = bytearray(data)
            for _ in range(rng.randrange(5)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            with connect(launches[0].port) as stranger, contextlib.suppress(ConnectionError):
                stranger.sendall(data[: rng.randrange(len(data) + 1)])
        assert not leaders
        join(launches[1])


@pytest.mark.parametrize("count", [30, 300])
@pytest.mark.parametrize("says", [b"", b"{", b'{"mlx-gptoss": 2, '], ids=["silent", "one byte", "half a hello"])
def test_connections_that_wait(launches, count, says):
    """They stay open, and rank 0 keeps at most MAX_WAITING of them. The rank is not kept waiting for their deadline."""
    with leading(launches[0]), contextlib.ExitStack() as stack:
        strangers = [stack.enter_context(connect(launches[0].port)) for _ in range(count)]
        for stranger in strangers:
            with contextlib.suppress(ConnectionError):  # it was among the oldest
                stranger.sendall(says)
        assert join(launches[1]) < handshake.HELLO_TIMEOUT_S / 2
        assert sum(is_open(stranger) for stranger in strangers) == 0


def test_the_number_of_waiting_connections_and_their_time_are_bounded(launches, monkeypatch):
    monkeypatch.setattr(handshake, "HELLO_TIMEOUT_S", 1.0)
    with leading(launches[0]), contextlib.ExitStack() as stack:
        strangers = [stack.enter_context(connect(launches[0].port)) for _ in range(MAX_WAITING + 40)]
        for stranger in strangers[-MAX_WAITING:]:
            assert json.loads(stranger.makefile().readline())["mlx-gptoss"] == PROTOCOL
        assert not any(is_open(stranger) for stranger in strangers[:40])
        started = time.monotonic()
        for stranger in strangers[-MAX_WAITING:]:
            stranger.settimeout(30)
            assert stranger.recv(1) == b""
        assert time.monotonic() - started < 20
        join(launches[1])


def is_open(connection: socket.socket) -> bool:
    """Whether the other side has not closed it. Reads what has arrived."""
    connection.settimeout(0.2)
    with contextlib.suppress(ConnectionError):
        while True:
            try:
                if not connection.recv(4096):
                    return False
            except TimeoutError:
                return True
    return False


def test_strangers_that_keep_coming(launches):
    """From eight threads, with and without garbage."""
    stop = threading.Event()

    def flood(number: int) -> int:
        rng, count = random.Random(number), 0
        while not stop.is_set():
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", launches[0].port)) as stranger:
                stranger.sendall(rng.choice(GARBAGE))
                count += 1
        return count

    with leading(launches[0]) as leaders, ThreadPoolExecutor(8) as pool:
        floods = [pool.submit(flood, number) for number in range(8)]
        time.sleep(0.5)
        try:
            assert not leaders
            join(launches[1])
        finally:
            stop.set()
        assert sum(one.result() for one in floods) > 100


def test_a_process_without_descriptors(launches, monkeypatch):
    """accept() fails until the strangers are gone."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with leading(launches[0]), contextlib.ExitStack() as stack:
        strangers = [stack.enter_context(connect(launches[0].port)) for _ in range(10)]
        waiting = [stack.enter_context(socket.socket()) for _ in range(3)]
        used = max(one.fileno() for one in [*strangers, *waiting]) + 1
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (used, hard))
            for one in waiting:
                one.connect(("127.0.0.1", launches[0].port))
            time.sleep(0.3)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        join(launches[1])


def test_a_rank_that_connects_twice(launches):
    """The second process of that number is told so; the first one stays."""
    launches = [replace(launch, ranks=3) for launch in launches]
    with leading(launches[0]) as leaders:
        first, neighbours = follower._join(launches[1])
        with pytest.raises(GptOssError, match="rank 1 was refused: another process has connected under that number"):
            follower._join(launches[1])
        assert not leaders
        join(replace(launches[1], rank=2))
        first.close()
        neighbours.close()


def test_another_secret(launches, monkeypatch):
    """Both sides say what to do: the rank at once, rank 0 when the rank is missing at the end."""
    other = replace(launches[1], key="another key")
    monkeypatch.setattr("mlx_gptoss.ranks.leader.JOIN_TIMEOUT_S", 1.0)
    errors: list[str] = []

    def lead() -> None:
        try:
            Leader(launches[0])
        except GptOssError as error:
            errors.append(str(error))

    thread = threading.Thread(target=lead)
    thread.start()
    with pytest.raises(GptOssError, match=r"rank 1 was refused: .* set the same MLX_GPTOSS_SECRET on all ranks"):
        join(other)
    thread.join(60)
    assert "rank 1 did not connect" in errors[0] and "set the same MLX_GPTOSS_SECRET" in errors[0]


@pytest.mark.parametrize("greeting", [{}, {"challenge": 7}, {"challenge": "00"}, {"mlx-gptoss": 3}])
def test_a_rank_0_that_does_not_know_the_secret(launches, greeting):
    """What is sent to it, the key cannot be read from, and it is not followed."""
    heard = []
    with socket.create_server(("127.0.0.1", launches[0].port)) as server:

        def pretend() -> None:
            connection, _ = server.accept()
            with connection:
                greet = {"mlx-gptoss": PROTOCOL, "challenge": "11" * 32, **greeting}
                connection.sendall(json.dumps(greet).encode() + b"\n")
                heard.append(connection.makefile().readline())
                with contextlib.suppress(ConnectionError):
                    connection.sendall(json.dumps({"proof": "22" * 32}).encode() + b"\n")

        thread = threading.Thread(target=pretend)
        thread.start()
        connection = socket.create_connection(server.getsockname())
        with connection, pytest.raises((GptOssError, handshake.BadGreeting)):
            introduce(connection, launches[1], 0, time.monotonic() + 10)
        thread.join(60)
    assert launches[1].key not in heard[0]


def test_what_was_overheard_cannot_be_used_again(launches):
    """A proof holds for one challenge, and for one side."""
    server = socket.create_server(("127.0.0.1", 0))
    with ThreadPoolExecutor(1) as pool, Reception(server, launches[0]) as reception:
        arrived = pool.submit(reception.next_rank, {1}, time.monotonic() + 60)
        with socket.create_connection(server.getsockname()) as real:
            greeting = json.loads(real.makefile().readline())
            hello = {**HELLO, "challenge": "ab" * 32}
            hello["proof"] = handshake._proof(launches[1], "connecting", greeting["challenge"], hello)
            real.sendall(json.dumps(hello).encode() + b"\n")
            reply = json.loads(real.makefile().readline())
            assert reply == {"proof": handshake._proof(launches[0], "listening", greeting["challenge"], hello)}
        assert arrived.result(60).rank == 1
        again = pool.submit(reception.next_rank, {1}, time.monotonic() + 2)
        for proof in (hello["proof"], reply["proof"]):
            with socket.create_connection(server.getsockname()) as thief:
                lines = thief.makefile()
                assert json.loads(lines.readline())["challenge"] != greeting["challenge"]
                thief.sendall(json.dumps({**hello, "proof": proof}).encode() + b"\n")
                assert json.loads(lines.readline()) == {"error": "secret"}
        with pytest.raises(TimeoutError):
            again.result(60)


def test_a_port_where_something_else_listens(launches, monkeypatch):
    """The rank goes on trying, and says in the end what it met."""
    monkeypatch.setattr(follower, "JOIN_TIMEOUT_S", 1.0)
    with socket.create_server(("127.0.0.1", launches[0].port)) as server:

        def answer() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    with connection:
                        connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(GptOssError, match=r"rank 1 cannot reach rank 0 .*does not greet as a rank"):
            Follower(launches[1])


@pytest.mark.parametrize("count", [30, pytest.param(300, marks=pytest.mark.slow)])
def test_processes_among_strangers(ring, count):
    """Two real ranks answer while silent connections and garbage are on rank 0's port."""
    ranks = ring(2, *CLI, "generate", "What is 12 + 30?", "--temperature", "0", "--max-tokens", "8", "--json")
    strangers: list[socket.socket] = []
    with contextlib.ExitStack() as stack:
        while len(strangers) < count:  # until rank 0 listens no longer
            try:
                strangers.append(stack.enter_context(socket.create_connection(("127.0.0.1", ranks.port), timeout=60)))
                if len(strangers) % 3 == 0:
                    strangers[-1].sendall(random.Random(len(strangers)).choice(GARBAGE))
            except (ConnectionError, TimeoutError):
                if strangers or any(process.poll() is not None for process in ranks.processes):
                    break
        (code, out, err), other = ranks.end(120)
    assert (code, other[:2]) == (0, (0, "")), err + other[2]
    assert json.loads(out)["usage"]["completion_tokens"] > 0 and strangers


def test_processes_with_another_secret(ring, tmp_path):
    """--ranks-secret-file, read by every rank; rank 1's differs."""
    files = [tmp_path / str(rank) for rank in range(2)]
    for rank, file in enumerate(files):
        file.write_text(f"{SECRET['MLX_GPTOSS_SECRET']} {rank}\n")
    program = "import os, sys; sys.argv[2] += os.environ['MLX_RANK']; from mlx_gptoss_cli.main import main; main()"
    ranks = ring(2, "-c", program, "--ranks-secret-file", f"{tmp_path}{os.sep}", "generate", "abc")
    _, err = ranks[1].communicate(timeout=60)
    assert ranks[1].returncode == 1 and "rank 1 was refused" in err and "MLX_GPTOSS_SECRET" in err
    ranks[0].kill()
    files[1].write_text(files[0].read_text())
    ranks = ring(2, "-c", program, "--ranks-secret-file", f"{tmp_path}{os.sep}", "generate", "abc", "--max-tokens", "2")
    assert [code for code, _, _ in ranks.end(120)] == [0, 0]


def test_processes_without_a_secret_beyond_the_loopback(tmp_path):
    hosts = tmp_path / "hosts.json"
    hosts.write_text(json.dumps([["10.0.0.7:5000"], ["10.0.0.8:5000"]]))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLX_GPTOSS_SECRET")}
    for rank in range(2):
        done = subprocess.run(
            [sys.executable, *CLI, "generate", "abc"],
            env={**environment, "MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("error: rank 0 listens") and "openssl rand -hex 32" in done.stderr
