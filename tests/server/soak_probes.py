"""Probes of soak.py, each in a process of its own: `python soak_probes.py health|stream|sleep PORT PID [MODEL]`.

health: the time that GET /health takes, twenty times a second. stream: the time between the chunks of one stream after
another, with as long a pause after each, so that the clients get their share. sleep: how much later than asked a
sleeping process wakes, which tells a busy machine from a server that stalls. PID is the server: for every long gap, the
probe reads from /proc how long the threads that the answer came through were ready to run in it but had no CPU: those
of the server, of the model's process and of the probe. These waits follow each other, so they are summed up; together
they are at most the gap. Where the machine has CPUs to spare they are next to nothing.

Writes a JSON object per gap of interest to stdout, and one with the totals when stdin closes.
"""

from __future__ import annotations

import http.client
import json
import os
import sys
import threading
import time
from pathlib import Path

LONG_S = 0.1  # a gap to report
PERIOD_S = 0.05
TREE_PERIOD_S = 2.0


def descendants(pid: int) -> list[int]:
    """A process and all below it."""
    found, left = [], [pid]
    while left:
        found.append(left.pop())
        try:
            for thread in os.listdir(f"/proc/{found[-1]}/task"):
                left += map(int, Path(f"/proc/{found[-1]}/task/{thread}/children").read_text().split())
        except OSError:  # it has ended
            continue
    return found


def anonymous_bytes(pid: int) -> int:
    """Memory of a process that no file backs. Pages of a file, such as a library's, would count as its own or not by
    which other programs on the machine have mapped it. Raises OSError if the process has ended."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


class Waits:
    """How long threads of the server and of this process have waited for a CPU, from the kernel's accounts."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._next_tree = 0.0
        self._files: list[Path] = []

    def read(self) -> dict[Path, int]:
        """Nanoseconds by thread so far."""
        if time.monotonic() >= self._next_tree:
            self._next_tree = time.monotonic() + TREE_PERIOD_S
            below = descendants(self.pid)[1:]
            processes = [self.pid, *sorted(below)[:1], os.getpid()]  # the first model is loaded first, and stays
            self._files = [path for one in processes for path in Path(f"/proc/{one}/task").glob("*/schedstat")]
        found = {}
        for path in self._files:
            try:
                found[path] = int(path.read_text().split()[1])
            except (OSError, IndexError):  # it has ended
                continue
        return found

    def since(self, before: dict[Path, int]) -> float:
        """Seconds that the threads have waited since then, one after the other."""
        return sum(now - before[path] for path, now in self.read().items() if path in before) / 1e9


class Gaps:
    """Prints long gaps, and counts all of them."""

    def __init__(self, probe: str, waits: Waits) -> None:
        self.probe = probe
        self.waits = waits
        self.count = 0
        self.longest = 0.0
        self.failures: list[str] = []

    def add(self, started: float, before: dict[Path, int]) -> float:
        """Count the gap from `started`, when the waits were `before`, until now. Returns the time of now."""
        now = time.monotonic()
        seconds = now - started
        self.count += 1
        self.longest = max(self.longest, seconds)
        if seconds >= LONG_S:
            waited = min(seconds, self.waits.since(before))
            print(json.dumps({"probe": self.probe, "at": started, "seconds": seconds, "waited": waited}), flush=True)
        return now

    def finish(self) -> None:
        totals = {"probe": self.probe, "count": self.count, "longest": self.longest, "failures": self.failures[:20]}
        print(json.dumps(totals), flush=True)


def probe_health(gaps: Gaps, port: int, ended: threading.Event) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    due = time.monotonic()
    while not ended.wait(max(0.0, due - time.monotonic())):
        before, started = gaps.waits.read(), time.monotonic()
        try:
            connection.request("GET", "/health")
            answer = connection.getresponse()
            answer.read()
            if answer.status != 200:
                gaps.failures.append(f"/health answered {answer.status}")
        except http.client.RemoteDisconnected:  # the server closes an idle connection
            connection.close()
        except (OSError, http.client.HTTPException) as error:
            gaps.failures.append(f"/health: {error!r}")
            connection.close()
        due = max(due + PERIOD_S, gaps.add(started, before))


def probe_stream(gaps: Gaps, port: int, ended: threading.Event, model: str) -> None:
    """Streams of 200 tokens, none of which can end: the special tokens are forbidden."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = {
        "model": model,
        "prompt": "The steady stream of the soak says: ",
        "max_tokens": 200,
        "temperature": 0,
        "stream": True,
        "logit_bias": {str(id): -100 for id in special_ids(connection)},
    }
    while not ended.is_set():
        began = time.monotonic()
        try:
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            if answer.status != 200:
                gaps.failures.append(f"the steady stream: {answer.status} {answer.read()[:200]!r}")
                time.sleep(1)
                continue
            last, before = 0.0, gaps.waits.read()
            for line in answer:
                if line.startswith(b"data: {"):
                    if b'"error"' in line:
                        gaps.failures.append(f"the steady stream: {line[:200]!r}")
                    last = gaps.add(last, before) if last else time.monotonic()
                    before = gaps.waits.read()
            connection.close()  # the server would close it in the pause
            ended.wait(time.monotonic() - began)
        except (OSError, http.client.HTTPException) as error:
            gaps.failures.append(f"the steady stream: {error!r}")
            connection.close()
            time.sleep(0.2)


def special_ids(connection: http.client.HTTPConnection) -> list[int]:
    """The ids of the tokens that could end a text."""
    names = ("<|return|>", "<|call|>", "<|end|>", "<|endoftext|>", "<|start|>", "<|message|>", "<|channel|>")
    connection.request("POST", "/tokenize", json.dumps({"content": "".join(names), "parse_special": True}))
    found: list[int] = json.loads(connection.getresponse().read())["tokens"]
    return found


def probe_sleep(gaps: Gaps, ended: threading.Event) -> None:
    while not ended.is_set():
        due, before = time.monotonic() + PERIOD_S, gaps.waits.read()
        time.sleep(PERIOD_S)
        gaps.add(due, before)


def main() -> None:
    probe, port, pid = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    gaps, ended = Gaps(probe, Waits(pid)), threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
    if probe == "health":
        probe_health(gaps, port, ended)
    elif probe == "stream":
        probe_stream(gaps, port, ended, sys.argv[4])
    else:
        probe_sleep(gaps, ended)
    gaps.finish()


if __name__ == "__main__":
    main()
