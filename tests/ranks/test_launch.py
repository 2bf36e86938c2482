"""What launchers say to a rank, and who is let in by rank 0."""

from __future__ import annotations

import json
import socket
import threading
import time
from dataclasses import replace
from queue import SimpleQueue

import pytest

from mlx_gptoss.backends.base import Row
from mlx_gptoss.errors import GptOssError
from mlx_gptoss.ranks import Follower, Leader, find_launch, leader, neighbours, wire
from mlx_gptoss.ranks.launch import SECRET, Launch
from mlx_gptoss.ranks.neighbours import Neighbours
from mlx_gptoss.ranks.runner import GroupRunner
from mlx_gptoss.ranks.wire import Channel, Lost, bytes_from_json, row_from_json, row_to_json
from mlx_gptoss.sampling import Sampling
from mlx_gptoss.spread import _compare

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "29500"}


def hostfile(tmp_path, *hosts):
    path = tmp_path / "hosts.json"
    path.write_text(json.dumps(hosts))
    return {"MLX_HOSTFILE": str(path)}


def test_mlx_launch(tmp_path):
    files = hostfile(tmp_path, ["10.0.0.7:5000", "10.0.1.7:5001"], ["10.0.0.8:5002"], ["10.0.0.8:5003"])
    found = [find_launch({"MLX_RANK": str(rank), **files}) for rank in range(3)]
    assert [(f.backend, f.rank, f.ranks, f.host, f.port) for f in found] == [
        ("mlx", rank, 3, "10.0.0.7", 5004) for rank in range(3)
    ]
    assert [f.beside for f in found] == [1, 2, 2]
    assert len({f.token for f in found}) == 1
    assert find_launch({"MLX_RANK": "0", SECRET: "x", **files}).token != found[0].token


def test_jaccl(tmp_path):
    devices = tmp_path / "devices.json"
    devices.write_text(json.dumps([[None, "rdma_en5"], ["rdma_en5", None]]))
    environment = {"MLX_JACCL_COORDINATOR": "10.0.0.7:5000", "MLX_IBV_DEVICES": str(devices), "MLX_RANK": "1"}
    found = find_launch(environment)
    assert (found.backend, found.rank, found.ranks, found.host, found.port) == ("mlx", 1, 2, "10.0.0.7", 5001)


def test_torchrun():
    found = find_launch(TORCHRUN)
    assert (found.backend, found.rank, found.ranks, found.host, found.port) == ("cuda", 1, 2, "10.0.0.7", 29501)


@pytest.mark.parametrize(
    "environment",
    [{}, {"RANK": "0"}, {**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1"}, {"MLX_RANK": "0", "MLX_HOSTFILE": ""}],
)
def test_alone(environment):
    assert find_launch(environment) is None


@pytest.mark.parametrize("text", ["", "{", '{"a": 1}', '[["10.0.0.7"], ["10.0.0.8:1"]]'])
def test_hostfiles_that_are_none(tmp_path, text):
    path = tmp_path / "hosts.json"
    path.write_text(text)
    if not text:
        assert find_launch({"MLX_RANK": "0", "MLX_HOSTFILE": str(path)}) is None
        return
    with pytest.raises(GptOssError, match="ranks by mlx"):
        find_launch({"MLX_RANK": "0", "MLX_HOSTFILE": str(path)})


@pytest.fixture
def launches():
    """Of two ranks, on a port that is free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [Launch("mlx", rank, 2, "127.0.0.1", port, 2, "secret") for rank in range(2)]


def test_strangers_are_hung_up_on(launches):
    """Whoever has no token, or says nothing, or that it is a rank which there is not; the real one comes last."""
    port, met = launches[0].port, []
    thread = threading.Thread(target=lambda: met.append(Leader(launches[0])))
    thread.start()
    for hello in ({"token": "guess", "rank": 1}, {"token": "secret", "rank": 2}, {"token": "secret", "rank": 0}, [], 7):
        assert hung_up(port, json.dumps(hello).encode() + b"\n")
    assert hung_up(port, b"GET / HTTP/1.1\r\n\r\n") and hung_up(port, b"x" * 1000)
    silent = connect(port)
    with connect(port) as real:
        real.sendall(json.dumps({"token": "secret", "rank": 1}).encode() + b"\n")
        thread.join(60)
        assert met and silent.recv(1) == b""
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))
        met[0].close()
    silent.close()


def connect(port):
    until = time.monotonic() + 60
    while time.monotonic() < until:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=60)
        except ConnectionRefusedError:
            time.sleep(0.01)
    raise AssertionError("nobody listens")


def hung_up(port, data):
    with connect(port) as stranger:
        stranger.sendall(data)
        try:
            return stranger.recv(1) == b""
        except ConnectionResetError:
            return True


def test_a_rank_that_does_not_come(launches, monkeypatch):
    monkeypatch.setattr(leader, "JOIN_S", 0.05)
    with pytest.raises(GptOssError, match="rank 1 did not come within"):
        Leader(launches[0])
    with pytest.raises(GptOssError, match="rank 1 did not come within"):  # not: cannot listen, for the port is free
        Leader(launches[0])


def test_an_error_of_a_rank_is_rank_0s(launches):
    def answer(order):
        raise GptOssError(f"{order} cannot be done here")

    def other():
        Follower(launches[1]).follow(answer)

    thread = threading.Thread(target=other)
    thread.start()
    first = Leader(launches[0])
    with pytest.raises(GptOssError, match="rank 1: the order cannot be done here"):
        first.ask("the order")
    first.close()
    thread.join(60)
    assert not thread.is_alive()


def test_signs_of_life(monkeypatch):
    """A channel that is silent for too long is lost; one that beats brings its message later."""
    monkeypatch.setattr(wire, "BEAT_S", 0.05)
    one, other = pair()
    other.beat(lambda lost: None)
    threading.Timer(2.5, lambda: other.send("message")).start()
    one.silence_s, other.silence_s = 2.0, 0.05
    assert one.receive() == "message"
    with pytest.raises(Lost, match="no sign of life"):
        other.receive()
    one.close()
    other.close()


def test_neighbours_that_lose_each_other(launches, monkeypatch):
    """The ranks between which there is no rank 0: as long as each hears from the other they are content."""
    launches = [replace(launches[0], rank=rank, ranks=4) for rank in range(4)]
    monkeypatch.setattr(wire, "BEAT_S", 0.05)
    monkeypatch.setattr(neighbours, "SILENCE_S", 2.0)
    ranks, lost = {rank: Neighbours(launches[rank], "127.0.0.1") for rank in (1, 2, 3)}, SimpleQueue()
    assert ranks[1].port == 0
    behind = {rank: ("127.0.0.1", ranks[rank + 1].port) for rank in (1, 2)}
    stranger = connect(ranks[2].port)
    stranger.sendall(b"{}\n")

    def meet(rank):
        ranks[rank].meet(behind.get(rank), lambda other, gone: lost.put((rank, other, str(gone))))

    threads = [threading.Thread(target=meet, args=[rank]) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert stranger.recv(1) == b""
    stranger.close()
    for rank in ranks.values():
        rank.loaded()
    time.sleep(2.5)
    assert lost.empty()
    monkeypatch.setattr(Channel, "_write", lambda self, data: None)  # nothing comes through any more
    silence = "has given no sign of life for 2 seconds"
    assert sorted(lost.get(timeout=60) for _ in range(4)) == [
        (rank, other, silence) for rank, other in [(1, 2), (2, 1), (2, 3), (3, 2)]
    ]
    for rank in ranks.values():
        rank.close()


def pair():
    with socket.create_server(("127.0.0.1", 0)) as server:
        mine = socket.create_connection(server.getsockname())
        return Channel(mine), Channel(server.accept()[0])


def test_rows_go_through_json():
    sampling = Sampling(temperature=0.5, logit_bias={3: 1.5}, seed=2**64 - 1, stop=("a",), logprobs=2)
    for row in (
        Row(0, 5, None),
        Row(1, 0, (1, 2, 3), sampling, (1, 2, 3), (4, 5), bytes(range(256))),
    ):
        assert row_from_json(json.loads(json.dumps(row_to_json(row)))) == row


class Own:
    """A runner that notes what it is called with."""

    config = limits = None

    def __init__(self):
        self.rows = []

    def submit(self, rows):
        self.rows.append(rows)

    def save(self, slot, start, end):
        return type("Snapshot", (), {"start": start, "end": end, "nbytes": 100})()

    def restore(self, slot, chain):
        self.restored = chain

    def pack(self, snapshot):
        return b""

    def unpack(self, start, end, data):
        assert data == b""
        return self.save(0, start, end)


class Others:
    """Two other ranks, which pack what lies under the number of a snapshot."""

    def __init__(self):
        self.told, self.each = [], []

    def tell(self, *messages):
        self.told += messages

    def tell_each(self, messages):
        self.each += messages

    def packed(self):
        return [f"rank {rank}'s {self.told[-1][1]}".encode() for rank in (1, 2)]


def test_every_rank_is_told_the_seed_and_what_is_dropped():
    own, others = Own(), Others()
    runner, told = GroupRunner(own, others, largest=1.5), others.told
    runner.submit([Row(0, 0, (1,), Sampling(), (1,)), Row(1, 0, (2,), Sampling(seed=5), (2,)), Row(2, 3, None)])
    first, second, third = own.rows[0]
    assert first.sampling.seed is not None and (second.sampling.seed, third.sampling) == (5, None)
    assert told == [["submit", [row_to_json(row) for row in own.rows[0]]]]
    kept, dropped = runner.save(0, 0, 10), runner.save(0, 10, 20)
    assert (kept.start, kept.end, kept.nbytes) == (0, 10, 150)
    told.clear()
    del dropped
    runner.restore(1, [kept])
    assert told == [["drop", [1]], ["restore", 1, [0]]] and own.restored == [kept.own]


def test_a_snapshot_in_a_file_has_every_ranks_part():
    others = Others()
    runner = GroupRunner(Own(), others, largest=1)
    runner.save(0, 0, 10)
    data = runner.pack(runner.save(0, 10, 20))
    assert others.told[-1] == ["pack", 1]
    again = runner.unpack(10, 20, data)
    assert (again.start, again.end) == (10, 20)
    parts = [[(name, start, end, bytes_from_json(part)) for name, start, end, _, part in its] for its in others.each]
    assert parts == [[("unpack", 10, 20, f"rank {rank}'s 1".encode())] for rank in (1, 2)]
    runner.restore(1, [again])
    assert others.told[-1] == ["restore", 1, [others.each[0][0][3]]]
    for cut in (data[:-1], data[:9], data + b"x"):
        with pytest.raises(ValueError, match="cut off"):
            runner.unpack(10, 20, cut)


def test_ranks_that_would_not_compute_the_same():
    said = {"version": [["mlx-gptoss", "1"], ["mlx", "2"]], "checkpoint": "abc", "dtype": "float32"}
    _compare(1, said, dict(said))
    for key, value, words in (
        (
            "version",
            [["mlx-gptoss", "1"], ["mlx", "3"]],
            "rank 1 runs mlx-gptoss 1, mlx 3, and rank 0 mlx-gptoss 1, mlx 2",
        ),
        ("checkpoint", "abd", "another checkpoint"),
        ("dtype", "bfloat16", "computes in bfloat16"),
    ):
        with pytest.raises(GptOssError, match=words):
            _compare(1, said, said | {key: value})
