"""The soak in its ten-minute form; and that it sees what it is there to see."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from soak import Soak
from soak_client import Connection
from soak_dialects import Said, StreamError, ask, completions, is_beginning, new_word, read_event, spelled
from soak_judges import judge_gaps, judge_growth
from soak_probes import anonymous_bytes
from soak_scenarios import GENERATING, SCENARIOS

SCRIPT = Path(__file__).with_name("soak.py")
MAPS_AND_ALLOCATES = """
import mmap, sys
print("started", flush=True), input()
with open(sys.argv[1], "rb") as file:
    file_pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
assert not any(file_pages[::4096])
print("mapped", flush=True), input()
held = b"x" * len(file_pages)
print("allocated", flush=True), input()
"""


@pytest.mark.slow
def test_ten_minutes(tmp_path):
    words = [sys.executable, str(SCRIPT), "--minutes", "10", "--report", str(tmp_path / "report.json")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert not report["failures"] and report["conversations_checked"]


async def prepared(server) -> Soak:
    """A soak of the server of the other tests, which runs one model."""
    connection = Connection(server.port)
    body = {"messages": [{"role": "user", "content": "Reverse the word WORD."}], "reasoning_effort": "low"}
    template = json.loads(await connection.request("POST", "/apply-template", body))["prompt"]
    connection.close()
    return Soak(server.port, 0, ["mlx-gptoss-nano", "another"], completions(template), 1)


@pytest.mark.parametrize("stream", [False, True])
def test_every_dialect_says_the_word_of_its_own_conversation(server, stream):
    async def run() -> None:
        soak = await prepared(server)
        connection, r = Connection(server.port), random.Random(1)
        for dialect in (*GENERATING, soak.completions):
            for tokens in (6, 100):
                body = {**dialect.body("planet", tokens), "stream": stream, "model": soak.models[0]}
                said = await ask(connection, dialect, body)
                assert said is not None and is_beginning(said, spelled("planet"))
                assert not is_beginning(said, spelled(new_word(r)))
                if tokens == 100:
                    assert said.answer == "tenalp"
                else:
                    assert said.reasoning.startswith("1p") or ("tenalp".startswith(said.answer) and said.answer)
        connection.close()

    asyncio.run(run())


@pytest.mark.parametrize("scenario", [scenario for scenario, _ in SCENARIOS], ids=lambda scenario: scenario.__name__)
def test_each_scenario_runs_without_a_failure(server, idle, scenario):
    async def run() -> Soak:
        soak = await prepared(server)
        connection, r = Connection(server.port), random.Random(2)
        for _ in range(3):
            assert await scenario(soak, connection, r)
        connection.close()
        return soak

    soak = asyncio.run(run())
    assert not soak.failures
    assert idle(server)


def test_a_text_of_another_conversation_is_seen(server):
    async def run() -> Soak:
        soak = await prepared(server)
        dialect = GENERATING[0]
        body = {**dialect.body("planet", 100), "stream": False, "model": soak.models[0]}
        soak.compare(dialect, body, "planet", spelled("planet"))
        assert not soak.suspects
        soak.compare(dialect, body, "planet", spelled("window"))
        assert await soak.ask_again() == 1
        return soak

    (failure,) = asyncio.run(run()).failures
    assert "wodniw" in failure and "tenalp" in failure


def test_beginnings():
    word = spelled("planet")
    for said in (Said(), Said("1p 2l"), Said("1p 2"), word, Said("", "ten"), Said(word.reasoning, "t")):
        assert is_beginning(said, word)
    for said in (Said("1p 2x"), Said("1p", "t"), Said("", "tea"), Said(word.reasoning + " 1p"), Said("", "tenalpx")):
        assert not is_beginning(said, word)


def test_an_error_in_a_stream_is_seen():
    assert (
        read_event(b"") is None and read_event(b"event: message_stop") is None and read_event(b"data: [DONE]") is None
    )
    assert read_event(b'data: {"type": "response.completed", "error": null}')
    for line in (b'data: {"error": {"code": "x"}}', b'{"error": "x"}', b'data: {"type": "response.failed"}'):
        with pytest.raises(StreamError):
            read_event(line)


def some_soak(**samples: list[int]) -> Soak:
    soak = Soak(0, 0, ["a", "b"], completions(""), 1)
    steady = {"rss": [100] * 12, "anonymous": [100] * 12, "descriptors": [9] * 12, "threads": [5] * 12} | samples
    soak.samples = [{"server": {name: values[point] for name, values in steady.items()}} for point in range(12)]
    return soak


def test_growth_is_seen():
    steady = some_soak(rss=[50, 90, 110, *[100, 104] * 4, 100], threads=[4, 9, *[12] * 4, *[30] * 6])  # its pool fills
    judge_growth(steady)
    assert not steady.failures
    for name, values in {
        "rss": [*range(100, 112)],
        "anonymous": [*[100] * 11, 120],
        "descriptors": [*range(9, 21)],
        "threads": [*[50] * 9, 53, 53, 53],
    }.items():
        grown = some_soak(**{name: values})
        judge_growth(grown)
        assert any(name in failure for failure in grown.failures)
    lost = some_soak()
    lost.samples[-1]["process 1"] = lost.samples[-1]["server"]
    judge_growth(lost)
    assert any("processes" in failure for failure in lost.failures)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the soak reads memory from /proc")
def test_memory_that_a_file_backs_is_not_anonymous(tmp_path):
    """Whatever else has that file mapped. In a process of its own: this one's heap may have room for all of it."""
    (tmp_path / "library").write_bytes(bytes(64 << 20))
    words = [sys.executable, "-c", MAPS_AND_ALLOCATES, str(tmp_path / "library")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        found = []
        for step in ("started", "mapped", "allocated"):
            assert child.stdout.readline() == step + "\n"
            found.append(anonymous_bytes(child.pid))
            child.stdin.write("\n")
            child.stdin.flush()
    started, mapped, allocated = found
    assert mapped - started < 8 << 20
    assert 56 << 20 < allocated - mapped < 72 << 20


def test_a_stall_is_seen_and_a_busy_machine_is_none(tmp_path):
    def written(probe: str, *gaps: dict[str, float]) -> None:
        totals = {"count": 9, "longest": max((gap["seconds"] for gap in gaps), default=0.0), "failures": []}
        (tmp_path / probe).write_text("\n".join(json.dumps({"probe": probe, **line}) for line in (*gaps, totals)))

    written("sleep", {"at": 50.0, "seconds": 0.9, "waited": 0.9})
    written("stream")
    excused = {"at": 10.0, "seconds": 0.9, "waited": 0.6}, {"at": 49.8, "seconds": 1.2, "waited": 0.0}
    written("health", *excused)
    soak = some_soak()
    report = judge_gaps(tmp_path, soak)
    assert not soak.failures and report["health"]["longest_s"] == 1.2
    written("health", *excused, {"at": 20.0, "seconds": 0.8, "waited": 0.2})
    judge_gaps(tmp_path, soak)
    assert len(soak.failures) == 1 and "'at': 20.0" in soak.failures[0]
