"""mlx-gptoss batch goes on after an interruption, and nothing is lost, repeated or half-written."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
from batch_requests import CLI, COMPLETIONS, HERE, ONE, by_id, read, request

import mlx_gptoss
from mlx_gptoss.errors import GptOssError, InvalidRequest
from mlx_gptoss.server.batch import Batch

# The command, which writes this many answers and blocks before the others.
BLOCKING = """
import asyncio, sys
from mlx_gptoss.server import batch
left = int(sys.argv.pop(1))

def blocking(whole):
    async def answer(*args):
        global left
        body = await whole(*args)
        left -= 1
        if left < 0:
            await asyncio.Event().wait()
        return body
    return answer

batch.ENDPOINTS.update({url: (form, blocking(whole)) for url, (form, whole) in batch.ENDPOINTS.items()})
from mlx_gptoss_cli.main import main
main()
"""


@contextmanager
def interrupted(words, out, after):
    """Run the command until it has written `after` more answers; the caller then ends it."""
    command = [sys.executable, "-c", BLOCKING, str(after), "batch", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wanted = (out.read_bytes().count(b"\n") if out.exists() else 0) + after  # whole lines: a torn one is cut off
    end = time.monotonic() + 300
    while time.monotonic() < end and (not out.exists() or out.read_bytes().count(b"\n") < wanted):
        time.sleep(0.002)
    assert out.read_bytes().count(b"\n") >= wanted
    assert process.poll() is None, process.stderr.read()
    yield process
    process.communicate(timeout=300)


def test_killed_and_interrupted_it_goes_on_without_losing_or_repeating_a_line(run, lines, tmp_path):
    whole = by_id(run(*lines))
    out = tmp_path / "again.jsonl"
    words = [str(tmp_path / "in.jsonl"), str(out), *HERE, "--slots", "2"]
    with interrupted(words, out, 3) as process:
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert len(out.read_bytes().splitlines()) == 3
    with out.open("ab") as file:
        file.write(b'{"id":"batch_req_0123","custom_id":"id')
    with interrupted(words, out, 3) as process:
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=300)
    earlier = len(out.read_bytes().splitlines())
    assert earlier == 6
    assert process.returncode == 130
    assert errors == f"interrupted; {earlier} of 18 lines are answered; the same command continues after them\n"
    report = json.loads(subprocess.run([*CLI, *words, "--json"], stdout=subprocess.PIPE, check=True).stdout)
    assert by_id(read(out)) == whole
    assert (report["total"], report["completed"], report["failed"], report["earlier"]) == (18, 18, 0, earlier)
    assert report["completion_tokens"] > 0 and report["seconds"] > 0


def test_what_failed_is_asked_again_if_that_is_wanted(run, tmp_path):
    short = request("long", COMPLETIONS, {"prompt": "Hi", "max_tokens": 1, "temperature": 0})
    lines = [ONE, request("long", COMPLETIONS, {"prompt": "Hi " * 2000}), b"no JSON", request("b", "/v1/files", {})]
    run(*lines)
    out, (requests,) = tmp_path / "out.jsonl", [tmp_path / "in.jsonl"]
    out.chmod(0o640)
    kept = [line for line in out.read_bytes().splitlines(keepends=True) if b'"custom_id":"a"' in line]
    requests.write_bytes(b"\n".join([ONE, short, b"no JSON"]))
    with pytest.raises(InvalidRequest, match="which no line of the requests is waiting for"):
        Batch(requests, out)
    with Batch(requests, out, retry=True) as batch:
        assert (batch.done, batch.failed, batch.total) == (1, 0, 3)
    assert out.read_bytes() == b"".join(kept) and out.stat().st_mode & 0o777 == 0o640
    again = run(ONE, short, b"no JSON")
    assert {entry["custom_id"]: (entry["response"] or {}).get("status_code") for entry in again} == {
        "a": 200, "long": 200, None: None,
    }  # fmt: skip
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_without_an_answer_there_is_no_file(tmp_path):
    """If the model cannot be loaded, for example. An empty file that already existed is kept."""
    (tmp_path / "in.jsonl").write_bytes(ONE)
    words = [str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), "--model", str(tmp_path)]
    out = subprocess.run([*CLI, *words], capture_output=True, text=True, timeout=300)
    assert (out.returncode, out.stderr.count("\n")) == (1, 1) and "is not a checkpoint" in out.stderr
    assert not (tmp_path / "out.jsonl").exists()
    (tmp_path / "out.jsonl").touch()
    Batch(tmp_path / "in.jsonl", tmp_path / "out.jsonl").close()
    assert (tmp_path / "out.jsonl").exists()


def test_two_do_not_write_one_file(tmp_path):
    (tmp_path / "in.jsonl").write_bytes(ONE)
    with Batch(tmp_path / "in.jsonl", tmp_path / "out.jsonl") as first:
        with pytest.raises(GptOssError, match="another process is writing"):
            Batch(tmp_path / "in.jsonl", tmp_path / "out.jsonl")
        assert first.done == 0
    Batch(tmp_path / "in.jsonl", tmp_path / "out.jsonl").close()


def test_a_full_disk_is_one_error_and_keeps_what_is_done(run, lines, tmp_path):
    out = tmp_path / "out.jsonl"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (out.stat().st_size + 100, limits[1]))

    try:
        with pytest.raises(GptOssError, match=r"could not be written \(File too large\); its \d+ answers are kept"):
            run(*lines[:9], progress=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    kept = out.read_bytes()
    assert kept.endswith(b"}\n") and 0 < kept.count(b"\n") < 9
    assert len(by_id(run(*lines[:9]))) == 9
    assert out.read_bytes().startswith(kept)


def test_an_engine_that_closes_ends_the_run_and_fails_no_line(run, lines):
    with (
        mlx_gptoss.load(slots=2, max_context=1024, backend="mlx", device="cpu") as other,
        pytest.raises(GptOssError, match="closed"),
    ):
        run(*lines[:9], progress=other.close, model=other)
    assert len(by_id(run(*lines[:9]))) == 9
