"""A soak test of the server: `python tests/server/soak.py [--minutes 60] [--requests 200000] [--report FILE]`.

Starts `mlx-gptoss serve` with the bundled model and a copy of it, each in a process of its own, and sends mixed
requests at an even rate: all dialects, streamed or not, tools, schemas, stored responses, clients that leave, clients
that read slowly, long prompts, broken requests, bytes that are not HTTP. Meanwhile the copy is unloaded, loaded and
killed. It fails if

- a request got a 5xx other than 503, took two minutes, or a stream of the first model ended in an error;
- a reply is not the one that its conversation gets when it is asked again alone. Each conversation asks to reverse a
  word of its own, so a text shows whose it is (soak_dialects.py);
- GET /health, asked twenty times a second by a process of its own, or a steady stream had a gap of half a second. Time
  in which the threads on its way were ready to run and had no CPU does not count (soak_probes.py);
- memory, descriptors or threads grew after the first quarter, with full caches. They are taken at quiet points, twelve
  times in all, when every request has ended. glibc is told to return freed memory at once;
- a slot stays in use, a killed model does not come back, or the server does not end with 0 after SIGTERM.

Prints a line every ten seconds and a report at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from soak_client import Connection
from soak_dialects import Dialect, Said, StreamError, ask, completions, is_beginning, spelled
from soak_judges import PROBES, judge_gaps, judge_growth
from soak_probes import anonymous_bytes, descendants
from soak_scenarios import SCENARIOS, Scenario, warm_up

from mlx_gptoss.api import NANO

SLOTS = 8
WORKERS = 24
QUIET_POINTS = 12
LIMIT_S = 120.0  # for one request
RETURN_MEMORY = {"MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_MMAP_THRESHOLD_": "131072"}


@dataclass
class Soak:
    """State shared by the clients. models: the names of the served models; the second one is unloaded and killed."""

    port: int
    pid: int
    models: list[str]
    completions: Dialect
    rate: float
    ended: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    suspects: list[tuple[Dialect, dict[str, Any], Said]] = field(default_factory=list)
    checked: int = 0
    sent: int = 0
    in_flight: int = 0
    behind_s: float = 0.0
    over: bool = False
    started: float = field(default_factory=time.monotonic)  # the clients, without what quiet points took
    seconds: float = 0.0
    cpu_s: float = 0.0
    samples: list[dict[str, dict[str, int]]] = field(default_factory=list)
    open_gate: asyncio.Event = field(default_factory=asyncio.Event)

    def fail(self, what: str) -> None:
        if len(self.failures) < 1000:
            self.failures.append(what[:500])
            print(f"failure: {what[:500]}", file=sys.stderr, flush=True)

    def choose_model(self, r: random.Random) -> str:
        return self.models[0] if r.random() < 0.7 else self.models[-1]

    def may_fail(self, body: Any) -> bool:
        """Whether a request is for the model that is killed."""
        return isinstance(body, dict) and body.get("model") == self.models[1]

    async def asked(self, connection: Connection, dialect: Dialect, body: dict[str, Any]) -> Said | None:
        """What the model says; None for a 503, and for a stream that broke off with the process of its model."""
        try:
            said = await ask(connection, dialect, body)
        except StreamError as error:
            connection.close()
            if self.may_fail(body):
                self.ended["streams broken off by kill -9"] += 1
            else:
                self.fail(f"{dialect.path}: {error}")
            return None
        if said is None and connection.status != 503:
            self.fail(f"{dialect.path} answered {connection.status} to {body}")
        return said

    async def expect(self, connection: Connection, method: str, path: str, body: Any = None) -> Any:
        """The JSON of a response; None for a 503. Any other status is a failure."""
        content = await connection.request(method, path, body)
        if connection.status == 200:
            return json.loads(content)
        if connection.status != 503:
            self.fail(f"{method} {path} answered {connection.status}: {content[:300]!r}")
        return None

    def compare(self, dialect: Dialect, body: dict[str, Any], word: str, said: Said) -> None:
        """Check a reply about a word. One that is not as expected is asked for again at the end."""
        self.checked += 1
        if not is_beginning(said, spelled(word)):
            self.suspects.append((dialect, body, said))

    async def work(self, worker: int, seed: int) -> None:
        """Send requests, one after the other, each when it is due."""
        connection, r = Connection(self.port), random.Random(f"{seed} {worker}")
        scenarios, weights = zip(*SCENARIOS, strict=True)
        while not self.over:
            await self.open_gate.wait()
            due = self.started + self.sent / self.rate
            self.sent += 1
            self.behind_s = time.monotonic() - due
            await asyncio.sleep(max(0.0, -self.behind_s))
            scenario: Scenario = r.choices(scenarios, weights)[0]
            self.in_flight += 1
            try:
                self.ended[await asyncio.wait_for(scenario(self, connection, r), LIMIT_S)] += 1
            except Exception as error:
                self.fail(f"{scenario.__name__}: {error!r}")
                connection.close()
            finally:
                self.in_flight -= 1
        connection.close()

    async def run(self, minutes: float, requests: int, seed: int) -> None:
        """Let the clients work, with quiet points at equal distances. First, what needs most memory."""
        connection = Connection(self.port)
        await warm_up(self, connection, seed)
        connection.close()
        self.started = time.monotonic()
        self.open_gate.set()
        workers = [asyncio.create_task(self.work(worker, seed)) for worker in range(WORKERS)]
        trouble = asyncio.create_task(self.trouble(random.Random(seed)))
        first, paused = self.started, 0.0
        for point in range(1, QUIET_POINTS + 1):
            while time.monotonic() < first + paused + minutes * 60 * point / QUIET_POINTS and self.sent < requests:
                await asyncio.sleep(0.2)
            paused += await self.be_quiet()
        self.over = True
        self.open_gate.set()
        await asyncio.gather(*workers)
        self.seconds = time.monotonic() - first - paused
        trouble.cancel()
        await asyncio.gather(trouble, return_exceptions=True)

    async def be_quiet(self) -> float:
        """Wait until every request has ended, and sample. Returns the seconds that it took."""
        began = time.monotonic()
        self.open_gate.clear()
        while self.in_flight and time.monotonic() < began + 2 * LIMIT_S:
            await asyncio.sleep(0.05)
        connection = Connection(self.port)
        for model in self.models:  # each is loaded when memory is taken
            await self.expect(connection, "POST", CHAT_PATH, {"model": model, "messages": GREETING, "max_tokens": 1})
        if not await self.idle(connection):
            self.fail("a slot stays in use")
        await asyncio.sleep(1)
        self.samples.append(await asyncio.to_thread(self.sample, await self.processes(connection)))
        connection.close()
        seconds = time.monotonic() - began
        self.started += seconds
        self.open_gate.set()
        return seconds

    async def idle(self, connection: Connection) -> bool:
        """Whether no request runs or waits within ten seconds. The steady stream is one that runs."""
        for _ in range(100):
            text = (await connection.request("GET", "/metrics")).decode()
            counts = [float(value) for value in re.findall(r"^mlx_gptoss_(?:running|waiting)\S* (\S+)$", text, re.M)]
            if sum(counts) <= 1:
                return True
            await asyncio.sleep(0.1)
        return False

    async def processes(self, connection: Connection) -> dict[int, str]:
        """The model of each process that has one, by /health."""
        health = json.loads(await connection.request("GET", "/health"))
        return {model["pid"]: model["id"] for model in health["models"] if model["pid"]}

    def sample(self, names: dict[int, str]) -> dict[str, dict[str, int]]:
        """Memory in bytes, descriptors and threads of the server's processes."""
        found: dict[str, dict[str, int]] = {}
        self.cpu_s = 0.0
        for pid in descendants(self.pid):
            with suppress(psutil.Error, OSError):
                process = psutil.Process(pid)
                times = process.cpu_times()
                self.cpu_s += times.user + times.system + times.children_user + times.children_system
                name = "server" if pid == self.pid else names.get(pid, f"process {len(found)}")
                found[name] = {
                    "rss": process.memory_info().rss,
                    "anonymous": anonymous_bytes(pid),
                    "descriptors": process.num_fds(),
                    "threads": process.num_threads(),
                }
        return found

    async def trouble(self, r: random.Random) -> None:
        """Unload, load and kill the second model, every fifteen seconds or so."""
        connection, name = Connection(self.port), self.models[1]
        while True:
            await asyncio.sleep(r.uniform(5, 25))
            await self.open_gate.wait()
            self.in_flight += 1
            try:
                if r.random() < 0.5:
                    await self.expect(connection, "POST", "/v1/models/unload", {"model": name})
                    await asyncio.sleep(r.uniform(0, 2))
                    await self.expect(connection, "POST", "/v1/models/load", {"model": name})
                    self.ended["unloaded and loaded"] += 1
                else:
                    await self.kill(connection, name)
                    self.ended["kill -9 of a model's process"] += 1
            except Exception as error:
                self.fail(f"unload, load and kill: {error!r}")
                connection.close()
            finally:
                self.in_flight -= 1

    async def kill(self, connection: Connection, name: str) -> None:
        """Kill the model's process; another one must answer within a minute."""
        pids = [pid for pid, model in (await self.processes(connection)).items() if model == name]
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        body = {"model": name, "messages": GREETING, "max_tokens": 1}
        for _ in range(120):
            if pids and await self.expect(connection, "POST", CHAT_PATH, body) is not None:
                if not set(pids) & {*(await self.processes(connection))}:
                    return
            elif not pids:
                return
            await asyncio.sleep(0.5)
        self.fail(f"{name} did not come back after kill -9")

    async def ask_again(self) -> int:
        """Ask the suspects again, alone. Returns how many there were; those that get another reply are failures."""
        connection = Connection(self.port)
        for dialect, body, said in self.suspects:
            alone = await asyncio.wait_for(self.asked(connection, dialect, body), LIMIT_S)
            if alone != said:
                self.fail(f"{dialect.path}: {body} got {said}, and alone {alone}")
        connection.close()
        return len(self.suspects)


CHAT_PATH = "/v1/chat/completions"
GREETING = [{"role": "user", "content": "Hi"}]


@contextmanager
def serving(folder: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """The server in a process of its own, and its port. Ends it by SIGTERM."""
    port = free_port()
    shutil.copytree(NANO, folder / "second", ignore=shutil.ignore_patterns("__pycache__"))
    words = [sys.executable, "-m", "mlx_gptoss_cli", "serve", "--port", str(port), "--backend", "mlx"]
    words += ["--slots", str(SLOTS), "--max-context", "4096", "--prefix-cache", "8"]
    words += ["--model", "nano", "--model", str(folder / "second")]
    with open(folder / "errors", "w") as errors:
        process = subprocess.Popen(words, stderr=errors, text=True, env={**os.environ, **RETURN_MEMORY})
    try:
        yield process, port
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
        return port


async def prepare(port: int, process: subprocess.Popen[str], rate: float) -> Soak:
    """Wait until the server is up, and ask for its models and for the prompt of a conversation."""
    connection = Connection(port)
    for _ in range(600):
        with suppress(ConnectionError):
            await connection.request("GET", "/health")
            if connection.status == 200:
                break
        if process.poll() is not None:
            raise RuntimeError("the server has ended")
        await asyncio.sleep(0.2)
    names = [model["id"] for model in json.loads(await connection.request("GET", "/health"))["models"]]
    words = [{"role": "user", "content": "Reverse the word WORD."}]
    template = await connection.request("POST", "/apply-template", {"messages": words, "reasoning_effort": "low"})
    connection.close()
    return Soak(port, process.pid, names, completions(json.loads(template)["prompt"]), rate)


@contextmanager
def probing(soak: Soak, folder: Path) -> Iterator[None]:
    """The probes, each in a process of its own, which write to files in the folder."""
    script = Path(__file__).with_name("soak_probes.py")
    processes = []
    for probe in PROBES:
        words = [sys.executable, str(script), probe, str(soak.port), str(soak.pid), soak.models[0]]
        with open(folder / probe, "w") as out:
            processes.append(subprocess.Popen(words, stdin=subprocess.PIPE, stdout=out, text=True))
    try:
        yield
    finally:
        for process in processes:
            process.communicate()


async def soak_for(minutes: float, requests: int, seed: int, folder: Path) -> tuple[Soak, dict[str, Any]]:
    """Run it all. Returns the state, with the failures, and the report."""
    with serving(folder) as (process, port):
        soak = await prepare(port, process, requests / (minutes * 60))
        with probing(soak, folder):
            progress = asyncio.create_task(report_progress(soak))
            try:
                await soak.run(minutes, requests, seed)
            finally:
                progress.cancel()
        suspects = await soak.ask_again()
        alive = process.poll() is None
        process.terminate()
        code = await asyncio.to_thread(process.wait, 60)
    if not alive or code != 0:
        soak.fail(f"the server {'ended by itself' if not alive else 'ended'} with {code}")
    done = sum(soak.ended.values())
    report = {
        "minutes": round(soak.seconds / 60, 2),
        "requests": done,
        "requests_per_s": round(done / soak.seconds, 1),
        "cpu_s_of_server_and_of_clients": [round(soak.cpu_s), round(time.process_time())],
        "conversations_checked": soak.checked,
        "asked_again_alone": suspects,
        "gaps": judge_gaps(folder, soak),
        "growth": judge_growth(soak),
        "ended": dict(soak.ended.most_common()),
        "failures": soak.failures,
    }
    return soak, report


async def report_progress(soak: Soak) -> None:
    while True:
        await asyncio.sleep(10)
        done, load = sum(soak.ended.values()), os.getloadavg()[0]
        seconds = time.monotonic() - soak.started
        memory = sum(one["anonymous"] for one in soak.samples[-1].values()) / 1e6 if soak.samples else 0
        print(
            f"{seconds:.0f} s: {done} requests, {max(0, soak.behind_s):.0f} s behind, {soak.checked} conversations "
            f"checked, {len(soak.suspects)} to ask again, {memory:.0f} MB, {len(soak.failures)} failures, "
            f"load {load:.1f}",
            flush=True,
        )


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--minutes", type=float, default=60)
    options.add_argument("--requests", type=int, help="at most; default: 200,000 an hour")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--report", type=Path, help="write the report as JSON to this file")
    given = options.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # not without ending the server
    requests = given.requests or int(given.minutes * 200_000 / 60)
    with tempfile.TemporaryDirectory() as folder:
        soak, report = asyncio.run(soak_for(given.minutes, requests, given.seed, Path(folder)))
        errors = (Path(folder) / "errors").read_text()[-3000:]
    text = json.dumps(report, indent=1)
    if given.report is not None:
        given.report.write_text(text)
    print(text, errors if soak.failures else "", sep="\n")
    sys.exit(bool(soak.failures))


if __name__ == "__main__":
    main()
