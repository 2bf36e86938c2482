"""What launchers tell a rank, which connections rank 0 accepts, and what ranks send each other."""

from __future__ import annotations

import json
import socket
import threading
import time
from dataclasses import replace
from queue import SimpleQueue

import pytest
from rank_sockets import connect

from mlx_gptoss.backends.base import Row
from mlx_gptoss.errors import GptOssError
from mlx_gptoss.loading.distributed import _require_same
from mlx_gptoss.ranks import Follower, Leader, find_launch, leader, neighbours, wire
from mlx_gptoss.ranks.launch import SECRET_FILE_VARIABLE, SECRET_VARIABLE
from mlx_gptoss.ranks.neighbours import Neighbours
from mlx_gptoss.ranks.runner import PART_LENGTH, GroupRunner
from mlx_gptoss.ranks.wire import Channel, ConnectionLost, bytes_from_json, bytes_to_json, row_from_json, row_to_json
from mlx_gptoss.sampling import Sampling

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "29500"}
SECRET = {SECRET_VARIABLE: "sixteen letters."}
TORCHRUN |= SECRET


def hostfile(tmp_path, *hosts):
    path = tmp_path / "hosts.json"
    path.write_text(json.dumps(hosts))
    return {"MLX_HOSTFILE": str(path)}


def test_mlx_launch(tmp_path):
    files = hostfile(tmp_path, ["10.0.0.7:5000", "10.0.1.7:5001"], ["10.0.0.8:5002"], ["10.0.0.8:5003"])
    found = [find_launch({"MLX_RANK": str(rank), **files, **SECRET}) for rank in range(3)]
    assert [(f.backend, f.rank, f.ranks, f.host, f.port) for f in found] == [
        ("mlx", rank, 3, "10.0.0.7", 5004) for rank in range(3)
    ]
    assert [f.ranks_on_host for f in found] == [1, 2, 2]
    assert len({f.key for f in found}) == 1
    assert find_launch({"MLX_RANK": "0", SECRET_VARIABLE: "another secret of ours", **files}).key != found[0].key


def test_jaccl(tmp_path):
    devices = tmp_path / "devices.json"
    devices.write_text(json.dumps([[None, "rdma_en5"], ["rdma_en5", None]]))
    environment = {"MLX_JACCL_COORDINATOR": "10.0.0.7:5000", "MLX_IBV_DEVICES": str(devices), "MLX_RANK": "1", **SECRET}
    found = find_launch(environment)
    assert (found.backend, found.rank, found.ranks, found.host, found.port) == ("mlx", 1, 2, "10.0.0.7", 5001)


@pytest.mark.parametrize("host", ["10.0.0.7", "mac1.local", "0.0.0.0", "fe80::1", "128.0.0.1"])
def test_a_launch_beyond_the_loopback_needs_a_secret(host, tmp_path):
    launch = {**TORCHRUN, "MASTER_ADDR": host}
    del launch[SECRET_VARIABLE]
    with pytest.raises(GptOssError, match=rf"on {host}, .* secret: set MLX_GPTOSS_SECRET .* or --ranks-secret-file"):
        find_launch(launch)
    with pytest.raises(GptOssError, match="MLX_GPTOSS_SECRET"):
        find_launch({"MLX_RANK": "1", **hostfile(tmp_path, [f"{host}:5000"], ["10.0.0.9:5000"])})
    for secret in ("", "short"):
        with pytest.raises(GptOssError, match=r"MLX_GPTOSS_SECRET is shorter than 16 .* openssl rand -hex 32"):
            find_launch({**launch, SECRET_VARIABLE: secret})
    file = tmp_path / "secret"
    with pytest.raises(GptOssError, match=rf"cannot be read from {file}"):
        find_launch({**launch, SECRET_FILE_VARIABLE: str(file)})
    file.write_text(SECRET[SECRET_VARIABLE] + "\n")
    assert find_launch({**launch, SECRET_FILE_VARIABLE: str(file)}) == find_launch({**launch, **SECRET})
    assert SECRET[SECRET_VARIABLE] not in repr(find_launch({**launch, **SECRET}))


def test_a_launch_on_one_machine_listens_on_the_loopback(tmp_path):
    """And needs no secret, whatever its address."""
    launch = {**TORCHRUN, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "box.local"}
    del launch[SECRET_VARIABLE]
    assert find_launch(launch).host == "127.0.0.1"
    found = find_launch({"MLX_RANK": "1", **hostfile(tmp_path, ["10.0.0.7:5000"], ["10.0.0.7:5001"])})
    assert (found.host, found.hosts) == ("127.0.0.1", ("127.0.0.1", "127.0.0.1"))
    for host in ("127.0.0.1", "localhost", "::1", "127.8.0.1"):
        assert find_launch({**launch, "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": host}).host == host


def test_torchrun():
    found = find_launch(TORCHRUN)
    assert (found.backend, found.rank, found.ranks, found.host, found.port) == ("cuda", 1, 2, "10.0.0.7", 29501)


@pytest.mark.parametrize(
    "environment",
    [{}, {"RANK": "0"}, {**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1"}, {"MLX_RANK": "0", "MLX_HOSTFILE": ""}],
)
def test_a_process_that_no_launcher_started(environment):
    assert find_launch(environment) is None


@pytest.mark.parametrize("text", ["", "{", '{"a": 1}', '[["10.0.0.7"], ["10.0.0.8:1"]]'])
def test_malformed_hostfiles(tmp_path, text):
    path = tmp_path / "hosts.json"
    path.write_text(text)
    if not text:
        assert find_launch({"MLX_RANK": "0", "MLX_HOSTFILE": str(path)}) is None
        return
    with pytest.raises(GptOssError, match="ranks with mlx"):
        find_launch({"MLX_RANK": "0", "MLX_HOSTFILE": str(path)})


def test_a_rank_that_does_not_connect(launches, monkeypatch):
    monkeypatch.setattr(leader, "JOIN_TIMEOUT_S", 0.05)
    with pytest.raises(GptOssError, match="rank 1 did not connect to"):
        Leader(launches[0])
    with pytest.raises(GptOssError, match="rank 1 did not connect to"):  # and not "cannot listen": the port was freed
        Leader(launches[0])


def test_an_error_on_a_rank_is_raised_on_rank_0(launches):
    def prepare(options):
        raise GptOssError(f"{options} cannot be loaded here")

    def follow():
        Follower(launches[1]).run(prepare)

    thread = threading.Thread(target=follow)
    thread.start()
    first = Leader(launches[0])
    with pytest.raises(GptOssError, match="rank 1: this model cannot be loaded here"):
        first.exchange_options("this model")
    first.close()
    thread.join(60)
    assert not thread.is_alive()


def test_heartbeats(monkeypatch):
    """Heartbeats keep a channel open until a late message; a channel without them is lost."""
    monkeypatch.setattr(wire, "HEARTBEAT_S", 0.05)
    one, other = pair()
    other.start_heartbeats(lambda lost: None)
    threading.Timer(2.5, lambda: other.send("message")).start()
    one.heartbeat_timeout_s, other.heartbeat_timeout_s = 2.0, 0.05
    assert one.receive() == "message"
    with pytest.raises(ConnectionLost, match="no heartbeat"):
        other.receive()
    one.close()
    other.close()


def test_neighbours_notice_when_they_lose_each_other(launches, monkeypatch):
    """Ranks 1 to 3 exchange heartbeats; when these stop, each reports its neighbours as lost."""
    launches = [replace(launches[0], rank=rank, ranks=4) for rank in range(4)]
    monkeypatch.setattr(wire, "HEARTBEAT_S", 0.05)
    monkeypatch.setattr(neighbours, "HEARTBEAT_TIMEOUT_S", 2.0)
    ranks, lost = {rank: Neighbours(launches[rank], "127.0.0.1") for rank in (1, 2, 3)}, SimpleQueue()
    assert ranks[1].port == 0
    next_address = {rank: ("127.0.0.1", ranks[rank + 1].port) for rank in (1, 2)}
    stranger = connect(ranks[2].port)
    stranger.sendall(b"{}\n")

    def connect_neighbours(rank):
        ranks[rank].connect(next_address.get(rank), lambda other, error: lost.put((rank, other, str(error))))

    threads = [threading.Thread(target=connect_neighbours, args=[rank]) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert json.loads(stranger.makefile().readline())["mlx-gptoss"] and stranger.recv(1) == b""
    stranger.close()
    for rank in ranks.values():
        rank.all_loaded()
    time.sleep(2.5)
    assert lost.empty()
    monkeypatch.setattr(Channel, "_write", lambda self, data: None)  # nothing is sent any more
    silence = "sent no heartbeat for 2 seconds"
    assert sorted(lost.get(timeout=60) for _ in range(4)) == [
        (rank, other, silence) for rank, other in [(1, 2), (2, 1), (2, 3), (3, 2)]
    ]
    for rank in ranks.values():
        rank.close()


def pair():
    """Both ends of a connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        mine = socket.create_connection(server.getsockname())
        return Channel(mine), Channel(server.accept()[0])


def test_rows_survive_json():
    sampling = Sampling(temperature=0.5, logit_bias={3: 1.5}, seed=2**64 - 1, stop=("a",), logprobs=2)
    for row in (
        Row(0, 5, None),
        Row(1, 0, (1, 2, 3), sampling, (1, 2, 3), (4, 5), bytes(range(256))),
    ):
        assert row_from_json(json.loads(json.dumps(row_to_json(row)))) == row


class RecordingRunner:
    """A runner that records what it is called with."""

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

    def release(self, slot):
        pass


class OtherRanks:
    """Two other ranks, which record their messages and pack a text with the number of the snapshot."""

    def __init__(self):
        self.broadcasts, self.scattered, self.damaged = [], [], set()

    def broadcast(self, *messages):
        self.broadcasts += messages

    def scatter(self, messages):
        self.scattered += messages

    count = 2

    def gather(self):
        if self.scattered:
            return [rank not in self.damaged for rank in (1, 2)]
        return [bytes_to_json(f"rank {rank}'s {self.broadcasts[-1][1]}".encode()) for rank in (1, 2)]


def test_every_rank_gets_the_seed_and_the_snapshots_to_drop():
    local, others = RecordingRunner(), OtherRanks()
    runner, sent = GroupRunner(local, others, kv_ratio=1.5), others.broadcasts
    runner.submit([Row(0, 0, (1,), Sampling(), (1,)), Row(1, 0, (2,), Sampling(seed=5), (2,)), Row(2, 3, None)])
    first, second, third = local.rows[0]
    assert first.sampling.seed is not None and (second.sampling.seed, third.sampling) == (5, None)
    assert sent == [["submit", [row_to_json(row) for row in local.rows[0]]]]
    kept, dropped = runner.save(0, 0, 10), runner.save(0, 10, 20)
    assert (kept.start, kept.end, kept.nbytes) == (0, 10, 150)
    sent.clear()
    del dropped
    runner.restore(1, [kept])
    assert sent == [["drop", [1]], ["restore", 1, [0]]] and local.restored == [kept.local]


def test_a_packed_snapshot_has_every_ranks_part():
    others = OtherRanks()
    runner = GroupRunner(RecordingRunner(), others, kv_ratio=1)
    runner.save(0, 0, 10)
    data = runner.pack(runner.save(0, 10, 20))
    assert others.broadcasts[-1] == ["pack", 1]
    again = runner.unpack(10, 20, data)
    assert (again.start, again.end) == (10, 20)
    parts = [
        [(name, start, end, bytes_from_json(part)) for name, start, end, _, part in messages]
        for messages in others.scattered
    ]
    assert parts == [[("unpack", 10, 20, f"rank {rank}'s 1".encode())] for rank in (1, 2)]
    runner.restore(1, [again])
    assert others.broadcasts[-1] == ["restore", 1, [others.scattered[0][0][3]]]
    others.scattered.clear()
    too_long = PART_LENGTH.pack(2**64 - 1)
    for damaged in (data[:-1], data[:9], data + b"x", too_long, data[:8] + too_long):
        with pytest.raises(ValueError, match="truncated"):
            runner.unpack(10, 20, damaged)
    for damaged in (b"", data[:8], data + PART_LENGTH.pack(0), bytes(800)):
        with pytest.raises(ValueError, match=r"the parts of \d+ ranks, not 3"):
            runner.unpack(10, 20, damaged)
    assert not others.scattered  # nothing was sent for one of them
    others.damaged = {2}
    with pytest.raises(ValueError, match="rank 2 cannot use its part"):
        runner.unpack(10, 20, data)
    number = others.scattered[0][0][3]
    runner.release(0)
    assert others.broadcasts[-2:] == [["drop", [number]], ["release", 0]]


def test_ranks_that_would_compute_differently_are_rejected():
    summary = {"versions": [["mlx-gptoss", "1"], ["mlx", "2"]], "checkpoint": "abc", "dtype": "float32", "adapters": []}
    _require_same(1, summary, dict(summary))
    for key, value, words in (
        (
            "versions",
            [["mlx-gptoss", "1"], ["mlx", "3"]],
            "rank 1 runs mlx-gptoss 1, mlx 3, rank 0 runs mlx-gptoss 1, mlx 2",
        ),
        ("checkpoint", "abd", "another checkpoint"),
        ("dtype", "bfloat16", "computes in bfloat16"),
        ("adapters", ["0a"], "rank 1 has other adapters"),
    ):
        with pytest.raises(GptOssError, match=words):
            _require_same(1, summary, summary | {key: value})
